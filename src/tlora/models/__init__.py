"""Hugging Face models and tokenizers, loaded for training and evaluation alike."""
