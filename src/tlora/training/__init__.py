"""`tlora train` and `tlora init`: a run's record, its folder on disk, and its stages."""
