"""Pedigree: LLM fine-tuning in which every model knows its data. Start reading at pipeline.py."""

__version__ = "0.2.0"
