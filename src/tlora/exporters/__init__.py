"""Formats for serving a trained LoRA, one file each."""
