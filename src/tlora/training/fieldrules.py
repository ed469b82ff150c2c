"""Rules for the trainer's fields beyond their types.

transformers, TRL and torch check most of these only when training starts, after calibration.
Nothing here imports torch.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from tlora.checks import POSITIVE, PROBABILITY, SEED, Rule, at_least
from tlora.errors import ArtifactError
from tlora.files import read_json

_COUNT = Annotated[int, at_least(1)]
_NOT_NEGATIVE = Annotated[float, at_least(0)]
_SHARE = Annotated[float, PROBABILITY]
_STEPS = Annotated[
    float,
    Rule(
        "a whole number of steps, or a share of all steps below 1",
        lambda value: 0 < value < 1 or (value >= 1 and float(value).is_integer()),
    ),
]
_RATE = Rule(
    "a positive number; at 0 nothing trains, and `tlora init` saves an untrained adapter",
    POSITIVE.holds,
)
_LIMIT = Rule(
    "a positive whole number of steps, or -1 to train by epochs",
    lambda value: value >= 1 or value == -1,
)

RULES: dict[str, Any] = {
    "learning_rate": Annotated[float, _RATE],
    "num_train_epochs": Annotated[float, POSITIVE],
    "max_steps": Annotated[int, _LIMIT],
    "adam_epsilon": Annotated[float, POSITIVE],
    "data_seed": Annotated[int, SEED] | None,
    "dataloader_num_workers": Annotated[int, at_least(0)],
    "dataloader_multiprocessing_context": Literal["fork", "spawn", "forkserver"] | None,
    "train_sampling_strategy": Literal[
        "random", "sequential", "group_by_length", "batch_rebalance"
    ],
    "loss_type": Literal["nll", "dft", "chunked_nll"],
    "packing_strategy": Literal["bfd", "bfd_split", "bfd-requeue", "wrapped"],
    "pad_to_multiple_of": _COUNT | Literal["auto"] | None,
    "eval_steps": _STEPS | None,
    **dict.fromkeys(("logging_steps", "save_steps"), _STEPS),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), _SHARE),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "warmup_steps", "eval_delay"), _NOT_NEGATIVE),
    **dict.fromkeys(("neftune_noise_alpha", "router_aux_loss_coef"), _NOT_NEGATIVE | None),
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "ddp_timeout",
        ),
        _COUNT,
    ),
    **dict.fromkeys(
        (
            "dataloader_prefetch_factor",
            "dataset_num_proc",
            "ddp_bucket_cap_mb",
            "eval_accumulation_steps",
            "generation_max_length",
            "generation_num_beams",
            "save_total_limit",
            "torch_empty_cache_steps",
        ),
        _COUNT | None,
    ),
}
"""Types with bounds by field name, which replace the library's declared types."""

SETTING_FILES = ("deepspeed", "fsdp_config", "accelerator_config")
"""Fields that take a JSON file."""
_NEED_WORKERS = (
    "dataloader_prefetch_factor",
    "dataloader_persistent_workers",
    "dataloader_multiprocessing_context",
)


def relations(fields: dict[str, Any]) -> Iterator[str]:
    """Yield a sentence for each fault between the trainer's fields."""
    if not fields.get("dataloader_num_workers"):
        for name in _NEED_WORKERS:
            if fields.get(name):
                yield (
                    f"`{name}` is {fields[name]!r}, which needs worker processes; give"
                    " `dataloader_num_workers` too."
                )
    method = fields.get("dataloader_multiprocessing_context")
    if method and method not in (here := multiprocessing.get_all_start_methods()):
        yield (
            f"`dataloader_multiprocessing_context` is {method!r}, which this system lacks; choose"
            f" one of {', '.join(map(repr, here))}."
        )
    for name in SETTING_FILES:
        if isinstance(file := fields.get(name), str):
            try:
                if not isinstance(read_json(file), dict):
                    yield f"`{name}`: {file} holds no `name: value` pairs; give a file of settings."
            except ArtifactError as error:
                yield f"`{name}`: {error}"
    if fields.get("parallelism_config") is not None:
        yield "`parallelism_config` cannot be given as text; set it by `accelerate launch`."
    if fields.get("push_to_hub") and not fields.get("hub_model_id"):
        yield "`push_to_hub` needs `hub_model_id`, the name of a repository on the Hub; give it."
