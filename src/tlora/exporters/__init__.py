"""Formats that a trained LoRA is served in, one file each."""
