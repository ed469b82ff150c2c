"""The embedded demonstration: a corpus generator and the small base model trained on it."""
