"""Keeps A frozen through everything that PEFT and trainers do to an adapter.

``disable_adapter()`` and ``set_adapter()`` undo ``requires_grad_(False)``. They respect PEFT's own
``frozen_peft_weight_names``, a dict on each layer. Some code bypasses PEFT: it switches parameters
by name, or casts trainable parameters (TRL casts B to bfloat16 on a quantized base). So a hook on
each adapted layer freezes A and gives it B's dtype before every call. Only loading the adapter
again loses all this: `tlora.load_adapter` restores it, and `freeze_a` does after another library
has loaded the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from transformers import TrainerCallback

from tlora.calibration.placement import is_zero3, local_part
from tlora.errors import AdapterError


def lora_layers(model: nn.Module, adapter_name: str = "default") -> Iterator[tuple[str, LoraLayer]]:
    """Yield the name and layer of each module that carries the adapter."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A:
            yield name, module


def freeze_a(model: nn.Module, adapter_name: str = "default") -> None:
    """Freeze the A matrices of an adapter permanently, in place.

    PEFT's switches, trainers and `peft.prepare_model_for_kbit_training` then leave A frozen, and A
    follows the dtype of B. Call it on an adapter that another library has loaded; `tlora.attach`
    and `tlora.load_adapter` already do.

    Args:
        model: has the adapter (`peft.PeftModel`, or a model with LoRA layers of PEFT).
        adapter_name: PEFT's name of the adapter.

    Raises:
        AdapterError: no LoRA layer of ``model`` has an adapter of this name.
    """
    layers = [layer for _, layer in lora_layers(model, adapter_name)]
    if not layers:
        raise AdapterError(
            f"{type(model).__name__} has no LoRA layer with an adapter "
            f"{adapter_name!r}; load the adapter first, by "
            "`peft.PeftModel.from_pretrained`."
        )
    for layer in layers:
        # A copy: the attribute is a class-level dict until a layer has its own.
        names = dict(layer.frozen_peft_weight_names)
        names[adapter_name] = tuple({*names.get(adapter_name, ()), "lora_A"})
        layer.frozen_peft_weight_names = names
        layer.lora_A[adapter_name].weight.requires_grad_(False)
        if _keep_a not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_keep_a)
    trains = any(p.requires_grad for layer in layers for p in layer.lora_B.parameters())
    if trains and _check_that_it_trains not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_check_that_it_trains, with_kwargs=True)


def complete_heads(model: nn.Module) -> None:
    """Give heads with trained rows the `bias` that TRL reads; PEFT's wrapper (0.21) has none."""
    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper) and not hasattr(module, "bias"):
            module.bias = None


def _keep_a(layer: Any, _: Any) -> None:
    """Before a layer runs, freeze A again and give it the dtype of B."""
    for name, frozen in layer.frozen_peft_weight_names.items():
        if "lora_A" not in frozen or name not in layer.lora_A:
            continue
        for a in layer.lora_A[name].parameters():
            if a.requires_grad and a.is_leaf:
                a.requires_grad_(False)
        _match_dtype(layer, name)


def _check_that_it_trains(model: nn.Module, _: Any, inputs: dict[str, Any]) -> None:
    """Before a step, refuse a model in training mode without trainable parameters.

    Raises:
        AdapterError: no parameter requires a gradient.
    """
    steps = model.training and torch.is_grad_enabled() and inputs.get("labels") is not None
    if steps and not any(parameter.requires_grad for parameter in model.parameters()):
        raise AdapterError(
            "no parameter trains: B was frozen after the adapter was attached, as by "
            "`peft.prepare_model_for_kbit_training`; call that on the base model "
            'before attaching, or call `model.set_adapter("default")` after it, '
            "which leaves A frozen, and make a new trainer."
        )


def match_dtypes(model: nn.Module, adapter_name: str = "default") -> None:
    """Give each A the dtype of its B.

    Trainers cast trainable parameters (TRL's QLoRA path: to bfloat16) and leave a frozen A in
    float32, so the forward pass fails outside autocast.
    """
    for _, layer in lora_layers(model, adapter_name):
        _match_dtype(layer, adapter_name)


def _match_dtype(layer: LoraLayer, name: str) -> None:
    b = next(layer.lora_B[name].parameters())
    for a in layer.lora_A[name].parameters():
        if a.dtype != b.dtype:
            a.data = a.data.to(b.dtype)


def fingerprint(tensor: Tensor) -> int:
    """Return a checksum over the bits of a tensor (of this rank's part)."""
    # ZeRO-3 keeps a rank's part even while the tensor is whole.
    held: Any = tensor
    tensor = held.ds_tensor if is_zero3(held) else local_part(held)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    words = tensor.detach().contiguous().view(bits).flatten().to(torch.int64)
    # Weighted by position, so that swapped entries change it; int64 wraps around, which is fine.
    places = torch.arange(1, len(words) + 1, device=words.device)
    return int((words * places).sum())


class FrozenACallback(TrainerCallback):
    """Checks that A does not change between the start of training and each checkpoint.

    Raises:
        AdapterError: an A requires a gradient when training starts, or has changed since.
    """

    def __init__(self, adapter_name: str = "default") -> None:
        self.adapter_name = adapter_name
        self._expected: dict[str, int] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the bits of every A, after giving it the dtype of its B.

        Raises:
            AdapterError: an A requires a gradient.
        """
        model = kwargs["model"]
        match_dtypes(model, self.adapter_name)
        for name, layer in lora_layers(model, self.adapter_name):
            weight = layer.lora_A[self.adapter_name].weight
            if weight.requires_grad:
                raise AdapterError(
                    f"{name}: A requires a gradient although the plan freezes it; attach with "
                    "`tlora.attach` or load with `tlora.load_adapter`."
                )
            self._expected[name] = fingerprint(weight)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check A before a checkpoint."""
        self._compare(kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check A at the end."""
        self._compare(kwargs["model"])

    def _compare(self, model: nn.Module) -> None:
        for name, layer in lora_layers(model, self.adapter_name):
            now = fingerprint(layer.lora_A[self.adapter_name].weight)
            if now != self._expected.get(name, now):
                raise AdapterError(
                    f"{name}: A changed during training although it is frozen; some code "
                    "writes to adapter weights: check the callbacks and the optimizer."
                )
