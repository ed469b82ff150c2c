"""Adapters on an offloaded base, whose weights accelerate loads call by call.

PEFT makes an adapter where the base weight is; an offloaded weight is on `meta`, and so the
adapter would be without values too. Here the adapter gets room on the device that the module runs
on, and stays there: it is small, and it trains.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from tlora.adapter.freeze import lora_layers
from tlora.calibration.offload import device_of, loaded_by
from tlora.calibration.targets import heads_of
from tlora.config import TLoraConfig
from tlora.errors import AdapterError

if TYPE_CHECKING:
    from peft import PeftModel


def refuse_offloaded_training(
    model: nn.Module, config: TLoraConfig, targets: Iterable[str]
) -> None:
    """Refuse to train what is dropped after each call: an offloaded head or bias.

    Raises:
        AdapterError: parameters of the base would train, but are offloaded.
    """
    offloaded = loaded_by(model)
    if not offloaded:
        return
    heads = tuple(f".{name}." for name in heads_of(config))
    wrapped = tuple(f"{name}." for name in targets)
    biases = {"none": (), "all": ("",), "lora_only": wrapped}[config.bias]
    wrong = [
        name
        for name in sorted(offloaded)
        if any(head in f".{name}" for head in heads)
        or (name.endswith(".bias") and name.startswith(biases))
    ]
    if wrong:
        more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
        raise AdapterError(
            f"{wrong[0]}{more} would train in full but is offloaded, and what is offloaded is only"
            " read; keep it on a device by the `device_map`, or attach the saved plan to a model"
            " that is loaded whole."
        )


def make_room(adapted: PeftModel, adapter_name: str) -> None:
    """Give matrices of an adapter on `meta` room, without values yet, where their module runs."""
    for _, layer in lora_layers(adapted, adapter_name):
        for matrix in (layer.lora_A[adapter_name], layer.lora_B[adapter_name]):
            if matrix.weight.is_meta:
                matrix.to_empty(device=device_of(layer.get_base_layer()))


def load_onto_offloaded(
    model: nn.Module, path: str | Path, *, is_trainable: bool, adapter_name: str
) -> PeftModel:
    """Load a saved adapter onto an offloaded base, which stays as it is.

    PEFT's own loading would take the base's hooks away and spread it anew over the devices that
    this machine has, adapter included.
    """
    from peft import PeftConfig, get_peft_model
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(path))
    config.inference_mode = not is_trainable
    adapted = get_peft_model(model, config, adapter_name=adapter_name)
    make_room(adapted, adapter_name)
    weights = load_peft_weights(str(path), device="cpu")
    set_peft_model_state_dict(adapted, weights, adapter_name=adapter_name)
    return adapted
