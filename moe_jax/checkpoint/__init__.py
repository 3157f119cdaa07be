"""Checkpoints on disk: safetensors files, quantised formats, streaming into stacked weights and back."""
