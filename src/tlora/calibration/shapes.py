"""A forward pass of shapes alone: which modules share an input, what a backward pass keeps.

The parameters stand on `meta`. torch's fake tensors run the model's own code on them: every
operation gives shapes, dtypes and storages as on a CPU, and no numbers, so a 70B model takes two
seconds and no memory. The hooks are those of the real calibration.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers.modeling_layers import GradientCheckpointingLayer

from tlora.calibration.batches import TokenLayout
from tlora.calibration.experts import ExpertsRecord, records_of
from tlora.calibration.hooks import Record, recording
from tlora.calibration.weights import Target

Spec = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""A batch without numbers: shape and dtype of each of its tensors."""

_aten = torch.ops.aten


class Untraceable(Exception):
    """The model's forward asks for numbers, or refuses the batch; internal, answered by a guess."""


@dataclass(frozen=True)
class Forward:
    """What one forward pass of a batch does. Sizes are bytes, FLOPs count a product-add as two.

    Attributes:
        sources: by target: equal numbers where modules read the same tensors; those that are
            never called are left out.
        rows: by target: rows of all its inputs in the batch (real tokens and padding).
        inputs: what the targets read, each storage counted once.
        saved: what autograd keeps for the backward pass, parameters left out.
        held: both together, each storage counted once.
        outside: the part of ``saved`` that is kept outside the layers below.
        boundaries: inputs of all layers that gradient checkpointing would run again.
        largest_layer: the most that one such layer adds to ``saved``.
        layers: how many there are.
        logits: entries of the logits.
        weight_flops: products with a parameter; the gradient to their input costs as much.
        attention_flops: products of two activations; their backward costs twice as much.
    """

    sources: dict[str, int]
    rows: dict[str, int]
    inputs: int
    saved: int
    held: int
    outside: int
    boundaries: int
    largest_layer: int
    layers: int
    logits: int
    weight_flops: int
    attention_flops: int


def forward_of(
    model: nn.Module, spec: Spec, targets: Sequence[Target], trained: bool = False
) -> Forward:
    """Run ``model``, whose parameters are on `meta`, on a batch of the shapes ``spec``.

    Args:
        model: in the mode (train or eval) that is asked about; it is left as it was.
        spec: the batch.
        targets: the modules that are adapted.
        trained: every parameter is trained; else all are frozen and the graph starts at the first
            targets, as when calibrating.

    Raises:
        Untraceable: the forward depends on values (routing in a loop), or fails on the batch.
    """
    mode = FakeTensorMode()
    state: dict[str, Tensor] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state[name] = _fake(mode, tensor, trained and isinstance(tensor, nn.Parameter))
    kept = _Kept({_storage(tensor) for tensor in state.values()})
    records = records_of(targets)
    layout = TokenLayout(next(iter(spec.values()))[0][0], None)
    flops = _Flops()
    try:
        with (
            mode,
            torch.inference_mode(False),
            torch.enable_grad(),
            contextlib.nullcontext()
            if trained
            else recording(model, records.values(), layout, True),
            kept.watching(model),
            flops,
        ):
            batch = {name: torch.zeros(shape, dtype=kind) for name, (shape, kind) in spec.items()}
            output = torch.func.functional_call(model, state, (), batch)
    except Exception as error:  # whatever a model's own code raises
        raise Untraceable(f"{type(error).__name__}: {_first_line(error)}") from error
    return _summary(records, kept, flops, output)


def _summary(records: dict[str, Record], kept: _Kept, flops: _Flops, output: Any) -> Forward:
    saved, inside = kept.total, sum(layer.kept for layer in kept.layers)
    read = _Kept(kept.own)
    numbers: dict[tuple[Any, ...], int] = {}
    sources, rows = {}, {}
    for name, record in records.items():
        if isinstance(record, ExpertsRecord):
            for part, met in record.expected_rows().items():
                sources[part], rows[part] = numbers.setdefault((part,), len(numbers)), met
        elif record.calls:
            key = (record.target.d_in, *(_place(call.inputs) for call in record.calls))
            sources[name] = numbers.setdefault(key, len(numbers))
            rows[name] = sum(c.inputs.numel() // record.target.d_in for c in record.calls)
        for call in record.calls:
            kept.add(call.inputs)
            read.add(call.inputs)
    logits = output.get("logits") if isinstance(output, Mapping) else None
    return Forward(
        sources=sources,
        rows=rows,
        inputs=read.total,
        saved=saved,
        held=kept.total,
        outside=saved - inside,
        boundaries=sum(layer.boundary for layer in kept.layers),
        largest_layer=max((layer.kept for layer in kept.layers), default=0),
        layers=len(kept.layers),
        logits=logits.numel() if isinstance(logits, Tensor) else 0,
        weight_flops=flops.weights,
        attention_flops=flops.attention,
    )


def _fake(mode: FakeTensorMode, tensor: Tensor, trained: bool) -> Tensor:
    fake = FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))
    return fake.requires_grad_(trained and fake.is_floating_point())


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """What `data_ptr`, shape and stride are to a tensor with numbers."""
    return (_storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:160]


@dataclass
class _Layer:
    boundary: int
    kept: int


@dataclass
class _Kept:
    """Adds up the storages that autograd saves; it holds them, so that none is seen twice."""

    own: set[int]
    storages: dict[int, Any] = field(default_factory=dict)
    total: int = 0
    layers: list[_Layer] = field(default_factory=list)
    depth: int = 0

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own and storage._cdata not in self.storages:
            self.storages[storage._cdata] = storage
            self.total += storage.nbytes()
        return tensor

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        handles: list[Any] = []
        try:
            for module in model.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                    handles.append(module.register_forward_hook(self._leave))
            with torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self.depth += 1
        if self.depth == 1:
            first = args[0] if args else kwargs.get("hidden_states")
            boundary = first.numel() * first.element_size() if isinstance(first, Tensor) else 0
            self.layers.append(_Layer(boundary, -self.total))

    def _leave(self, *_: Any) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.layers[-1].kept += self.total


class _Flops(TorchDispatchMode):
    """Counts products: 2 m n k for an m x n by n x k one."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = 0
        self.attention = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet is _aten._grouped_mm and args[1].dim() == 3:
            # rows x d by experts x d x m: every row meets one expert. Shapes of torch's own are
            # those of bfloat16 alone.
            self.weights += 2 * args[0].numel() * args[1].shape[-1]
            return args[0].new_empty(len(args[0]), args[1].shape[-1])
        out = func(*args, **kwargs)
        if packet in (_aten.mm, _aten.addmm, _aten.convolution):
            self.weights += flop_registry[packet](*args, **kwargs, out_val=out)
        elif packet in (_aten.bmm, _aten.baddbmm):
            self.attention += flop_registry[packet](*args, **kwargs, out_val=out)
        elif packet is _aten._scaled_dot_product_flash_attention_for_cpu:
            query, key = args[0], args[1]
            self.attention += 4 * query.numel() * key.shape[-2]
        return out
