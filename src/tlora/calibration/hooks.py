"""Temporary hooks that record every target's input and output while a model runs."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from tlora.calibration.batches import BadSamples, TokenLayout
from tlora.calibration.placement import saved_by_reference
from tlora.calibration.weights import Target
from tlora.errors import CalibrationError


@dataclass
class Call:
    """One call of one target within a batch of B samples.

    Attributes:
        inputs: the module's input, unchanged.
        output: the node of the module's output in the graph, where its gradient arrives. Not the
            tensor itself, which the model may overwrite in place and so move in the graph.
        rows: ``inputs`` as B x T x d, after splitting.
        mask: B x T, true at real tokens; None: all are real.
        delta: the loss's gradient at ``output``, after the backward pass.
        others: further tensors passed to the module (for experts: the routing).
        result: the module's output, if its record keeps it, and its version counter: the model may
            overwrite it later.
    """

    inputs: Tensor
    output: GradientEdge | None
    rows: Tensor
    mask: Tensor | None = None
    delta: Tensor | None = None
    others: tuple[Tensor, ...] = ()
    result: tuple[Tensor, int] | None = None

    def outputs(self, target: Target) -> Tensor:
        """Return the target's output, B x T x m float32; recomputed if it was overwritten."""
        values, version = self.result or (self.inputs, None)
        if values._version != version or values.dtype != torch.float32:
            values = target.module.forward(self.inputs.float()).detach()
        return values.reshape(*self.rows.shape[:2], values.shape[-1])


