"""The plan of an adapter: rank, scale and frozen subspace of every module. Pure data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tlora.checks import from_row
from tlora.config import TLoraConfig
from tlora.errors import ArtifactError, damaged
from tlora.files import file_at, read_tensors, write_tensors

_KIND = "plan"

_FORMAT = 1

_FILE = "plan.safetensors"


@dataclass
class ModulePlan:
    """The adapter of one module: y = W x + scale * B (lora_A x), B starting at zero.

    For a parameter that holds the matrices of E experts: y = W_e x + scale * B_e (A_e x) with
    A_e the rows e r_i to (e + 1) r_i of lora_A.

    Attributes:
        name: the module's (or parameter's) full name in the base model.
        d_in: d, columns of the weight.
        d_out: m, rows of the weight and of B.
        rank: r_i; 0 skips the module.
        scale: s_i.
        lora_A: E r_i x d float32; orthonormal rows (of each expert) unless whitened or random.
        captured_energy: share of ||M||_F^2 (of all experts together) in the row space of lora_A,
            with M = W C or the matrix of another basis (docs/method.md, 9); None for a random basis
            without a measured second moment.
        sensitivity: S_i by the configuration's rule; None if it was not measured.
        solver: how the subspace was computed: "exact", "randomized", "streamed", "random", or
            "none" at rank 0.
        experts: E; 1 for a module.
        total_energy: ||M||_F^2, the total that captured_energy is a share of.
    """

    name: str
    d_in: int
    d_out: int
    rank: int
    scale: float
    lora_A: Tensor = field(repr=False)
    captured_energy: float | None
    sensitivity: float | None
    solver: str
    experts: int = 1
    total_energy: float | None = None

    def parameters(self, freeze_a: bool) -> int:
        """Return the number of trainable parameters: E m r_i, plus E d r_i unless A is frozen."""
        return self.experts * self.rank * (self.d_out + (0 if freeze_a else self.d_in))


def _sizes(modules: Sequence[ModulePlan]) -> str:
    ranks, scales = [m.rank for m in modules], [m.scale for m in modules]
    scale = f"scales {min(scales):.3g} to {max(scales):.3g}"
    if same := min(scales) == max(scales):
        scale = f"scale {scales[0]:.3g}"
    if min(ranks) < max(ranks):
        mean = sum(ranks) / len(ranks)
        return f"ranks {min(ranks)} to {max(ranks)} (mean {round(mean, 1):g}), {scale}"
    return f"each with rank {ranks[0]} and {scale}" if same else f"rank {ranks[0]}, {scale}"


@dataclass
class AdapterPlan:
    """Input of `attach`: one `ModulePlan` per targeted module, in model order, and the config."""

    modules: dict[str, ModulePlan]
    config: TLoraConfig
    info: dict[str, Any] = field(default_factory=dict)
    """Origin of the plan (model class, calibration samples). Plain JSON values."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    @property
    def trainable_parameters(self) -> int:
        """Trainable parameters of the adapter: sum_i m_i r_i, plus sum_i d_i r_i if A trains."""
        return sum(m.parameters(self.config.freeze_a) for m in self.modules.values())

    @property
    def mean_energy(self) -> float | None:
        """Mean of the modules' captured energy; None if it is not known."""
        known = [m.captured_energy for m in self.modules.values() if m.captured_energy is not None]
        return sum(known) / len(known) if known else None

    def summary(self) -> str:
        """Return a few lines of text: modules, ranks, scales, parameters, captured energy."""
        modules = list(self.modules.values())
        energies = [m.captured_energy for m in modules if m.captured_energy is not None]
        uniform = self.config.r * sum(m.experts * (m.d_out + m.d_in) for m in modules)
        lines = [
            f"{len(modules)} modules, {_sizes(modules)}",
            f"{self.trainable_parameters:,} trainable parameters"
            f" ({self.trainable_parameters / uniform:.0%} of LoRA's {uniform:,})",
        ]
        if (mean := self.mean_energy) is not None:
            lines.append(
                f"captured energy: mean {mean:.3f}, lowest {min(energies):.3f},"
                f" highest {max(energies):.3f}"
            )
        return "\n".join(lines)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file (the A matrices, and a JSON header); return its path.

        Args:
            path: the file, or an existing folder that gets ``plan.safetensors``.
        """
        path = file_at(path, _FILE)
        rows = [
            {name: value for name, value in vars(module).items() if name != "lora_A"}
            for module in self.modules.values()
        ]
        header = {"kind": _KIND, "format": _FORMAT, "config": self.config.to_dict()}
        tensors = {name: module.lora_A for name, module in self.modules.items()}
        write_tensors(path, tensors, header | {"modules": rows, "info": self.info})
        return path

    @classmethod
    def load(cls, path: str | Path) -> AdapterPlan:
        """Read a file written by `save`, restoring the exact bits.

        Raises:
            ArtifactError: the file is missing, damaged or of another kind.
        """
        path = file_at(path, _FILE)
        tensors, header = read_tensors(path, _KIND, _FORMAT)
        with damaged(path):
            rows = [(row["name"], row) for row in header["modules"]]
            modules = {name: from_row(ModulePlan, row, lora_A=tensors[name]) for name, row in rows}
            config, info = TLoraConfig.from_dict(header["config"]), dict(header["info"])
        for name, module in modules.items():
            if module.lora_A.shape != (module.experts * module.rank, module.d_in):
                shape = " x ".join(map(str, module.lora_A.shape))
                raise ArtifactError(f"{path}: damaged (A of {name} is {shape}); make it again.")
        if not modules:
            raise ArtifactError(f"{path}: damaged (it contains no modules); make it again.")
        return cls(modules, config, info)
