"""Checks that the requested trainer features are installed and work, before any row is read.

The trainer checks these only when it is constructed or starts, after calibration. Here the
libraries' own functions are called early.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator
from typing import Any, Literal, get_args

from tlora.checks import fault, fitted
from tlora.errors import ConfigError, did_you_mean, first_line
from tlora.methods.lorarite import OPTIM
from tlora.models.pretrained import load_class
from tlora.training.kinds import KindSpec
from tlora.training.runconfig import RunConfig
from tlora.training.runfolder import process_count

# Names of transformers' functions that differ from is_NAME_available.
_AVAILABLE = {
    "azure_ml": "is_azureml_available",
    "comet_ml": "is_comet_available",
    "flyte": "is_flytekit_available",
}


def check_asked(kind: KindSpec, config: RunConfig) -> None:
    """Check the trainer fields of a run, before any row is read.

    Raises:
        ConfigError: transformers or TRL refuse a value (their message says why), or a requested
            package is not installed.
    """
    _check(made(kind, asked(kind, config) | {"output_dir": "unused"}))


def asked(kind: KindSpec, config: RunConfig) -> dict[str, Any]:
    """Return the training arguments that a run sets: the user's over our defaults."""
    known = {field.name: field for field in dataclasses.fields(load_class(kind.arguments))}
    # YAML reads a bare `no` as false, and "no" is the name of a strategy.
    given = {
        name: "no" if name.endswith("_strategy") and value is False else value
        for name, value in config.trainer.items()
    }
    given |= {name: fitted(known[name].type, value) for name, value in given.items()}
    if given.get("optim") == OPTIM:
        given["optim"] = "adamw_torch"  # transformers does not know ours: `make_trainer` makes it
    if faults := [each for name in given for each in _choice_faults(known[name], given[name])]:
        raise ConfigError(faults, where="trainer")
    stopping = _stopping_fields(given) if config.early_stopping else {}
    return chosen(known, given) | stopping | given


def _choice_faults(field: Any, value: Any) -> list[str]:
    """Return a sentence if a field whose default is of an enumeration is none of its values."""
    kinds = (*get_args(field.type), field.type)
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, enum.Enum) and isinstance(value, str):
            names = [each.value for each in kind] + [OPTIM] * (field.name == "optim")
            return fault(field.name, Literal[tuple(names)], value)
    return []


def made(kind: KindSpec, fields: dict[str, Any]) -> Any:
    """Make the training arguments.

    Raises:
        ConfigError: transformers or TRL refuse a value; their message says why.
    """
    try:
        return load_class(kind.arguments)(**fields)
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise ConfigError(first_line(error), where="trainer") from error


