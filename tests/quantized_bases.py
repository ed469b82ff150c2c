"""Quantized forms of a saved model, one function a library; needs nothing of tlora."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn


def load(folder: str, form: str, **fields: Any) -> Any:
    """Load a model in one of `FORMS`, in eval mode."""
    return FORMS[form](folder, **fields).eval()


def full(folder: str, **fields: Any) -> Any:
    """As it was saved."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **fields)


def nf4(folder: str, *, double: bool = True, storage: Any = None, **fields: Any) -> Any:
    """bitsandbytes 4-bit, scales quantized too (QLoRA)."""
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_quant_storage=storage,
    )
    return full(folder, quantization_config=quantization, **fields)


def nf4_plain(folder: str, **fields: Any) -> Any:
    """bitsandbytes 4-bit with float scales."""
    return nf4(folder, double=False, **fields)


def nf4_in_floats(folder: str, **fields: Any) -> Any:
    """bitsandbytes 4-bit whose bits are called floats, as FSDP wants them (QLoRA with FSDP)."""
    return nf4(folder, storage=torch.bfloat16, **fields)


def int8(folder: str, **fields: Any) -> Any:
    """bitsandbytes 8-bit."""
    quantization = transformers.BitsAndBytesConfig(load_in_8bit=True)
    return full(folder, quantization_config=quantization, **fields)


def torchao(folder: str, **fields: Any) -> Any:
    """torchao int8, weights alone."""
    from torchao.quantization import Int8WeightOnlyConfig

    quantization = transformers.TorchAoConfig(quant_type=Int8WeightOnlyConfig())
    return full(folder, quantization_config=quantization, **fields)


def hqq(folder: str, **fields: Any) -> Any:
    """HQQ 4-bit, put in by hand: transformers 5 does not load it."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = full(folder, **fields)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            config = BaseQuantizeConfig(nbits=4, group_size=64)
            dtype = module.weight.dtype
            layer = HQQLinear(module, config, compute_dtype=dtype, device="cpu")
            model.set_submodule(name, layer)
    return model


FORMS = {
    "nf4": nf4,
    "nf4-plain": nf4_plain,
    "nf4-in-floats": nf4_in_floats,
    "int8": int8,
    "torchao": torchao,
    "hqq": hqq,
}


def stored(model: nn.Module) -> dict[str, Tensor]:
    """Copy every tensor that a model keeps, scales of quantized weights included."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        for key, value in [*module._parameters.items(), *module._buffers.items()]:
            if value is not None:
                _take(f"{name}.{key}", value, found)
        for key in ("state", "meta"):
            _take(f"{name}.{key}", getattr(module, key, None), found)
    return found


def _take(name: str, value: Any, found: dict[str, Tensor]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _take(f"{name}.{key}", inner, found)
    elif type(value).__module__.startswith("torchao"):
        _take(f"{name}.qdata", value.qdata, found)
        _take(f"{name}.scale", value.scale, found)
    elif isinstance(value, Tensor):
        found[name] = value.detach().data.clone()
        # 8-bit scales move from the parameter to the layer's state at the first call.
        for key in ("quant_state", "SCB"):
            _take(name.rpartition(".")[0] + f".{key}", getattr(value, key, None), found)
    elif type(value).__name__ == "QuantState":
        for key in ("absmax", "code", "offset", "state2"):
            _take(f"{name}.{key}", getattr(value, key, None), found)
    elif type(value).__name__ == "MatmulLtState":
        _take(name.rpartition(".")[0] + ".SCB", value.SCB, found)


def same_bits(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    """Whether both hold the same tensors, bit for bit."""
    return before.keys() == after.keys() and all(
        value.dtype == after[name].dtype and torch.equal(_bytes(value), _bytes(after[name]))
        for name, value in before.items()
    )


def _bytes(value: Tensor) -> Tensor:
    """Packed bits that are called floats may look like NaN, which equals nothing."""
    return value.reshape(-1).view(torch.uint8)
