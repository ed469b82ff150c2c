"""Changes of an adapter to its base, by the names of the base's parameters.

PEFT's rules, from its source (0.21): W + s B A; DoRA sets the norms of its rows (columns of a
transposed weight) to the magnitudes; `modules_to_save` and trained biases replace the base's;
trained token rows replace rows of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tlora.adapter.saved import BIAS, MAGNITUDE, PREFIX, ROWS, VARIANTS, SavedLora, shape_of
from tlora.errors import AdapterError, listed

_WRAPPED = (".token_adapter.base_layer.", ".original_module.", ".base_layer.")
"""Infix that PEFT adds to parameter names of an adapted module."""


@dataclass
class Change:
    """Changes of one parameter, in this order."""

    lora: SavedLora
    stands_for: str | None = None
    """Tensor that replaces the base's: a trained bias, a longer embedding. Tied parameters share
    it."""
    rows: str | None = None
    """Tensor of trained rows."""
    indices: tuple[int, ...] = ()
    """Indices of these rows."""
    replaced: str | None = None
    """Tensor of a fully trained module (`modules_to_save`)."""
    update: str | None = None
    """Module whose s B A to add."""
    shift: str | None = None
    """Module whose s times bias of B to add."""
    transposed: bool = False
    """Whether the weight is d_in x d_out, as in a Conv1D or an embedding."""

    @property
    def own(self) -> bool:
        """Whether parameters tied to this one do not change with it."""
        return self.replaced is not None or self.update is not None

    @property
    def replaces(self) -> bool:
        """Whether the base's tensor is fully replaced."""
        return self.replaced is not None or self.stands_for is not None

    def shape(self, before: tuple[int, ...] | None) -> tuple[int, ...]:
        """Return the shape of the result.

        Args:
            before: the shape in the base; None if it has no such parameter.
        """
        key = self.replaced or self.stands_for
        shape = shape_of(self.lora.tensors, key) if key else before or ()
        if self.indices:
            shape = (max(shape[0], max(self.indices) + 1), *shape[1:])
        return shape

    def __call__(self, weight: Tensor | None) -> Tensor:
        """Return the changed parameter in float32.

        Args:
            weight: the base's weight; unused if the adapter replaces it.
        """
        lora = self.lora
        key = self.replaced or self.stands_for
        if key:
            weight = lora.tensors[key]
        assert weight is not None  # ensured by `changes_of` and the caller
        weight = weight.to(torch.float32)
        if self.rows and not self.replaced:
            more = self.shape(tuple(weight.shape))[0] - weight.shape[0]
            weight = torch.cat([weight, weight.new_zeros(more, *weight.shape[1:])])
            weight[torch.tensor(self.indices)] = lora.tensors[self.rows].float()
        if self.update:
            weight = _updated(weight, lora, self.update, self.transposed)
        if self.shift:
            bias = lora.tensors[PREFIX + self.shift + BIAS]
            weight = weight + lora.scale(self.shift) * bias.float()
        return weight


def _updated(weight: Tensor, lora: SavedLora, module: str, transposed: bool) -> Tensor:
    """Return W + s B A, or with DoRA m (W + s B A) / ||W + s B A||, norms by output.

    Args:
        weight: float32, d_out x d_in; of a convolution d_out x channels x kernel.
        lora: the adapter.
        module: the module's name in it.
        transposed: the weight is d_in x d_out.
    """
    factors = lora.factors(module)
    rows = weight.T if transposed else weight
    b = (factors.b.double() * factors.scale).float().flatten(1)
    update = b @ factors.a.float().flatten(1)
    merged = rows + update.reshape(rows.shape)
    magnitude = PREFIX + module + MAGNITUDE
    if magnitude in lora.tensors:
        norms = merged.flatten(1).norm(dim=1)
        ratio = lora.tensors[magnitude].float().flatten() / norms
        merged = merged * ratio.reshape(-1, *[1] * (merged.dim() - 1))
    return merged.T if transposed else merged


