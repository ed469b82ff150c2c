"""What an artifact really does: which readers get it right, by its files and by its replies."""
