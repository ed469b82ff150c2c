"""Statistics of experts in fused parameters, expert by expert, from one call of their module.

Hooks see the module's input (the rows, each row's experts and their weights) and the loss's
gradient at its output. The values in between are recomputed for the rows of one expert at a time:
its inner input h, and in the backward pass the gradients at u and at W_down h. So no parameter
needs a gradient, and only one expert's gradient is in memory. Padding is routed like text; its rows
are dropped here.

Expert e computes for a row x (`grouped_mm_experts_forward` of transformers)::

    u = W_in[e] x + b_in[e];  h = gate(u), or act(u);  y = norm(W_down[e] h + b_down[e])

Source: docs/method.md, 8.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tlora.calibration.hooks import Call, ModuleRecord
from tlora.calibration.weights import DOWN, ExpertPart, Target, inward_name
from tlora.linalg.gradients import Pairs
from tlora.linalg.matrices import full_precision
from tlora.linalg.products import factors


def records_of(targets: Iterable[Target]) -> dict[str, ModuleRecord]:
    """Return an empty record for each module that needs hooks, by its name.

    Targets that are experts of one module share its record.
    """
    records: dict[str, ModuleRecord] = {}
    for target in targets:
        if target.part is None:
            records[target.name] = ModuleRecord(target)
            continue
        name = target.part.parameter.rpartition(".")[0]
        if name not in records:
            records[name] = ExpertsRecord(Target(name, target.module, 0, 0))
        record = records[name]
        if isinstance(record, ExpertsRecord):
            record.parts.append(target)
    return records


def by_target(records: Mapping[str, ModuleRecord]) -> dict[str, ModuleRecord]:
    """Return the record of each target by its name, experts one by one."""
    found: dict[str, ModuleRecord] = {}
    for name, record in records.items():
        if isinstance(record, ExpertsRecord):
            found |= {part.name: PartRecord(part, of=record) for part in record.parts}
        else:
            found[name] = record
    return found


@dataclass
class ExpertsRecord(ModuleRecord):
    """The hooks' record of a module of fused experts.

    Attributes:
        parts: the targets in it, any matrices of any of its experts.
    """

    parts: list[Target] = field(default_factory=list)
    _sorted: dict[int, Routing] = field(default_factory=dict, init=False)

    def routings(self, calls: Sequence[Call]) -> list[Routing]:
        """Return the rows of each call sorted by expert; each call is sorted once."""
        experts = _part(self.parts[0]).count
        for call in calls:
            if id(call) not in self._sorted:
                self._sorted[id(call)] = Routing.of(call, experts)
        return [self._sorted[id(call)] for call in calls]

    def pairs(self, calls: Sequence[Call]) -> Iterator[tuple[Target, list[Pairs]]]:
        """Yield each part with its pairs (delta, x) of every sample, expert by expert.

        Experts that these samples do not reach are skipped, since they do not change the loss.

        Args:
            calls: the calls that the loss depends on, with known ``delta``.
        """
        experts: dict[int, list[Target]] = {}
        for target in self.parts:
            experts.setdefault(_part(target).index, []).append(target)
        routings = self.routings(calls)
        self._sorted = {}
        for expert, targets in experts.items():
            passes = [_Pass.of(self.target.module, r, expert) for r in routings if r.total(expert)]
            for target in targets if passes else ():
                yield (
                    target,
                    [
                        [pair for pair in pairs if len(pair[0])]
                        for pairs in zip(*(each.pairs(target) for each in passes), strict=True)
                    ],
                )


@dataclass
class PartRecord(ModuleRecord):
    """The rows that one expert's matrix read, as the record of a separate module."""

    of: ExpertsRecord = field(kw_only=True)

    @property
    def source(self) -> tuple[Any, ...]:
        """No two matrices of fused parameters read the same rows."""
        return (self.target.name,)

    def joined(self, size: int) -> tuple[Tensor, Tensor | None]:
        """Return its rows as B x T x d, with T the longest sample, and the B x T mask."""
        part, module = _part(self.target), self.target.module
        samples: list[list[Tensor]] = [[] for _ in range(size)]
        for routing in self.of.routings(self.of.calls):
            if not routing.total(part.index):
                continue
            rows = routing.rows(part.index)
            if part.reads_hidden:
                rows = activated(module, inward(module, part.index, rows))
            for sample, own in zip(samples, routing.split(part.index, rows), strict=True):
                sample.append(own)
        if not any(samples):
            return torch.zeros(size, 0, self.target.d_in), None
        each = [torch.cat(sample) for sample in samples]
        padded = torch.nn.utils.rnn.pad_sequence(each, batch_first=True)
        lengths = torch.tensor([len(rows) for rows in each], device=padded.device)
        places = torch.arange(padded.shape[1], device=padded.device)
        return padded, places < lengths[:, None]


