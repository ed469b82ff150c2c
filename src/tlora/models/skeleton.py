"""The layers of a checkpoint by name and size, from its configuration alone: no weight is read."""

from __future__ import annotations

from typing import Any

from tlora.models.pretrained import Pretrained, readable

_CLASSES = {
    "SEQ_CLS": "transformers:AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "transformers:AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "transformers:AutoModelForTokenClassification",
    "QUESTION_ANS": "transformers:AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "transformers:AutoModel",
}
"""By PEFT's name of the kind of task; any other is a causal language model."""


def layer_sizes(checkpoint: Pretrained, task_type: str | None = None) -> dict[str, tuple[int, int]]:
    """Return d_out and d_in of each linear layer, by its full name in the model.

    Args:
        checkpoint: the base model.
        task_type: PEFT's name of the kind of task, which decides the model's head.

    Raises:
        ConfigError: there is no such model, or transformers cannot build it.
    """
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    config: Any = checkpoint.config()
    config.__dict__.pop("quantization_config", None)
    with readable(checkpoint.name, "model"), torch.device("meta"):
        name = _CLASSES.get(str(task_type), "transformers:AutoModelForCausalLM")
        kind = checkpoint.class_for(name, config)
        model = kind.from_config(config, trust_remote_code=checkpoint.trust_remote_code)
    sizes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            sizes[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            sizes[name] = (module.nf, module.nx)
    return sizes
