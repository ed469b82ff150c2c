"""Model and batches -> statistics. The only place with hooks on the user's model."""