class RealTokens:
    """Positions of real tokens, looked up once for each mask of a batch.

    Each lookup synchronizes with an accelerator.
    """

    def __init__(self) -> None:
        # Stored with the mask itself, so that its id is not reused while it lives.
        self._found: dict[int, tuple[Tensor, Tensor, list[int]]] = {}

    def places(self, mask: Tensor | None) -> Tensor | None:
        """Return the positions of the real tokens among B T rows; None: all are real."""
        return None if mask is None else self._lookup(mask)[1]

    def counts(self, call: Call) -> list[int]:
        """Return the number of real tokens of each sample of a call."""
        if call.mask is None:
            return [call.rows.shape[1]] * call.rows.shape[0]
        return self._lookup(call.mask)[2]

    def _lookup(self, mask: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        if id(mask) not in self._found:
            places = mask.flatten().nonzero().flatten()
            self._found[id(mask)] = (mask, places, mask.sum(dim=1).tolist())
        return self._found[id(mask)]


@dataclass
class ModuleRecord:
    """The hooks' record of one target in the current batch.

    Attributes:
        target: the module.
        calls: its calls, in order.
        keeps_outputs: whether the calls keep the module's output.
    """

    target: Target
    calls: list[Call] = field(default_factory=list)
    keeps_outputs: bool = False

    @property
    def source(self) -> tuple[Any, ...]:
        """Identifies the tensors read, so that modules with the same input are recognized."""
        seen = ((c.inputs.data_ptr(), c.inputs.shape, c.inputs.stride()) for c in self.calls)
        return (self.target.d_in, *seen)

    def split(self, layout: TokenLayout) -> None:
        """Split the rows of every call into samples and tokens.

        Raises:
            UnknownLayout: samples or tokens cannot be told apart.
        """
        for call in self.calls:
            call.rows, mask = layout.split(self.target.module, call.inputs)
            # Layers may lie on several devices, and the batch on one of them.
            call.mask = None if mask is None else layout.mask_on(mask, call.rows.device)

    def joined(self, size: int) -> tuple[Tensor, Tensor | None]:
        """Return the inputs of all calls as one B x T x d tensor, and its B x T mask."""
        if not self.calls:
            return torch.zeros(size, 0, self.target.d_in), None
        if len(self.calls) == 1:
            return self.calls[0].rows, self.calls[0].mask
        masks = [
            call.rows.new_ones(call.rows.shape[:2], dtype=torch.bool)
            if call.mask is None
            else call.mask
            for call in self.calls
        ]
        return torch.cat([call.rows for call in self.calls], dim=1), torch.cat(masks, dim=1)

    def joined_outputs(self, size: int) -> Tensor:
        """Return the outputs of all calls as one B x T x m tensor, in the order of `joined`."""
        if not self.calls:
            return torch.zeros(size, 0, self.target.d_out)
        return torch.cat([call.outputs(self.target) for call in self.calls], dim=1)


def check_inputs(records: Mapping[str, ModuleRecord]) -> None:
    """Check the split inputs of all targets.

    Raises:
        BadSamples: some inputs are not finite at real tokens.
    """
    calls = [
        (r.target.name, call)
        for r in records.values()
        for call in r.calls
        if call.inputs.numel() > 0
    ]
    if not calls:
        return
    device = calls[0][1].inputs.device
    # A sum is finite only if every entry is: the cheapest check, with one transfer for all. If
    # finite entries overflow it, the exact check below finds nothing wrong.
    sums = [c.inputs.sum(dtype=torch.float32).to(device) for _, c in calls]
    if torch.stack(sums).isfinite().all():
        return
    for name, call in calls:
        bad = ~call.rows.isfinite().all(dim=-1)
        if call.mask is not None:
            bad &= call.mask
        if bad.any():
            raise BadSamples(
                bad.any(dim=1).nonzero().flatten().tolist(),
                f"the input of {name} is not finite",
                f"{name}: its input is not finite on {{}}; check that sample, or calibrate in"
                " float32 or bfloat16.",
            )


class AllSeen(Exception):
    """Every target has run; the rest of the forward pass is not needed."""


@contextlib.contextmanager
def recording(
    model: nn.Module,
    records: Iterable[ModuleRecord],
    layout: TokenLayout,
    backward: bool,
    expected: Mapping[str, int] | None = None,
) -> Iterator[None]:
    """Record each target's inputs, and with ``backward`` its outputs, while the body runs.

    The graph starts at the first targets: their outputs, which follow no trained parameter,
    are set to require a gradient, so nothing before them is differentiated and no weight needs
    ``requires_grad``.

    Args:
        model: the model that runs.
        records: filled, one per target.
        layout: learns where the encoder's output lies in memory.
        backward: record gradients at the outputs.
        expected: how often each target will run, if known; the last call then raises `AllSeen` in
            the body. None or empty: unknown.
    """
    handles: list[Any] = []
    records = list(records)
    countdown: Iterator[int] | None = None
    if expected:
        calls = sum(expected.get(record.target.name, 0) for record in records)
        countdown = iter(range(calls - 1, -1, -1))
    try:
        for record in records:
            hook = partial(_on_target, record, backward, countdown)
            # This hook comes first, so that an engine that shards weights sees the graph that
            # starts here, and has gathered the weight when the gradient arrives.
            handles.append(
                record.target.module.register_forward_hook(hook, with_kwargs=True, prepend=True)
            )
        if layout.decoder_modules:
            encoder: nn.Module = model.get_encoder()  # type: ignore[operator]
            handles.append(encoder.register_forward_hook(partial(_on_encoder, layout)))
        with saved_by_reference(model) if backward else contextlib.nullcontext():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _on_target(
    record: ModuleRecord,
    backward: bool,
    countdown: Iterator[int] | None,
    _: nn.Module,
    args: Any,
    kwargs: Any,
    output: Tensor,
) -> Tensor | None:
    given = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    inputs, *others = (value.detach() for value in given)
    started = None
    result = (output.detach(), output._version) if record.keeps_outputs else None
    if backward and not (torch.is_grad_enabled() and output.requires_grad):
        _refuse_checkpointed(record.target)
    # If the model itself disables gradients, the loss does not depend on the target.
    backward = backward and torch.is_grad_enabled()
    if backward and not output.requires_grad:
        # A clone, because the model may write into the output in place, which a leaf forbids.
        output = started = output.detach().requires_grad_().clone()
    edge = _edge(output) if backward else None
    record.calls.append(Call(inputs, edge, inputs, others=tuple(others), result=result))
    if countdown is not None and not next(countdown, 0):
        raise AllSeen
    return started


def _refuse_checkpointed(target: Target) -> None:
    """Raise if activations are recomputed here: the graph's tensors would not be seen again.

    Raises:
        CalibrationError: the call is inside torch.utils.checkpoint.
    """
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            raise CalibrationError(
                f"{target.name}: the model checkpoints its activations in eval mode too, which "
                "hides the gradient here; switch gradient checkpointing off to calibrate."
            )
        frame = frame.f_back


def _edge(output: Tensor) -> GradientEdge:
    base = output._base
    whole = base is not None and base.numel() == output.numel() and output.is_contiguous()
    if base is not None and whole and base.requires_grad:
        # A write into a view moves the history of its base; the node of the base stays.
        return get_gradient_edge(base)
    return get_gradient_edge(output)


def _on_encoder(layout: TokenLayout, _: nn.Module, __: Any, output: Any) -> None:
    layout.encoded = output[0].data_ptr()
