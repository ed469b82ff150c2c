"""One file a method; each is registered by a line in `tlora.registry`."""