def changes_of(lora: SavedLora, model: Any) -> dict[str, Change]:
    """Return an adapter's changes by the parameter's name in the model.

    Args:
        lora: the adapter.
        model: the base, on the meta device.

    Raises:
        AdapterError: some part cannot be merged, or the base has no such parameter.
    """
    if never := [f"`{name}`" for name in VARIANTS if lora.fields.get(name)]:
        raise AdapterError(
            f"{lora.path} has {listed(never)}, which cannot be merged into a weight; use --format"
            " native."
        )
    found: dict[str, Change] = {}

    def change(parameter: str) -> Change:
        return found.setdefault(parameter, Change(lora))

    for module in lora.keys:
        change(f"{module}.weight").update = module
    for key in lora.others:
        name = key.removeprefix(PREFIX)
        if name.endswith(ROWS):
            module = name.removesuffix(ROWS)
            each = change(f"{module}.weight")
            each.rows, each.indices = key, _indices(lora, module)
        elif name.endswith(BIAS):
            module = name.removesuffix(BIAS)
            change(f"{module}.bias").shift = module
        elif name.endswith(MAGNITUDE):
            continue
        elif lora.in_full(name):
            change(name).replaced = key
        else:
            for middle in _WRAPPED:
                name = name.replace(middle, ".")
            change(name).stands_for = key
    _check_known(lora, found, model)
    return found


def _indices(lora: SavedLora, module: str) -> tuple[int, ...]:
    """Return the trained rows of a module; a tied head uses the embedding's."""
    given = lora.fields.get("trainable_token_indices") or []
    if isinstance(given, Mapping):
        own = [rows for name, rows in given.items() if f".{module}".endswith(f".{name}")]
        given = (own or [*given.values()] or [[]])[0]
    return tuple(given)


def _check_known(lora: SavedLora, found: dict[str, Change], model: Any) -> None:
    """Check names and shapes, and note which weights are transposed."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    known = model.state_dict()
    unknown = [name for name in found if name not in known]
    if shifted := [name for name in unknown if found[name].shift]:
        raise AdapterError(
            f"{lora.path} has biases of B, which would merge into {listed(shifted)}, but"
            f" {type(model).__name__} has no such parameters; use --format native or compact."
        )
    if unknown:
        raise AdapterError(
            f"{lora.path} changes {listed(unknown)}, which {type(model).__name__} does not have;"
            " give the base that it was trained on with --model."
        )
    for name, change in found.items():
        module = model.get_submodule(name.rpartition(".")[0])
        change.transposed = isinstance(module, Conv1D | nn.Embedding)
        if change.rows and len(change.indices) != shape_of(lora.tensors, change.rows)[0]:
            raise AdapterError(
                f"{lora.path}: {name} has {shape_of(lora.tensors, change.rows)[0]} trained rows,"
                f" but `trainable_token_indices` has {len(change.indices)}; save the adapter again."
            )


def check_fit(name: str, change: Change, before: tuple[int, ...] | None) -> None:
    """Check that an update has the shape of the base's weight.

    Args:
        name: name of the parameter.
        change: its change.
        before: its shape in the base; None if it has no such parameter.

    Raises:
        AdapterError: the shapes differ, or the base lacks the parameter.
    """
    lora = change.lora
    if before is None and not change.replaces:
        raise AdapterError(
            f"{lora.path} adapts {name}, which is missing in the base's files; give the base that"
            " it was trained on with --model."
        )
    if change.update is None:
        return
    shape = change.shape(before)
    rows = shape[::-1] if change.transposed else shape
    a, b = (shape_of(lora.tensors, key) for key in lora.keys[change.update])
    if (b[0], *a[1:]) != rows:
        raise AdapterError(
            f"{lora.path} does not fit: {name} is {'x'.join(map(str, rows))} in the base but"
            f" {'x'.join(map(str, (b[0], *a[1:])))} in the adapter; give the base that it was"
            " trained on with --model."
        )
