"""The file in a classifier's adapter that describes its head's outputs."""

ADAPTER_CONFIG = "adapter_config.json"
HEAD_FILE = "classifier.json"
"""Fields of the base model's configuration: `id2label`, `label2id`, and the type of the loss."""
