"""Pedigree: LLM fine-tuning in which every model knows its data. Start reading at pipeline.py."""
