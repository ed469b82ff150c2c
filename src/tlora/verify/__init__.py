"""Verify which readers interpret an artifact correctly, by its files and by its replies."""
