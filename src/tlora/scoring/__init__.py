"""Score answers against references, programs against tests, and replies by a judge; no torch."""
