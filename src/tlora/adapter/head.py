"""The file in a classifier's adapter that says what its head's outputs are."""

ADAPTER_CONFIG = "adapter_config.json"
HEAD_FILE = "classifier.json"
"""Fields of the base model's configuration: `id2label`, `label2id`, and how the loss is taken."""
