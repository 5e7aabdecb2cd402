"""Weights on disk: our checkpoints, LoRA adapters, Hugging Face's and nanoGPT's formats."""
