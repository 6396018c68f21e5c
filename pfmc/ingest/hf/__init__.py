"""Builds graphs straight from Hugging Face checkpoints: one small builder for each family."""
