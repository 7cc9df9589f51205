"""Weights on disk: Hugging Face checkpoints, PEFT adapters, the hub."""
