"""TLoRA in other trainers, one file each."""
