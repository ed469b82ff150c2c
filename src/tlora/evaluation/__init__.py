"""Scoring of what a model wrote: answers against references, programs against their tests."""
