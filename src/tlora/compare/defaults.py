"""Reference values for the names of a comparison's runs.

A run's name ends in a digest of the settings that differ from the tables below. The tables contain
the original defaults and NEVER change: when a default changes, its entry stays, so a comparison
without that field gets new names, and one that pins the old value keeps the old names. A new field
gets an entry with the value that means "as before"; a field without an entry is part of every name.
A new method needs no entry: all its options are then part of its names.
"""

from __future__ import annotations

import dataclasses
from typing import Any

# fmt: off
SHARED: dict[str, Any] = {
    "task": "jsonl", "dtype": "auto", "quantization": "none", "trust_remote_code": False,
    "data": {
        "kind": None, "dataset": None, "dataset_config": None, "train_split": "train",
        "eval_split": None, "prompt_column": None, "response_column": None,
        "messages_column": None, "text_column": None, "text_pair_column": None,
        "label_column": None, "label_names": None, "prompt_template": None,
        "loss_on": "response", "max_length": 512, "max_train_rows": None, "max_eval_rows": None,
        "subset_seed": None, "overlap": "refuse", "guard": [], "format": "raw", "system": None,
        "chat_template": None, "val_size": None,
    },
    "calibration": {"samples": 32, "batch_size": 4, "skip_bad_samples": False, "cache": None},
}
"""Fields shared by all methods. NEVER change a value."""

TRAINER: dict[str, Any] = {
    "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 1, "num_train_epochs": 3.0, "max_steps": -1,
    "lr_scheduler_type": "linear", "lr_scheduler_kwargs": None, "warmup_steps": 0,
    "optim": "adamw_torch_fused", "optim_args": None, "weight_decay": 0.0,
    "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "max_grad_norm": 1.0,
    "label_smoothing_factor": 0.0, "neftune_noise_alpha": None, "bf16": False, "fp16": False,
    "bf16_full_eval": False, "fp16_full_eval": False, "data_seed": None,
    "dataloader_drop_last": False, "train_sampling_strategy": "random",
    "average_tokens_across_devices": True, "use_liger_kernel": False,
    # TRL's, for causal tasks.
    "loss_type": "nll", "packing": False, "padding_free": False, "shuffle_dataset": False,
}
"""Training arguments that affect results. NEVER change a value."""

_ADAPTER = {
    "task_type": None, "lora_dropout": 0.0, "bias": "none", "modules_to_save": None,
    "trainable_token_indices": None, "ensure_weight_tying": False,
}
_TARGETED = _ADAPTER | {"target_modules": "all-linear", "exclude_modules": None}
_LORA = _TARGETED | {"r": 8, "lora_alpha": 8}

METHODS: dict[str, dict[str, Any]] = {
    "tlora": _LORA | {
        "target_parameters": None, "layers_to_transform": None, "layers_pattern": None,
        "basis": "weight-covariance", "whiten": False, "allocate_rank": True,
        "allocate_scale": True, "sensitivity_rule": "magnitude", "scale_rule": "released",
        "freeze_a": True, "budget": "rank", "rank_min": 1, "rank_max": None,
        "covariance": "auto", "subspace": "auto", "memory_budget": None,
    },
    "full": {"task_type": None},
    "lora": _LORA,
    "rslora": _LORA,
    "loraplus": _LORA | {"lr_ratio": 16.0},
    "dora": _LORA,
    "adalora": _TARGETED | {
        "init_r": 12, "target_r": 8, "lora_alpha": 8, "tinit": 0, "tfinal": 0, "deltaT": 1,
        "beta1": 0.85, "beta2": 0.85, "orth_reg_weight": 0.5,
    },
    "olora": _LORA,
    "pissa": _LORA | {"niter": None},
    "milora": _LORA,
    "ailora": _ADAPTER | {"r": 8, "lora_alpha": 8, "query_modules": None, "value_modules": None},
    "corda": _LORA | {"corda_method": "ipm"},
    "eva": _LORA | {
        "rho": 2.0, "tau": 0.99, "use_label_mask": False, "whiten": False,
        "adjust_scaling_factors": True,
    },
    "lora-ga": _LORA | {"direction": "ArB2r", "init_scale": "stable", "stable_gamma": 16},
    "lora-fa": _LORA | {"projected": False},
    "trimatrix": _TARGETED | {"r": 32, "scale": 1.0},
}
"""Options of each method; an explicit seed is always part of the name. NEVER change a value."""
# fmt: on


def differing(values: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Return the items of ``values`` that differ from ``before``, sections field by field."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        old = before.get(name, dataclasses.MISSING)
        if isinstance(old, dict):
            if nested := differing(value, old):
                found[name] = nested
        elif value != old:
            found[name] = value
    return found
