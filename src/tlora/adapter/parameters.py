"""What PEFT adapts as a parameter (`target_parameters`) and not as a module.

Fused parameters of experts; and on architectures whose dense layers have the names that experts had
before they were fused (DeepSeek: gate_proj, up_proj, down_proj) the weights of these layers, since
PEFT rewrites such names in `target_modules` to those of the fused parameters. A parameter's adapter
sits in a `ParamWrapper` around its module; wrappers of several parameters of a module are nested.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from tlora.calibration.targets import taken_for_experts


def parameter_keys(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Return the full name of the parameter, by planned name, of what PEFT adapts as one."""
    parameters = {name for name, _ in model.named_parameters()}
    keys = {name: name for name in names if name in parameters}
    taken = taken_for_experts(model, [name for name in names if name not in keys])
    return keys | {name: f"{name}.weight" for name in taken}


def adapter_layer(model: nn.Module, name: str, key: str | None) -> Any:
    """Return the LoRA layer of an adapted module, or of the parameter with the full name ``key``.

    Args:
        model: the base model, wrapped by PEFT.
        name: of the module.
        key: the parameter; None: the module itself is adapted.
    """
    if key is None:
        return model.get_submodule(name)
    owner, _, attribute = key.rpartition(".")
    layer: Any = model.get_submodule(owner)
    while layer.parameter_name != attribute:
        layer = layer.base_layer
    return layer
