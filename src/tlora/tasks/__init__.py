"""One file per task; `tlora.registry` registers each in one line."""
