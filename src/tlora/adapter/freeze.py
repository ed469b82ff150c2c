"""Keeping A frozen through everything that PEFT and the trainers do to an adapter.

``requires_grad_(False)`` alone is undone by ``disable_adapter()`` and ``set_adapter()``. PEFT's
own ``frozen_peft_weight_names``, a dict on each layer that these calls consult, is not; it is
lost only when an adapter is loaded anew, which `tlora.load_adapter` makes good.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import TrainerCallback

from tlora.calibration.placement import local_part
from tlora.errors import AdapterError


def lora_layers(model: nn.Module, adapter_name: str = "default") -> Iterator[tuple[str, LoraLayer]]:
    """Yield the name and layer of each module that carries the adapter."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A:
            yield name, module


def freeze_a(model: nn.Module, adapter_name: str = "default") -> None:
    """Freeze the A matrices of an adapter, so that PEFT's own switches keep them frozen."""
    for _, layer in lora_layers(model, adapter_name):
        # A copy: the attribute is a dict on the class until a layer has its own.
        names = dict(layer.frozen_peft_weight_names)
        names[adapter_name] = tuple({*names.get(adapter_name, ()), "lora_A"})
        layer.frozen_peft_weight_names = names
        layer.lora_A[adapter_name].weight.requires_grad_(False)


def match_dtypes(model: nn.Module, adapter_name: str = "default") -> None:
    """Give each A the dtype of its B.

    Trainers cast what trains (TRL's QLoRA path: to bfloat16) and leave a frozen A behind in
    float32, on which the forward pass then fails outside autocast.
    """
    for _, layer in lora_layers(model, adapter_name):
        a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        if a.dtype != b.dtype:
            a.data = a.data.to(b.dtype)


def fingerprint(tensor: Tensor) -> int:
    """Return a sum over the bits of a tensor (of this rank's part): equal for equal bits."""
    tensor = local_part(tensor)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    words = tensor.detach().contiguous().view(bits).flatten().to(torch.int64)
    # Weighted by position, so that swapped entries are seen; int64 wraps around, which is fine.
    places = torch.arange(1, len(words) + 1, device=words.device)
    return int((words * places).sum())


class FrozenACallback(TrainerCallback):
    """Checks that A did not move between the start of training and each checkpoint.

    Raises:
        AdapterError: some A requires a gradient when training starts, or has changed since.
    """

    def __init__(self, adapter_name: str = "default") -> None:
        self.adapter_name = adapter_name
        self._expected: dict[str, int] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the bits of every A, after giving it the dtype of its B.

        Raises:
            AdapterError: some A requires a gradient.
        """
        model = kwargs["model"]
        match_dtypes(model, self.adapter_name)
        for name, layer in lora_layers(model, self.adapter_name):
            weight = layer.lora_A[self.adapter_name].weight
            if weight.requires_grad:
                raise AdapterError(
                    f"{name}: A requires a gradient although the plan freezes it; attach with"
                    " `tlora.attach` or load with `tlora.load_adapter`."
                )
            self._expected[name] = fingerprint(weight)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare."""
        self._compare(kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare."""
        self._compare(kwargs["model"])

    def _compare(self, model: nn.Module) -> None:
        for name, layer in lora_layers(model, self.adapter_name):
            now = fingerprint(layer.lora_A[self.adapter_name].weight)
            if now != self._expected.get(name, now):
                raise AdapterError(
                    f"{name}: A changed while training although it is frozen; some code writes"
                    " into adapter weights: look at the callbacks and the optimizer."
                )
