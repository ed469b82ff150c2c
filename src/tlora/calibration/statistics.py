"""The result of calibration: the statistics of all modules, in a file, and their key.

The key identifies the inputs of a calibration. It is cheap compared to one forward pass, so every
calibration carries one. It detects honest mistakes (another checkpoint, another file of samples),
not forgery.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tlora.calibration.batches import Batch, as_batch
from tlora.calibration.placement import is_zero3, loaded_by
from tlora.checks import from_row
from tlora.config import SensitivityRule, TLoraConfig
from tlora.errors import CalibrationError, damaged
from tlora.files import file_at, read_tensors, write_tensors
from tlora.linalg.crossmoment import CrossMoment
from tlora.linalg.matrices import FactoredMatrix
from tlora.linalg.moments import SecondMoment

_KIND = "calibration"

_FORMAT = 6

_FILE = "calibration.safetensors"

# Optional statistics of a module: the property of `TLoraConfig` that requests each, and the message
# if it is missing.
_STATISTICS = {
    "sensitivity": (
        "needs_sensitivity",
        "no sensitivity was measured",
        "allocate_rank or allocate_scale on",
    ),
    "moment": ("needs_moments", "no second moment was kept", 'basis="weight-covariance"'),
    "fisher": ("needs_fisher", "no squared gradient was measured", 'sensitivity_rule="fisher"'),
    "gradient": ("needs_gradient", "no mean gradient was kept", 'basis="gradient"'),
    "gradient_moment": (
        "needs_gradient_moment",
        "no gradient-weighted second moment was kept",
        'basis="gradient-moment"',
    ),
}

_SAMPLED = 512  # entries of a parameter that enter the key

_NUMBERS = ("name", "d_in", "d_out", "samples", "sensitivity", "moment_id", "fisher")


@dataclass(frozen=True)
class Key:
    """The inputs of a calibration: `model_key`, and the `batch_digest` of each batch in order."""

    model: str
    data: list[str]


@dataclass
class ModuleStatistics:
    """Statistics of one module over the calibration samples.

    Attributes:
        name: the module's full name in the base model.
        d_in: d, input columns of the weight.
        d_out: m, rows of the weight.
        samples: n, calibration samples.
        sensitivity: S = (1/n) sum_s mean_jk |W_jk (dL_s/dW)_jk|, or None if no backward was run.
        moment: second moment of the inputs, shared with the modules that read the same tensor; or
            only W C while calibration and planning run together; None if the configuration needs
            none.
        moment_id: equal for modules that share ``moment``.
        fisher: (1/n) sum_s mean_jk (dL_s/dW)_jk^2, if the configuration needs it.
        gradient: G = (1/n) sum_s dL_s/dW, m x d float32, if the configuration needs it.
        gradient_moment: N = (1/n) sum_s sum_t ||delta_t||^2 x_t x_t^T with delta_t the gradient of
            L_s at the module's output and x_t its input, if the configuration needs it.
    """

    name: str
    d_in: int
    d_out: int
    samples: int
    sensitivity: float | None
    moment: SecondMoment | CrossMoment | None = None
    moment_id: int = -1
    fisher: float | None = None
    gradient: Tensor | None = None
    gradient_moment: SecondMoment | None = None

    @property
    def tokens(self) -> int:
        """Number of real tokens that the module saw; 0 if no moment was kept."""
        return 0 if self.moment is None else self.moment.tokens

    def measured(self, rule: SensitivityRule) -> float | None:
        """Return the sensitivity that ranks and scales follow; None if it was not measured."""
        return self.sensitivity if rule == "magnitude" else self.fisher

    def require(self, statistic: str) -> Any:
        """Return one of the statistics above by its name.

        Raises:
            CalibrationError: the calibration did not keep it.
        """
        value = getattr(self, statistic)
        if value is None:
            _, missing, fields = _STATISTICS[statistic]
            raise CalibrationError(
                f"{self.name}: {missing}, because the calibration's configuration does not need "
                f"it; calibrate again with {fields}."
            )
        return value

    def covariance(self) -> Tensor:
        """Return C = (1/n) sum_s (X_s - mean X_s)^T (X_s - mean X_s), d x d float32."""
        moment: SecondMoment = self.require("moment")
        return moment.covariance().float()

    def uncentered(self) -> Tensor:
        """Return C0 = (1/n) sum_s X_s^T X_s, d x d float32."""
        moment: SecondMoment = self.require("moment")
        return moment.uncentered().float()

    def weighted(self, weight: Tensor) -> FactoredMatrix:
        """Return W C for the module's weight W (m x d), in factors where C was never formed."""
        moment: SecondMoment = self.require("moment")
        return moment.weighted(weight)


def calibration_file(path: str | Path) -> Path:
    """Return the file for ``path``: itself, or the default name in an existing folder."""
    return file_at(path, _FILE)


