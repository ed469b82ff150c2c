"""Running models on the tasks of an evaluation: which models, how they are loaded and asked."""
