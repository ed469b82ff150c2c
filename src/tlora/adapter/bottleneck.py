"""Bottleneck adapters behind modules, inside PEFT's own LoRA layers.

A variant of the layer computes y + U gelu(D y + b) + c from the module's own output y. D, b and U,
c replace `lora_A` and `lora_B`, so PEFT still handles freezing, disabling and checkpoints. No
weight can represent this map, so it cannot be merged, and PEFT has no name for it: the folder's
`peft_type` is ours.
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
    """D y + b; b starts at zero, D normal with deviation 1e-3, truncated at two deviations."""

    def __init__(self, outputs: int, inputs: int, like: Tensor) -> None:
        """Make D, ``outputs`` x ``inputs``, of the dtype and on the device of ``like``."""
        super().__init__()
        self.weight = nn.Parameter(like.new_empty(outputs, inputs))
        # 1 x outputs: PEFT mistakes a matrix of fewer dimensions for a shard that was not gathered.
        self.shift = nn.Parameter(like.new_zeros(1, outputs))
        nn.init.trunc_normal_(self.weight, std=_SPREAD, a=-2 * _SPREAD, b=2 * _SPREAD)

    def forward(self, y: Tensor) -> Tensor:
        """Return D y + b."""
        return nn.functional.linear(y, self.weight, self.shift[0])


class Behind(LoraVariant):
    """PEFT's layer calls this instead of W x + s B A x; it cannot be merged."""

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Refuse to merge.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "a bottleneck adapter is not linear, so it cannot be merged into a "
            "weight; keep it as an adapter."
        )

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Return y + U gelu(D y + b) + c; y is ``result``, the module's output."""
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        given = module.lora_dropout[active_adapter](result.to(down.weight.dtype))
        change: Tensor = up(nn.functional.gelu(down(given), approximate="tanh"))
        return result + change.to(result.dtype)


def make_bottlenecks(model: PeftModel, rank: int) -> None:
    """Turn LoRA layers freshly wrapped by PEFT into bottleneck adapters.

    Args:
        model: the model.
        rank: r, the width of the bottleneck.
    """
    for _, layer in lora_layers(model):
        like = layer.lora_B["default"].weight.detach()
        layer.lora_A["default"] = Affine(rank, len(like), like)
        layer.lora_B["default"] = Affine(len(like), rank, like)
        layer.lora_variant["default"] = Behind()


def save(model: PeftModel, folder: Path) -> None:
    """Write the folder: the tensors under PEFT's names, and a configuration of our type."""
    # Trained rows are saved as rows; PEFT would also save the rest of a resized embedding.
    model.save_pretrained(folder, save_embedding_layers=False)
    write_json(folder / CONFIG, adapter_fields(folder / CONFIG) | {"peft_type": PEFT_TYPE})


def load(
    model: nn.Module, folder: Path, fields: Mapping[str, Any], is_trainable: bool
) -> PeftModel:
    """Load a folder written by `save` onto its base model.

    Args:
        model: the base model.
        folder: the adapter's.
        fields: fields of its adapter_config.json.
        is_trainable: whether to train it further.

    Raises:
        AdapterError: its tensors do not match the model's modules.
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
            f"{folder} is not an adapter of this {type(model).__name__}: they differ "
            f"in {listed(differing)}; load it onto its own base model."
        )
    set_peft_model_state_dict(adapted, tensors)
    if not is_trainable:
        adapted.requires_grad_(False)
    return adapted
