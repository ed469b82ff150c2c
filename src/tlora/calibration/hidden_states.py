"""Intrinsic dimensions of the hidden states before and after each block of a model."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tlora.calibration.batches import TokenLayout, UnknownLayout, token_layout
from tlora.calibration.preserve import undo_after
from tlora.calibration.probe import checked_batch, progress_bar
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

    A sample is one point: the mean of the hidden states of its real tokens. The model is restored
    afterwards, also if a batch raises.

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
    with undo_after(model), progress_bar(batches, show=True) as bar:
        for batch in batches:
            read = checked_batch(model, batch)
            layout = token_layout(read, model)
            handles = []
            for name, block in blocks.items():
                given = partial(_before, layout, name, before)
                handles.append(block.register_forward_pre_hook(given, with_kwargs=True))
                handles.append(block.register_forward_hook(partial(_after, layout, name, after)))
            model(**read)
            for handle in handles:
                handle.remove()
            bar.update(layout.size)
    if blocks and not before:
        raise CalibrationError("`batches` gave no sample; give at least one batch.")
    return {n: (_dimension(before[n], n), _dimension(after[n], n)) for n in blocks}


Points = dict[str, list[Tensor]]


def _before(
    layout: TokenLayout, name: str, points: Points, block: nn.Module, args: Any, kwargs: Any
) -> None:
    hidden = args[0] if args else kwargs["hidden_states"]
    points[name].append(_means(layout, name, block, hidden))


def _after(
    layout: TokenLayout, name: str, points: Points, block: nn.Module, args: Any, output: Any
) -> None:
    hidden = output[0] if isinstance(output, (tuple, list)) else output
    points[name].append(_means(layout, name, block, hidden))


def _means(layout: TokenLayout, name: str, block: nn.Module, hidden: Tensor) -> Tensor:
    """Return the mean over the real tokens of each sample, B x d float32.

    Raises:
        CalibrationError: samples and tokens cannot be told apart, or a hidden state is not finite.
    """
    try:
        tokens, mask = layout.split(block, hidden)
    except UnknownLayout:
        raise CalibrationError(
            f"{name}: samples and tokens cannot be told apart in its hidden states; give batches of"
            " one sample (`calibration.batch_size` on the command line)."
        ) from None
    if mask is None:
        means = tokens.float().mean(dim=1)
    else:
        mask = layout.mask_on(mask, tokens.device)[..., None]
        means = tokens.float().where(mask, 0).sum(dim=1) / mask.sum(dim=1)
    if not means.isfinite().all():
        raise CalibrationError(
            f"{name}: its hidden states are not finite; calibrate in float32 or bfloat16."
        )
    return means.cpu()


def _dimension(points: list[Tensor], name: str) -> float:
    try:
        return two_nn(torch.cat(points))
    except ValueError as error:
        raise CalibrationError(
            f"{name}: its hidden states have no intrinsic dimension ({error}); give more "
            "distinct samples."
        ) from None
