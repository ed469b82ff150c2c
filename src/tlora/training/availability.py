"""Whether what the training arguments ask for is installed and can start, before a model is loaded.

The trainer looks at these only when it is made or starts, after calibration. Here the libraries'
own functions are asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tlora.errors import ConfigError, did_you_mean, first_line

# Names of transformers' functions that differ from is_NAME_available.
_AVAILABLE = {
    "azure_ml": "is_azureml_available",
    "comet_ml": "is_comet_available",
    "flyte": "is_flytekit_available",
}


def check_arguments(arguments: Any) -> None:
    """Check training arguments that the library took when they were made.

    Raises:
        ConfigError: a package, a token or a backend is missing, or the optimizer or its schedule
            cannot be made; all faults at once.
    """
    faults = [
        *_reporting_faults(arguments),
        *_hub_faults(arguments),
        *_compile_faults(arguments),
        *_level_faults(arguments),
        *_memory_faults(arguments),
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
            yield f"`report_to` names {name!r}, which is not installed; install it or leave it out."


def _hub_faults(arguments: Any) -> Iterator[str]:
    import huggingface_hub
    from huggingface_hub import constants

    if not arguments.push_to_hub:
        return
    if constants.HF_HUB_OFFLINE:
        yield "`push_to_hub` needs the Hub, but HF_HUB_OFFLINE is set; unset it, or leave it out."
    elif not (arguments.hub_token or huggingface_hub.get_token()):
        yield "`push_to_hub` needs a token of the Hub; run `hf auth login`, or set HF_TOKEN."


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
        yield "`use_liger_kernel` needs the package liger-kernel; install it, or leave it out."


def _memory_faults(arguments: Any) -> Iterator[str]:
    import torch
    from torch.utils.checkpoint import checkpoint

    if getattr(arguments, "activation_offloading", False) and not torch.accelerator.is_available():
        yield "`activation_offloading` needs an accelerator, and there is none; leave it out."
    kwargs = dict(arguments.gradient_checkpointing_kwargs or {})
    kwargs.pop("selective", None)  # TRL's own
    try:
        checkpoint(torch.neg, torch.zeros(1), **{"use_reentrant": False, **kwargs})
    except Exception as error:  # a keyword that it lacks, a value that it refuses
        yield f"`gradient_checkpointing_kwargs` cannot be used: {first_line(error)}"


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
    except Exception as error:  # whatever an optimizer's library raises
        # Some choose their parameters from the model, which comes later.
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
    except Exception as error:  # a keyword that it lacks, a value that it refuses
        name = arguments.lr_scheduler_type.value
        yield f"`lr_scheduler_type` {name!r} cannot be used with these fields: {first_line(error)}"
