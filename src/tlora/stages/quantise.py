"""`--quantization`: loading a model quantised by bitsandbytes, and resuming on it exactly.

Nothing else of QLoRA's preparation is needed here. PEFT freezes the base, TRL lets the inputs
require a gradient where it recomputes activations and casts B to bfloat16 (the callback casts A
with it). peft.prepare_model_for_kbit_training would also copy norms, embeddings and head to
float32, which TRL no longer does; load in --dtype float32 to have them so.

Source: Dettmers et al., arXiv 2305.14314 (nf4, scales quantised too) and 2208.07339 (int8).
"""

from __future__ import annotations

import importlib.util
from typing import Any

from tlora.errors import ConfigError
from tlora.runconfig import RunConfig
from tlora.stages.arguments import first_line


def loading_options(config: RunConfig, device: Any) -> dict[str, Any]:
    """Return the keyword arguments of `from_pretrained` for the run's `quantization`.

    Args:
        config: the run; its `dtype` is what a 4-bit layer computes in.
        device: where the model is to be; quantised weights are made there.

    Raises:
        ConfigError: bitsandbytes is not installed, the model has no config that can be read, or
            the checkpoint is quantised already.
    """
    if config.quantization == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{config.quantization!r} needs bitsandbytes, which is not installed:"
            ' pip install "tlora[quantized]".',
            where="quantization",
        )
    import transformers

    try:
        found = transformers.AutoConfig.from_pretrained(
            config.model, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{config.model!r} cannot be loaded: {first_line(error)}", "model"
        ) from error
    if getattr(found, "quantization_config", None):
        raise ConfigError(
            f"{config.model!r} is quantised already; leave `quantization` out.",
            where="quantization",
        )
    dtype = config.dtype if config.dtype != "auto" else found.dtype or "float32"
    fields: dict[str, dict[str, Any]] = {
        "nf4": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        },
        "int8": {"load_in_8bit": True},
    }
    quantisation = transformers.BitsAndBytesConfig(**fields[config.quantization])
    return {"quantization_config": quantisation, "device_map": {"": str(device)}}


def keep_dtypes(trainer: Any) -> None:
    """Let a trainer that resumes load its checkpoint into the adapter's dtypes, as they are.

    On a quantised base TRL trains B in bfloat16, but PEFT widens what it loads to float32, and
    the run would go on in another precision than it began. No callback comes between that and the
    optimizer, hence the trainer's own method.
    """
    load = trainer._load_from_checkpoint

    def loaded(*args: Any, **kwargs: Any) -> None:
        before = {name: value.dtype for name, value in trainer.model.named_parameters()}
        load(*args, **kwargs)
        for name, value in trainer.model.named_parameters():
            if value.dtype != before[name]:
                value.data = value.data.to(before[name])

    trainer._load_from_checkpoint = loaded
