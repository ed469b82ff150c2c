"""`tlora compare`: its record, its folder on disk, its trials and the queue that runs them."""
