"""Model and batches -> statistics. The only package with hooks on the user's model."""