def chosen(known: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return our defaults over the library's.

    Args:
        known: fields of the training arguments by name.
        given: the user's fields.
    """
    import torch
    from transformers.utils import is_torch_bf16_gpu_available

    chosen: dict[str, Any] = {"report_to": "none", "label_names": ["labels"]}
    # The filter synchronizes at every batch, and hides a diverging training.
    chosen["logging_nan_inf_filter"] = False
    if known["bf16"].default is None and not is_torch_bf16_gpu_available():
        chosen["bf16"] = False
    if not torch.accelerator.is_available() and process_count() > 1:
        # By default the processes of a CPU launch would each train alone.
        chosen |= {"use_cpu": True, "ddp_backend": "gloo"}
    if not torch.cuda.is_available():
        chosen["dataloader_pin_memory"] = False
        # transformers 5.2x renamed the field; the old name still works, with a warning.
        names = ("activation_checkpointing", "gradient_checkpointing")
        if not any(name in given for name in names):
            chosen[next(name for name in names if name in known)] = False
    return chosen


def _stopping_fields(given: dict[str, Any]) -> dict[str, Any]:
    """Return the trainer's fields that keep the best checkpoint, evaluated at each save."""
    steps = given.get("eval_steps", given.get("save_steps"))
    asked = given.get("eval_strategy", given.get("save_strategy", "steps" if steps else "epoch"))
    every = {"eval_steps": steps, "save_steps": steps} if steps else {}
    return every | {
        "eval_strategy": asked,
        "save_strategy": asked,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": False,
    }


def _check(arguments: Any) -> None:
    faults = [
        *_reporting_faults(arguments),
        *_hub_faults(arguments),
        *_compile_faults(arguments),
        *_level_faults(arguments),
        *_memory_faults(arguments),
        *_precision_faults(arguments),
        *_optimizer_faults(arguments),
    ]
    if faults:
        raise ConfigError(faults, where="trainer")


def _reporting_faults(arguments: Any) -> Iterator[str]:
    from transformers.integrations import integration_utils

    known = list(integration_utils.INTEGRATION_TO_CALLBACK)
    for name in arguments.report_to:
        if name not in known:
            yield (
                f"`report_to` names {name!r}; choose from {', '.join(known)}, all or none."
                f"{did_you_mean(name, known)}"
            )
            continue
        function = _AVAILABLE.get(name, f"is_{name}_available")
        available = getattr(integration_utils, function, lambda: True)
        if not available():
            yield (
                f"`report_to` names {name!r}, which is not installed; install it, or "
                "remove it from `report_to`."
            )


def _hub_faults(arguments: Any) -> Iterator[str]:
    import huggingface_hub
    from huggingface_hub import constants

    if not arguments.push_to_hub:
        return
    if constants.HF_HUB_OFFLINE:
        yield (
            "`push_to_hub` needs the Hub, but HF_HUB_OFFLINE is set; unset it, or "
            "remove `push_to_hub`."
        )
    elif not (arguments.hub_token or huggingface_hub.get_token()):
        yield "`push_to_hub` needs a Hub token; run `hf auth login`, or set HF_TOKEN."


def _compile_faults(arguments: Any) -> Iterator[str]:
    if not arguments.torch_compile:
        return
    from accelerate.utils import DynamoBackend
    from torch import _dynamo, _inductor

    names = {each.value.lower() for each in DynamoBackend}
    backends = sorted(names & {*_dynamo.list_backends(exclude_tags=None)})
    backend, mode = arguments.torch_compile_backend, arguments.torch_compile_mode
    if backend not in backends:
        yield (
            f"`torch_compile_backend` is {backend!r}; choose one of"
            f" {', '.join(map(repr, backends))}.{did_you_mean(str(backend), backends)}"
        )
    modes = list(_inductor.list_mode_options())
    if mode is not None and mode not in modes:
        yield (
            f"`torch_compile_mode` is {mode!r}; choose one of {', '.join(map(repr, modes))}."
            f"{did_you_mean(mode, modes)}"
        )


def _level_faults(arguments: Any) -> Iterator[str]:
    from transformers.training_args import trainer_log_levels
    from transformers.utils import is_liger_kernel_available

    for name in ("log_level", "log_level_replica"):
        level = getattr(arguments, name)
        if level not in trainer_log_levels:
            levels = ", ".join(map(repr, trainer_log_levels))
            yield f"`{name}` is {level!r}; choose one of {levels}."
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        yield (
            "`use_liger_kernel` needs the package liger-kernel; install it, or "
            "remove `use_liger_kernel`."
        )


def _memory_faults(arguments: Any) -> Iterator[str]:
    import torch
    from torch.utils.checkpoint import checkpoint

    if getattr(arguments, "activation_offloading", False) and not torch.accelerator.is_available():
        yield "`activation_offloading` needs an accelerator, and there is none; remove it."
    kwargs = dict(arguments.gradient_checkpointing_kwargs or {})
    kwargs.pop("selective", None)  # TRL's own
    try:
        checkpoint(torch.neg, torch.zeros(1), **{"use_reentrant": False, **kwargs})
    except Exception as error:  # an unknown keyword, a refused value
        yield f"`gradient_checkpointing_kwargs` cannot be used: {first_line(error)}"


def _precision_faults(arguments: Any) -> Iterator[str]:
    # accelerate would silently train in float32.
    if arguments.fp16 and arguments.device.type == "cpu":
        yield "`fp16` needs a GPU, and this run trains on the CPU; remove it, or give `bf16`."


def _optimizer_faults(arguments: Any) -> Iterator[str]:
    """Make the optimizer and its schedule for one parameter, as the trainer will for the model."""
    import torch
    from transformers import Trainer, get_scheduler

    parameters = [torch.nn.Parameter(torch.zeros(1))]
    optimizer: Any = torch.optim.SGD(parameters, lr=1.0)
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, None)
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
            optimizer = kind(parameters, **options)
    except Exception as error:  # an optimizer's library may raise anything
        # Some choose their parameters from the model, which is loaded later.
        if "model" not in first_line(error):
            args = f" with `optim_args` {arguments.optim_args!r}" if arguments.optim_args else ""
            yield (
                f"`optim` {str(arguments.optim.value)!r}{args} cannot be used here:"
                f" {first_line(error)}"
            )
    try:
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer,
            num_warmup_steps=1,
            num_training_steps=2,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
        )
    except Exception as error:  # an unknown keyword, a refused value
        name = arguments.lr_scheduler_type.value
        yield f"`lr_scheduler_type` {name!r} cannot be used with these fields: {first_line(error)}"
