"""Loads Hugging Face models and tokenizers, for training and evaluation alike."""