@dataclass(frozen=True)
class Routing:
    """The real rows of one call, sorted by expert and then by sample.

    Attributes:
        call: a call of the experts' module: N rows, each routed to k experts.
        weights: N k factors of the experts' outputs.
        each: k.
        order: positions among the N k pairs of a real row and its expert, sorted.
        counts: number of rows by expert and sample.
        starts: start of each expert's positions in ``order``.
    """

    call: Call
    weights: Tensor
    each: int
    order: Tensor
    counts: list[list[int]]
    starts: list[int]

    @classmethod
    def of(cls, call: Call, experts: int) -> Routing:
        """Sort the rows of a call.

        Args:
            call: split into samples; beside the rows it got N x k experts and weights.
            experts: E.
        """
        chosen = _chosen(call)
        weights = next(t for t in call.others if t.is_floating_point())
        size, length = call.rows.shape[:2]
        expert, each = chosen.flatten(), chosen.shape[-1]
        order = torch.argsort(expert, stable=True)
        if call.mask is not None:
            order = order[call.mask.to(order.device).flatten()[order // each]]
        sample = order // each // length
        counted = torch.bincount(expert[order] * size + sample, minlength=experts * size)
        counts = counted.view(experts, size).tolist()
        starts = list(itertools.accumulate(map(sum, counts), initial=0))
        return cls(call, weights.flatten(), each, order, counts, starts)

    def total(self, expert: int) -> int:
        """Return the number of rows of an expert."""
        return self.starts[expert + 1] - self.starts[expert]

    def rows(self, expert: int) -> Tensor:
        """Return the input of an expert, tokens x d."""
        return _flat(self.call.rows)[self._places(expert) // self.each]

    def split(self, expert: int, rows: Tensor) -> tuple[Tensor, ...]:
        """Split an expert's rows by sample."""
        return tuple(torch.split(rows, self.counts[expert]))

    def gradient(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return the loss's gradient at the module's output for an expert's rows, and weights.

        Raises:
            ValueError: the backward pass did not reach the call.
        """
        if self.call.delta is None:
            raise ValueError("the call has no gradient")
        places = self._places(expert)
        return _flat(self.call.delta)[places // self.each], self.weights[places][:, None]

    def _places(self, expert: int) -> Tensor:
        return self.order[self.starts[expert] : self.starts[expert + 1]]


@dataclass(frozen=True)
class _Pass:
    """One expert on its rows of one call, forward and backward.

    Attributes:
        routing: the call.
        expert: its index.
        inputs: x of W_in and h of W_down.
        deltas: the loss's gradient at u and at W_down h.
    """

    routing: Routing
    expert: int
    inputs: tuple[Tensor, Tensor]
    deltas: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, module: nn.Module, routing: Routing, expert: int) -> _Pass:
        rows = routing.rows(expert)
        delta, weights = routing.gradient(expert)
        with torch.enable_grad():
            inner = inward(module, expert, rows).detach().requires_grad_()
            hidden = activated(module, inner)
            outer = outward(module, expert, hidden)
            mixed = normed(module, outer) * weights
            at_inner, at_outer = torch.autograd.grad(mixed, (inner, outer), delta.to(mixed.dtype))
        return cls(routing, expert, (rows, hidden.detach()), (at_inner, at_outer))

    def pairs(self, target: Target) -> list[tuple[Tensor, Tensor]]:
        """Return delta_s and X_s of each sample for one of the two matrices, see `factors`."""
        which = int(_part(target).reads_hidden)
        deltas = self.routing.split(self.expert, self.deltas[which])
        inputs = self.routing.split(self.expert, self.inputs[which])
        return [factors(d, x) for d, x in zip(deltas, inputs, strict=True)]


def _part(target: Target) -> ExpertPart:
    if target.part is None:
        raise ValueError(f"{target.name} is no expert of a fused parameter")
    return target.part


def _chosen(call: Call) -> Tensor:
    """Return the N x k experts of a call's rows."""
    return next(tensor for tensor in call.others if not tensor.is_floating_point())


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def inward(module: Any, expert: int, rows: Tensor) -> Tensor:
    """Return u of an expert for its rows, tokens x d."""
    return _linear(module, inward_name(module), expert, rows)


def activated(module: Any, inner: Tensor) -> Tensor:
    """Return h of u."""
    hidden: Tensor = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    return hidden


def outward(module: Any, expert: int, hidden: Tensor) -> Tensor:
    """Return W_down h + b_down of an expert, before the norm that some classes apply."""
    return _linear(module, DOWN, expert, hidden)


def normed(module: Any, outer: Tensor) -> Tensor:
    """Return y of the expert."""
    normal: Tensor = module.post_expert_norm(outer) if module.has_post_expert_norm else outer
    return normal


@full_precision
def _linear(module: Any, attribute: str, expert: int, rows: Tensor) -> Tensor:
    weight = module.get_parameter(attribute)[expert]
    bias = module.get_parameter(f"{attribute}_bias")[expert] if module.has_bias else None
    # In the weight's dtype, like transformers' `grouped_mm`, which ignores autocast.
    return functional.linear(
        rows.to(weight.dtype), weight.T if module.is_transposed else weight, bias
    )
