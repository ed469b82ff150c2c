"""Adapters that start as a part of the base weight: W' = W - s B_0 A_0, y = W' x + s B A x.

During training, the base holds the residual W'. The saved adapter is a plain one for the original
W, since W' + s B A = W + s (B A - B_0 A_0) = W + s [B, -B_0] [A; A_0]: twice the rank, the same
scale. PEFT does the same conversion for `path_initial_model_for_weight_conversion` (but drops heads
in `modules_to_save`, which are kept here).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tlora.adapter.stock import patterns, refuse_taken, save_adapter, wrap_exactly
from tlora.calibration.weights import Target, dense_weight, holds_floats
from tlora.errors import AdapterError, ConfigError, damaged
from tlora.files import file_at, read_tensors, write_tensors
from tlora.linalg.matrices import full_precision

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

_KIND = "initial adapter"
_FILE = "initial.safetensors"


@dataclass
class InitialAdapter:
    """A_0 (r x d) and B_0 (m x r) of every module by its full name, from before training.

    A run saves it, so that a resumed run starts from the same residual.
    """

    modules: dict[str, tuple[Tensor, Tensor]]

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, atomically; return its path.

        Args:
            path: the file, or an existing folder that gets ``initial.safetensors``.
        """
        path = file_at(path, _FILE)
        tensors = {f"{name}.A": a for name, (a, _) in self.modules.items()}
        tensors |= {f"{name}.B": b for name, (_, b) in self.modules.items()}
        write_tensors(path, tensors, {"kind": _KIND, "modules": list(self.modules)})
        return path

    @classmethod
    def load(cls, path: str | Path) -> InitialAdapter:
        """Read a file written by `save`.

        Raises:
            ArtifactError: the file is missing, damaged or of another kind.
        """
        path = file_at(path, _FILE)
        tensors, header = read_tensors(path, _KIND)
        with damaged(path):
            return cls({n: (tensors[f"{n}.A"], tensors[f"{n}.B"]) for n in header["modules"]})


def refuse_unfit(model: nn.Module, targets: Sequence[Target], rank: int) -> None:
    """Check that ``rank`` components can be taken out of every target's weight.

    Raises:
        ConfigError: the rank exceeds a matrix, or a weight is quantized (the residual would be
            rounded again), shared with another module (which would change too), or named like
            experts in PEFT.
    """
    refuse_taken(model, [target.name for target in targets])
    shared = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    faults = []
    for target in targets:
        if fault := too_large(target, rank):
            faults.append(fault)
        elif not holds_floats(target.module):
            faults.append(
                f"{target.name} is quantized, and this method subtracts its "
                "initialization from the weight, which would be rounded again; load the "
                "model unquantized."
            )
        elif shared[id(target.module.weight)] > 1:
            faults.append(
                f"{target.name} shares its weight with another module, which would change "
                "with it; exclude it by `exclude_modules`."
            )
    if faults:
        more = [f"and {len(faults) - 5} more modules."] if faults[5:] else []
        raise ConfigError([*faults[:5], *more], where="adapter")


def too_large(target: Target, rank: int) -> str | None:
    """Return the fault of a matrix with fewer singular components than a method needs."""
    if rank <= min(target.d_in, target.d_out):
        return None
    return (
        f"`r` is too large for {target.name}, which is {target.d_out} x {target.d_in}; {rank} of"
        " its components are needed: lower `r`, or exclude the module."
    )


def refuse_ranks(targets: Sequence[Target], rank: int) -> None:
    """Check that every target's matrix has ``rank`` singular components.

    Raises:
        ConfigError: a matrix has fewer.
    """
    if faults := [fault for target in targets if (fault := too_large(target, rank))]:
        raise ConfigError(faults[0], where="adapter")


def random_start(target: Target, rank: int) -> tuple[Tensor, Tensor]:
    """Return LoRA's own A_0 and B_0 of a module: A_0 drawn from torch's global generator, B_0 zero.

    Args:
        target: the module.
        rank: r, limited to the rank of the matrix.
    """
    rank = min(rank, target.d_in, target.d_out)
    return random_a(rank, target.d_in), torch.zeros(target.d_out, rank)


def random_a(rank: int, width: int) -> Tensor:
    """Return an A, ``rank`` x ``width``, drawn from torch's global generator as PEFT does."""
    return nn.init.kaiming_uniform_(torch.empty(rank, width), a=5**0.5)


