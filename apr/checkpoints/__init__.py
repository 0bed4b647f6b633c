"""Weights at rest: APR v2, Hugging Face, GGUF, PEFT; import, export, comparison, validation."""
