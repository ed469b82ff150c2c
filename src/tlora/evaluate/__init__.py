"""`tlora eval`: its record, its folder on disk, the models it evaluates and how they are asked."""
