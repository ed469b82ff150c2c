"""Bottleneck adapters behind modules, inside PEFT's own LoRA layers.

A variant of the layer computes y + U gelu(D y + b) + c of the module's own output y. D, b and U, c
stand in the places of `lora_A` and `lora_B`, so that freezing, disabling and checkpoints stay
PEFT's. No weight of the module does the same, so it merges into none, and PEFT has no name for it:
the folder's `peft_type` is ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from tlora.adapter.freeze import lora_layers
from tlora.adapter.savedconfig import CONFIG, WEIGHTS
from tlora.errors import AdapterError, damaged, listed
from tlora.files import write_json
from tlora.sealed import adapter_fields

if TYPE_CHECKING:
    from peft import PeftModel

PEFT_TYPE = "BOTTLENECK"
_SPREAD = 1e-3


class Affine(nn.Module):
    """D y + b; b starts at zero, D normal of deviation 1e-3, cut off at two deviations."""

    def __init__(self, outputs: int, inputs: int, like: Tensor) -> None:
        """Make D, ``outputs`` x ``inputs``, of the dtype and on the device of ``like``."""
        super().__init__()
        self.weight = nn.Parameter(like.new_empty(outputs, inputs))
        # 1 x outputs: PEFT takes a matrix of fewer dimensions for a shard that was not gathered.
        self.shift = nn.Parameter(like.new_zeros(1, outputs))
        nn.init.trunc_normal_(self.weight, std=_SPREAD, a=-2 * _SPREAD, b=2 * _SPREAD)

    def forward(self, y: Tensor) -> Tensor:
        """Return D y + b."""
        return nn.functional.linear(y, self.weight, self.shift[0])


class Behind(LoraVariant):
    """What PEFT's layer calls in the place of W x + s B A x; it is not merged."""

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Refuse to merge.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a bottleneck adapter is not linear, so no weight holds it.")

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Return y + U gelu(D y + b) + c; y is ``result``, what the module gave."""
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        given = module.lora_dropout[active_adapter](result.to(down.weight.dtype))
        change: Tensor = up(nn.functional.gelu(down(given), approximate="tanh"))
        return result + change.to(result.dtype)


def make_bottlenecks(model: PeftModel, rank: int) -> None:
    """Turn a model freshly wrapped by PEFT's LoRA into one of bottleneck adapters.

    Args:
        model: the model.
        rank: r, numbers in the bottleneck.
    """
    for _, layer in lora_layers(model):
        like = layer.lora_B["default"].weight.detach()
        layer.lora_A["default"] = Affine(rank, len(like), like)
        layer.lora_B["default"] = Affine(len(like), rank, like)
        layer.lora_variant["default"] = Behind()


def save(model: PeftModel, folder: Path) -> None:
    """Write the folder: the tensors as PEFT names them, and a configuration of our type."""
    # Rows that train are saved as such; PEFT would add all others of a longer embedding.
    model.save_pretrained(folder, save_embedding_layers=False)
    write_json(folder / CONFIG, adapter_fields(folder / CONFIG) | {"peft_type": PEFT_TYPE})


def load(
    model: nn.Module, folder: Path, fields: Mapping[str, Any], is_trainable: bool
) -> PeftModel:
    """Load a folder that `save` wrote onto its base.

    Args:
        model: the base model.
        folder: the adapter's.
        fields: of its adapter_config.json.
        is_trainable: whether to train it further.

    Raises:
        AdapterError: its tensors are not those of the model's modules.
        ArtifactError: a file is damaged.
    """
    from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    from tlora.adapter.stock import wrap

    known = {each.name for each in dataclasses.fields(LoraConfig) if each.init}
    with damaged(folder / CONFIG, "save or copy the adapter again"):
        own = {name: value for name, value in fields.items() if name in known - {"peft_type"}}
        config = LoraConfig(**own | {"inference_mode": not is_trainable})
    with damaged(folder / WEIGHTS, "save or copy the adapter again"):
        tensors = load_file(folder / WEIGHTS)
    adapted = wrap(model, config)
    make_bottlenecks(adapted, config.r)
    made = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    wanted, found = (
        {name: value.shape for name, value in some.items()} for some in (made, tensors)
    )
    if differing := [n for n in wanted | found if wanted.get(n) != found.get(n)]:
        raise AdapterError(
            f"{folder} is not an adapter of this {type(model).__name__}: they differ in"
            f" {listed(differing)}; load it onto its own base."
        )
    set_peft_model_state_dict(adapted, tensors)
    if not is_trainable:
        adapted.requires_grad_(False)
    return adapted
