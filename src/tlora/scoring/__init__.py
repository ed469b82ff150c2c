"""Answers against references, programs against tests, replies graded by a judge; no torch."""