def attach_initial(
    model: nn.Module,
    targets: Sequence[Target],
    config: LoraConfig,
    initial: InitialAdapter,
    scale: float | None = None,
) -> PeftModel:
    """Wrap ``model``, and give each module its rank, A and B.

    Args:
        model: the base model, changed in place.
        targets: its modules.
        config: with PEFT's default initialization; it gets the ranks that differ from its `r`.
        initial: A and B of every target.
        scale: s of every module, whatever its rank; None: computed from ``config`` and the rank.

    Raises:
        AdapterError: ``initial`` was made for other modules.
    """
    if (names := {target.name for target in targets}) != initial.modules.keys():
        odd = ", ".join(sorted(names ^ initial.modules.keys())[:5])
        raise AdapterError(
            f"the initial adapter does not match this model: {odd}; start a new run."
        )
    ranks = {n: len(a) for n, (a, _) in initial.modules.items() if len(a) != config.r}
    alphas = {} if scale is None else {name: scale * rank for name, rank in ranks.items()}
    for field, pattern in patterns(ranks, alphas).items():
        setattr(config, field, pattern)
    adapted = wrap_exactly(model, targets, config)
    with torch.no_grad():
        for name, (a, b) in initial.modules.items():
            layer: Any = adapted.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
    return adapted


@full_precision
def attach_residual(
    model: nn.Module, targets: Sequence[Target], config: LoraConfig, initial: InitialAdapter
) -> PeftModel:
    """Wrap ``model``, set A_0 and B_0, and store W - s B_0 A_0 in the base.

    Computed in float32, regardless of autocast and TF32, and rounded to the dtype of the weight.

    Args:
        model: the base model, changed in place.
        targets: its modules.
        config: r, lora_alpha and the other fields, with PEFT's default initialization.
        initial: from before training.

    Raises:
        AdapterError: ``initial`` was made for other modules.
    """
    adapted = attach_initial(model, targets, config, initial)
    with torch.no_grad():
        for name, (a, b) in initial.modules.items():
            layer: Any = adapted.base_model.model.get_submodule(name)
            base = layer.get_base_layer()
            first = [each.to(base.weight.device, torch.float32) for each in (b, a)]
            part = layer.scaling["default"] * (first[0] @ first[1])
            part = part.T if isinstance(base, Conv1D) else part
            base.weight.copy_(base.weight.to(torch.float32) - part)
    return adapted


def save_converted(model: PeftModel, initial: InitialAdapter, folder: Path) -> None:
    """Write the trained adapter as one of twice the rank that fits the original base weights."""
    state = model.state_dict()
    for name, (a, b) in initial.modules.items():
        stem = f"base_model.model.{name}"
        for part, first, dim, sign in (("lora_A", a, 0, 1), ("lora_B", b, 1, -1)):
            key = f"{stem}.{part}.default.weight"
            state[key] = torch.cat([state[key], sign * first.to(state[key])], dim=dim)
    save_larger(model, 2, state, folder)


def save_larger(model: PeftModel, times: int, state: dict[str, Tensor], folder: Path) -> None:
    """Write ``state``, whose A and B have ``times`` the rank of the model's, at the same scale."""
    before = model.peft_config["default"]
    larger = copy.deepcopy(before)
    larger.r = times * before.r
    larger.lora_alpha = before.lora_alpha * (times**0.5 if before.use_rslora else times)
    model.peft_config["default"] = larger
    try:
        save_adapter(model, folder, state)
    finally:
        model.peft_config["default"] = before


@full_precision
def start_by_peft(target: Target, config: LoraConfig, **fields: Any) -> tuple[Tensor, Tensor]:
    """Return the A_0 and B_0 of PEFT's own initialization; the module does not change.

    PEFT initializes a float32 copy, which is then dropped with its residual.

    Args:
        target: the module.
        config: its `init_lora_weights` names the initialization.
        fields: attributes that PEFT's preprocessing would have set on the module.
    """
    from peft.tuners.lora import Linear

    scratch = linear_copy(target)
    vars(scratch).update(fields)
    layer = Linear(scratch, "default", config=config, r=config.r, lora_alpha=config.lora_alpha)
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def linear_copy(target: Target) -> nn.Linear:
    """Return a plain float32 Linear (no bias) with a copy of a target's weight."""
    weight = dense_weight(target)
    scratch = nn.Linear(target.d_in, target.d_out, bias=False, device="meta")
    scratch.weight = nn.Parameter(weight.clone().contiguous())
    return scratch


@full_precision
def start_by_corda(target: Target, options: Any, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return A_0 and B_0 that PEFT's CorDA gives a module.

    Args:
        target: the module; it does not change.
        options: with `r`, `lora_alpha` and `corda_method`.
        covariance: C, d x d.
    """
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import collect_eigens, crop_corda_eigens

    config = LoraConfig(
        r=options.r,
        lora_alpha=options.lora_alpha,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=options.corda_method),
        target_modules=["scratch"],
    )
    scratch: Any = linear_copy(target)
    # Attributes that `preprocess_corda` sets on a module before decomposing it.
    scratch.covariance_matrix = covariance.to(scratch.weight.device)
    scratch.corda_method, scratch.rank = options.corda_method, options.r
    box = nn.ModuleDict({"scratch": scratch})
    collect_eigens(box, config, verbose=False)
    crop_corda_eigens(box, config)
    return start_by_peft(target, config, eigens=scratch.eigens)
