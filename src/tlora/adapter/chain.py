"""Chains of LoRA: links of one rank train one after another, each on top of the previous ones.

The next link trains as if every finished link had been merged into W. A finished link is not added
to W but stays beside it, frozen: W' = W + s (B_1 A_1 + ... + B_k A_k). So nothing is rounded to the
dtype of W, which may be quantized; PEFT saves every link with each checkpoint; and the saved
adapter is exactly the trained one. The cost is that a step computes with the summed rank. Gradients
and optimizer state have the size of one link.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from tlora.adapter.freeze import FrozenACallback, lora_layers
from tlora.adapter.initial import random_a, save_larger
from tlora.adapter.three_factors import written_out
from tlora.calibration.placement import by_deepspeed
from tlora.errors import ConfigError
from tlora.linalg.matrices import full_precision

if TYPE_CHECKING:
    from peft import PeftModel

    NextA = Callable[[nn.Module, list[str]], dict[str, Tensor]]


class _Links(nn.Module):
    """A or B of every link: the newest is a parameter; earlier links, or zeros, are a buffer."""

    dim: int
    """Dimension along which links are concatenated: rows of A, columns of B."""

    def __init__(self, plain: nn.Module, length: int) -> None:
        super().__init__()
        weight: nn.Parameter = plain.weight  # type: ignore[assignment]
        sizes = list(weight.shape)
        self.rank = sizes[self.dim]
        sizes[self.dim] *= length - 1
        self.newest = weight
        self.finished: Tensor
        self.register_buffer("finished", weight.detach().new_zeros(sizes))

    @property
    def weight(self) -> Tensor:
        """All links: the matrix that PEFT merges."""
        return torch.cat([self.newest, self.finished.to(self.newest.dtype)], dim=self.dim)

    def first(self, count: int) -> Tensor:
        """Return the newest link and the ``count`` finished ones."""
        return self.weight.detach().narrow(self.dim, 0, (1 + count) * self.rank)

    @torch.no_grad()
    def follow(self, count: int, start: Tensor) -> None:
        """Put the newest link behind ``count`` finished ones; the next link begins at ``start``."""
        self.finished.narrow(self.dim, count * self.rank, self.rank).copy_(self.newest)
        self.newest.copy_(start)


class _LinksA(_Links):
    dim = 0

    def __init__(self, plain: nn.Module, length: int, dropout: nn.Module) -> None:
        super().__init__(plain, length)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Return A x of every link; inputs of finished links get no dropout."""
        newest = nn.functional.linear(self.dropout(x), self.newest)
        finished = nn.functional.linear(x, self.finished.to(self.newest.dtype))
        return torch.cat([newest, finished], dim=-1)


class _LinksB(_Links):
    dim = 1

    def forward(self, z: Tensor) -> Tensor:
        """Return the sum of B z over the links."""
        newest = nn.functional.linear(z[..., : self.rank], self.newest)
        finished = self.finished.to(self.newest.dtype)
        return newest + nn.functional.linear(z[..., self.rank :], finished)


def make_chain(model: PeftModel, length: int, method: str, plain: bool = True) -> None:
    """Make the LoRA of a freshly wrapped ``model`` the first of ``length`` links.

    Args:
        model: wrapped by the method of a link.
        length: number of links.
        method: the name of that method.
        plain: whether it leaves the optimizer to the trainer.

    Raises:
        ConfigError: it does not, or its adapter is not a plain LoRA with one rank and scale.
    """
    config, layers = model.peft_config["default"], [*lora_layers(model)]
    plain = plain and not (config.rank_pattern or config.alpha_pattern or config.target_parameters)
    for _, layer in layers:
        kinds = {type(layer.lora_A["default"]), type(layer.lora_B["default"])}
        plain = plain and kinds == {nn.Linear} and "default" not in layer.lora_variant
    if not plain:
        raise ConfigError(
            f"`link` is {method!r}, which with these options makes no plain LoRA with "
            "one rank and scale that any optimizer trains; remove options that "
            "allocate ranks or scales, adapt experts or bring an optimizer, or "
            "choose the link lora, lora-fa or tlora.",
            where="adapter",
        )
    for _, layer in layers:
        dropout = layer.lora_dropout["default"]
        layer.lora_dropout["default"] = nn.Identity()
        layer.lora_A["default"] = _LinksA(layer.lora_A["default"], length, dropout)
        layer.lora_B["default"] = _LinksB(layer.lora_B["default"], length)


def finished_links(model: nn.Module) -> int:
    """Return how many links of a chain are finished; their A has no zero row."""
    held: Any = next(layer for _, layer in lora_layers(model)).lora_A["default"]
    rows = int(held.finished.any(dim=1).sum())
    return rows // int(held.rank)


