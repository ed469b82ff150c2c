"""Intrinsic dimensions of the hidden states before and after each block of a model."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tlora.calibration.batches import (
    TokenLayout,
    UnknownLayout,
    single_samples,
    token_layout,
)
from tlora.calibration.preserve import undo_after
from tlora.calibration.probe import checked_batch, progress_bar
from tlora.calibration.statistics import batch_digest
from tlora.calibration.weights import Target
from tlora.errors import CalibrationError
from tlora.linalg.intrinsic import two_nn

_BLOCK = re.compile(r".*?\.\d+(?=\.)")


def block_of(name: str) -> str | None:
    """Return the block that contains a module, its name up to the first number: "model.layers.3".

    None for a module outside all blocks (a pooler).
    """
    found = _BLOCK.match(name)
    return found.group() if found else None


@torch.no_grad()
def block_dimensions(
    model: nn.Module, targets: Sequence[Target], batches: Iterable[Mapping[str, Any]]
) -> dict[str, tuple[float, float]]:
    """Return the intrinsic dimensions of each target block's input and output.

    A sample is one point: the mean of the hidden states of its real tokens. Equal samples are one
    point, since padding moves their states by rounding, which TwoNN would take for a distance. The
    model is restored afterwards, also if a batch raises.

    Args:
        model: the base model.
        targets: the modules to adapt.
        batches: read once, with forward passes only.

    Raises:
        CalibrationError: there is no batch, a hidden state is not finite, samples and tokens cannot
            be told apart, or too few samples are distinct.
    """
    blocks = {name: model.get_submodule(name) for t in targets if (name := block_of(t.name))}
    before: dict[str, list[Tensor]] = defaultdict(list)
    after: dict[str, list[Tensor]] = defaultdict(list)
    seen: set[str] = set()
    with undo_after(model), progress_bar(batches, show=True) as bar:
        for batch in batches:
            read = checked_batch(model, batch)
            layout = token_layout(read, model)
            points = _Points(layout, _first_seen(read, model, seen))
            handles = []
            for name, block in blocks.items():
                given = partial(_before, points, name, before)
                handles.append(block.register_forward_pre_hook(given, with_kwargs=True))
                handles.append(block.register_forward_hook(partial(_after, points, name, after)))
            model(**read)
            for handle in handles:
                handle.remove()
            bar.update(layout.size)
    if blocks and not seen:
        raise CalibrationError("`batches` gave no sample; give at least one batch.")
    if missed := [name for name in blocks if not after[name]]:
        raise CalibrationError(
            f"{missed[0]}: no calibration sample reaches it, so it has no states; exclude its"
            " modules by `exclude_modules`."
        )
    return {n: (_dimension(before[n], n), _dimension(after[n], n)) for n in blocks}


def _first_seen(batch: Mapping[str, Any], model: nn.Module, seen: set[str]) -> list[int]:
    """Return the places of a batch's samples that are not in ``seen``, and add them to it."""
    places = []
    for place, sample in enumerate(single_samples(batch, model)):
        if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            sample.pop("labels", None)
        if (digest := batch_digest(sample)) not in seen:
            seen.add(digest)
            places.append(place)
    return places


@dataclass(frozen=True)
class _Points:
    """Turns the hidden states of a batch into points, one for each of the chosen samples."""

    layout: TokenLayout
    places: list[int]

    def of(self, name: str, block: nn.Module, hidden: Tensor) -> Tensor:
        """Return the mean over the real tokens of each chosen sample, float32.

        Raises:
            CalibrationError: samples and tokens cannot be told apart, or a state is not finite.
        """
        try:
            tokens, mask = self.layout.split(block, hidden)
        except UnknownLayout:
            raise CalibrationError(
                f"{name}: samples and tokens cannot be told apart in its hidden states; give "
                "batches of one sample (`calibration.batch_size` on the command line)."
            ) from None
        if mask is None:
            means = tokens.float().mean(dim=1)
        else:
            mask = self.layout.mask_on(mask, tokens.device)[..., None]
            means = tokens.float().where(mask, 0).sum(dim=1) / mask.sum(dim=1)
        if not means.isfinite().all():
            raise CalibrationError(
                f"{name}: its hidden states are not finite; calibrate in float32 or bfloat16."
            )
        return means[self.places].cpu()


Held = dict[str, list[Tensor]]


def _before(
    points: _Points, name: str, held: Held, block: nn.Module, args: Any, kwargs: Any
) -> None:
    hidden = args[0] if args else kwargs["hidden_states"]
    held[name].append(points.of(name, block, hidden))


def _after(
    points: _Points, name: str, held: Held, block: nn.Module, args: Any, output: Any
) -> None:
    hidden = output[0] if isinstance(output, (tuple, list)) else output
    held[name].append(points.of(name, block, hidden))


def _dimension(points: list[Tensor], name: str) -> float:
    try:
        return two_nn(torch.cat(points))
    except ValueError as error:
        raise CalibrationError(
            f"{name}: its hidden states have no intrinsic dimension ({error}); give more "
            "distinct samples."
        ) from None
