"""One file per method; each is registered by a line in `tlora.registry`."""