@dataclass
class Calibration:
    """Statistics of all targeted modules, keyed by the module's full name, in model order."""

    modules: dict[str, ModuleStatistics]
    samples: int
    info: dict[str, Any] = field(default_factory=dict)
    """Origin of the statistics: model class, configuration. Plain JSON values."""
    key: Key | None = None
    """Identifies the exact inputs; None: unknown (assembled by hand)."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def lacks(self, names: Sequence[str], config: TLoraConfig) -> list[str]:
        """Report what this calibration lacks to plan the modules ``names`` by ``config``.

        Fields that only concern planning (rank, budget, scales, seed) play no part; extra
        statistics do no harm.
        """
        needed = [name for name, (asks, *_) in _STATISTICS.items() if getattr(config, asks)]
        each = self.modules.values()
        faults = [] if list(names) == list(self.modules) else ["other modules"]
        if any(getattr(module, name) is None for module in each for name in needed):
            faults.append("it lacks required statistics")
        return faults

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file (tensors, and a JSON header), atomically; return its path.

        safetensors stores float32 exactly and JSON's repr of a double round-trips, so loading
        restores the exact bits.

        Args:
            path: the file, or an existing folder that gets ``calibration.safetensors``.
        """
        path = calibration_file(path)
        tensors: dict[str, Tensor] = {}
        counts = {}
        for name, moment in self._moments().items():
            tensors |= {f"{name}/{part}": tensor for part, tensor in moment.parts().items()}
            counts[name] = {"samples": moment.samples, "tokens": moment.tokens}
        for module in self.modules.values():
            if module.gradient is not None:
                tensors[f"gradient/{module.name}"] = module.gradient
        rows = [{n: getattr(module, n) for n in _NUMBERS} for module in self.modules.values()]
        header = {"kind": _KIND, "format": _FORMAT, "samples": self.samples, "info": self.info}
        header |= {"key": self.key and vars(self.key), "modules": rows, "moments": counts}
        write_tensors(path, tensors, header)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a file written by `save`. Second moments are memory-mapped and read on first use.

        Raises:
            ArtifactError: the file is missing, damaged or of another kind.
        """
        path = calibration_file(path)
        tensors, header = read_tensors(path, _KIND, _FORMAT)
        with damaged(path):
            moments = {
                name: SecondMoment.from_parts(_with_prefix(tensors, f"{name}/"), **counts)
                for name, counts in header["moments"].items()
            }
            modules = {
                row["name"]: from_row(
                    ModuleStatistics,
                    row,
                    moment=moments.get(f"moment/{row['moment_id']}"),
                    gradient=tensors.get(f"gradient/{row['name']}"),
                    gradient_moment=moments.get(f"gradient-moment/{row['name']}"),
                )
                for row in header["modules"]
            }
            key = header.get("key")
            return cls(modules, header["samples"], dict(header["info"]), key and from_row(Key, key))

    def _moments(self) -> dict[str, SecondMoment]:
        """Return every second moment once, by its name in a file."""
        each = self.modules.values()
        shared = {
            f"moment/{m.moment_id}": m.moment for m in each if isinstance(m.moment, SecondMoment)
        }
        own = {
            f"gradient-moment/{m.name}": m.gradient_moment
            for m in each
            if m.gradient_moment is not None
        }
        return shared | own


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def model_key(model: nn.Module) -> str:
    """Return a hash of the name, shape and dtype of every parameter, and of some of its bits.

    Reads up to 512 evenly spaced entries of each parameter, quantized ones as stored. It misses
    changes outside these entries, in buffers, in data that a quantizing library keeps outside the
    parameters, and in the model's code and settings. For weights that are sharded over processes or
    offloaded, it only reads name, shape and dtype.
    """
    described = []
    samples: dict[torch.device, list[Tensor]] = {}
    offloaded = loaded_by(model)
    # Under each of its names, because an offloaded model unties its weights as it runs.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # DeepSpeed keeps the full shape beside an emptied parameter.
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        described.append(f"{name} {shape} {parameter.dtype}")
        # DeepSpeed sometimes holds a sharded parameter whole.
        unseen = name in offloaded or is_zero3(parameter)
        for stored in [] if unseen else _stored(parameter.detach()):
            samples.setdefault(stored.device, []).append(_sampled_bytes(stored))
    digest = hashlib.sha256("\n".join(described).encode())
    for parts in samples.values():
        # One transfer per device, not per parameter.
        digest.update(_bytes(torch.cat(parts)))
    return digest.hexdigest()


def _stored(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that store a parameter."""
    # A process only sees its own shard, but all must compute the same key.
    if tensor.is_meta or hasattr(tensor, "placements"):
        return []
    # A subclass that stores another form than its shape suggests lists its parts.
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None or type(tensor) in (Tensor, nn.Parameter):
        return [tensor] if tensor.numel() else []
    return [part for name in flatten()[0] for part in _stored(getattr(tensor, name))]


def _sampled_bytes(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    return flat[:: max(1, -(-len(flat) // _SAMPLED))].contiguous().view(torch.uint8)


def _bytes(tensor: Tensor) -> Any:
    """Return a CPU view of the bytes of a tensor, for a hash to read."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def digested(batches: Iterable[Batch], digests: list[str]) -> Iterator[Batch]:
    """Yield the batches, and append the digest of each to ``digests``."""
    for batch in batches:
        digests.append(batch_digest(as_batch(batch, torch.device("cpu"))))
        yield batch


def batch_digest(batch: Batch) -> str:
    """Return the SHA-256 of what a batch holds, whatever the order of its keys.

    Tensors, arrays and images count by content, also inside lists and dicts; other objects only by
    type, since their repr may contain a memory address.
    """
    digest = hashlib.sha256()
    _feed(digest, batch)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(_bytes(value.detach()))
    elif isinstance(value, Mapping):
        digest.update(f"{len(value)} named\n".encode())
        for name in sorted(value, key=str):
            digest.update(f"{name} ".encode())
            _feed(digest, value[name])
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)} listed\n".encode())
        for item in value:
            _feed(digest, item)
    elif hasattr(value, "tobytes"):
        shape = getattr(value, "shape", getattr(value, "size", None))
        digest.update(f"{type(value).__name__} {shape} {getattr(value, 'dtype', '')}\n".encode())
        digest.update(value.tobytes())
    else:
        text = json.dumps(value, default=lambda other: type(other).__name__)
        digest.update(f"{text}\n".encode())
