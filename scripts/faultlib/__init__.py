"""What scripts/faults.py injects, into which commands, and how it judges what comes of it."""
