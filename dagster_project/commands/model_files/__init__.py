"""Files of a model that leave the project: GGUF and safetensors with the
model's pedigree in their metadata, and the audit of such files."""

FORMATS = ("gguf", "safetensors")
"""Of `pedigree export`: those that write the model itself."""
QUANTIZATIONS = ("f16", "q8_0", "q4_k_m")
"""Number formats of GGUF files."""
MERGED = {"adapter": "merged", "aligned": "merged_aligned"}
"""Stage of an adapter -> the stage that merges it into a complete model."""
TEXT_MODELS = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
"""Ends of the names, in config.json, of architectures that generate text."""