def random_links(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Return an A for each layer, drawn from torch's global generator like PEFT's first one."""
    layers: list[Any] = [model.get_submodule(name) for name in names]
    shapes = [layer.lora_A["default"].newest.shape for layer in layers]
    return {name: random_a(*shape) for name, shape in zip(names, shapes, strict=True)}


@contextlib.contextmanager
def merged_base(model: PeftModel) -> Iterator[nn.Module]:
    """Give the base model without its adapter, with every link added to copies of its weights.

    Afterwards ``model`` is restored.
    """
    base = model.get_base_model()
    layers = [*lora_layers(base)]
    try:
        for name, layer in layers:
            _put(base, name, _merged(layer))
        yield base
    finally:
        for name, layer in layers:
            _put(base, name, layer)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, module)


@full_precision
def _merged(layer: Any) -> nn.Module:
    plain = layer.get_base_layer()
    weight, part = plain.weight.detach(), layer.get_delta_weight("default").detach()
    module: nn.Module = copy.copy(plain)
    module._parameters = dict(plain._parameters)
    merged = (weight.to(part.dtype) + part).to(weight.dtype)
    module.weight = nn.Parameter(merged, requires_grad=False)
    return module


class ChainCallback(TrainerCallback):
    """Finishes a link after its share of the optimizer steps, and starts the next one.

    Links get equal shares. The next link begins with a new A, B = 0 and no optimizer state; the
    learning rate follows the run's single schedule.
    Random draws depend only on the run's seed and the link's number, so a resumed run, and every
    process of a group, draws the same values. A checkpoint holds the chain after its step.

    Args:
        length: number of links.
        next_a: returns A of the next link by layer name; it gets the base model, with all links
            merged or with its LoRA layers.
        merges: whether the links are merged for it.
        frozen: the guard of a frozen A.

    Raises:
        ConfigError: there are fewer steps than links, their number was changed between links, or
            DeepSpeed trains.
    """

    def __init__(
        self, length: int, next_a: NextA, merges: bool, frozen: FrozenACallback | None
    ) -> None:
        self.length, self.next_a, self.merges, self.frozen = length, next_a, merges, frozen
        self.count = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the shares; in a resumed run, count the finished links.

        Raises:
            ConfigError: as the class.
        """
        if by_deepspeed(args):
            raise ConfigError(
                "DeepSpeed trains copies of the adapter, and a chain replaces the "
                "adapter between steps; launch the run with DDP, or without DeepSpeed.",
                where="adapter",
            )
        if state.max_steps < self.length:
            raise ConfigError(
                f"`length` is {self.length}, more than the run's optimizer steps "
                f"({state.max_steps}), and each link needs at least one; train for more steps, or "
                "give a lower --adapter.length.",
                where="adapter",
            )
        self.count = finished_links(kwargs["model"])
        if self.count != (due := self._due(state)):
            raise ConfigError(
                f"{self.count} links are finished, and after {state.global_step} of "
                f"{state.max_steps} steps it should be {due}: the number of steps has "
                "changed, and links divide it equally; restore it, or start a new run.",
                where="adapter",
            )

    def _due(self, state: Any) -> int:
        step, steps = int(state.global_step), int(state.max_steps)
        return min(step * self.length // steps, self.length - 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go to the next link if this one has finished its share."""
        if self._due(state) == self.count:
            return
        model: Any = kwargs["model"]
        layers = dict(lora_layers(model.get_base_model()))
        with torch.random.fork_rng(devices=[]):
            draw = random.Random(f"{args.seed}, link {self.count + 1}")
            torch.default_generator.manual_seed(draw.getrandbits(63))
            whole = contextlib.nullcontext(model.get_base_model())
            with merged_base(model) if self.merges else whole as base:
                start = self.next_a(base, [*layers])
        for name, layer in layers.items():
            a, b = layer.lora_A["default"], layer.lora_B["default"]
            a.follow(self.count, start[name])
            b.follow(self.count, torch.zeros_like(b.newest))
            for parameter in (a.newest, b.newest):
                kwargs["optimizer"].state.pop(parameter, None)
        self.count += 1
        if self.frozen is not None:
            self.frozen.on_train_begin(args, state, control, model=model)


def save_chain(model: PeftModel, folder: Path) -> None:
    """Write the links so far as one plain LoRA of their summed rank."""
    count = finished_links(model)
    state = written_out(model, lambda held: held.first(count))
    save_larger(model, 1 + count, state, folder)
