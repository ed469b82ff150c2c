"""One file a task; each is registered by a line in `tlora.registry`."""
