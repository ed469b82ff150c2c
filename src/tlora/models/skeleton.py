"""Names and sizes of a checkpoint's layers, from its configuration alone: no weights are read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tlora.models.pretrained import Pretrained, readable

_CLASSES = {
    "SEQ_CLS": "transformers:AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "transformers:AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "transformers:AutoModelForTokenClassification",
    "QUESTION_ANS": "transformers:AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "transformers:AutoModel",
}
"""By PEFT's name of the task kind; any other kind is a causal language model."""


def skeleton(checkpoint: Pretrained, task_type: str | None = None) -> Any:
    """Return a checkpoint's model on the meta device, without quantization.

    Args:
        checkpoint: the base model.
        task_type: PEFT's name of the task kind, which decides the model's head.

    Raises:
        ConfigError: there is no such model, or transformers cannot build it.
    """
    import torch

    config: Any = checkpoint.config()
    config.__dict__.pop("quantization_config", None)
    with readable(checkpoint.name, "model"), torch.device("meta"):
        kind = checkpoint.class_for(auto_class(config, task_type), config)
        if not hasattr(kind, "from_config"):
            return kind(config)
        return kind.from_config(config, trust_remote_code=checkpoint.trust_remote_code)


def auto_class(config: Any, task_type: str | None) -> str:
    """Return the class that loads a model for a kind of task, as "module:name".

    Without a kind of task, this is the class that saved the model, if transformers has it.
    """
    import transformers

    if task_type is None:
        for name in getattr(config, "architectures", None) or ():
            if hasattr(transformers, name):
                return f"transformers:{name}"
    return _CLASSES.get(str(task_type), "transformers:AutoModelForCausalLM")


def layer_sizes(checkpoint: Pretrained, task_type: str | None = None) -> dict[str, tuple[int, int]]:
    """Return d_out and d_in of each linear layer, by its full name in the model.

    Arguments and errors as for `skeleton`.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    sizes = {}
    for name, module in skeleton(checkpoint, task_type).named_modules():
        if isinstance(module, nn.Linear):
            sizes[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            sizes[name] = (module.nf, module.nx)
    return sizes


def names_in_model(model: Any, keys: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Return the model's names for the tensors in a checkpoint's files.

    Args:
        model: as `skeleton` returns it.
        keys: names of tensors in the files.

    Returns:
        By name in the files: the name in the model, and whether transformers transforms the tensor
        (fuses, splits or permutes it) besides renaming it.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    known, prefix = model.state_dict(), model.base_model_prefix
    found = {}
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], prefix, known)
        found[key] = (name, pattern is not None)
    return found
