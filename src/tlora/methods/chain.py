"""Chains of adapters, each merged before the next trains: XGBLoRA and RAC-LoRA."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from tlora.checks import POSITIVE, at_least
from tlora.errors import ConfigError
from tlora.methods.base import Batches, Plans, Prepared, Samples, Traits
from tlora.methods.learningrates import LORA_RATES
from tlora.methods.options import LoraOptions

if TYPE_CHECKING:
    import torch

_RATES = dataclasses.replace(
    LORA_RATES, source=f"LoRA's, because we found no published ones. {LORA_RATES.source}"
)
_PARTS = {"lora_A", "lora_B"}
_ALLOCATION = ("allocate_rank", "allocate_scale")
_UNEQUAL = (*_ALLOCATION, "target_parameters", "own_optimizer")
"""Options of a link that makes no plain LoRA of one rank and scale which any optimizer trains."""


@dataclass(kw_only=True)
class ChainOptions(LoraOptions):
    """LoRA's options for one link, and those of the chain."""

    r: Annotated[int, at_least(1)] = 1
    """Rank of a link."""
    lora_alpha: Annotated[float, POSITIVE] = 1
    """A link's output is multiplied by lora_alpha / r."""
    length: Annotated[int, at_least(1)] = 8
    """Number of links, each trained for an equal share of the optimizer steps."""
    link: str = "lora"
    """Method of a link: lora, rslora, lora-fa, tlora (A is calibrated again for each), or another
    method that makes a plain LoRA of one rank."""
    link_options: dict[str, Any] = field(default_factory=dict)
    """Further options of that method, such as "basis: gradient"."""

    def relations(self) -> Iterator[str]:
        """Yield errors in combinations of fields."""
        own = [*super().relations()]
        yield from own
        try:
            traits = self.method.traits
            self.of_link()
        except ConfigError as error:
            yield from (f"`link` {self.link!r}: {each}" for each in error.faults if each not in own)
            return
        parts, link = set(traits.trains), self.of_link()
        plain = traits.plain and not traits.changes_base
        if not plain or "lora_B" not in parts or not parts <= _PARTS:
            yield (
                f"`link` is {self.link!r}, which is not a plain LoRA beside W that trains B; "
                "choose lora, rslora, lora-fa or tlora."
            )
        elif traits.reads != "nothing" and not isinstance(self.method(), Plans):
            yield (
                f"`link` is {self.link!r}, which cannot start again from a model during "
                "training; choose lora, rslora, lora-fa or tlora."
            )
        elif more := [name for name in _UNEQUAL if getattr(link, name, None)]:
            why = "brings an optimizer" if more == ["own_optimizer"] else f"has `{more[0]}`"
            yield (
                f"`link` is {self.link!r}, which {why}, but each link is a plain LoRA of one rank"
                " and scale that the trainer's optimizer steps; choose lora, rslora, lora-fa or"
                " tlora, without such options."
            )

    @property
    def method(self) -> Any:
        """The method of a link."""
        from tlora.registry import METHODS

        return METHODS.load(self.link)

    @property
    def freeze_a(self) -> bool:
        """Whether A of a link is frozen."""
        frozen = self.method.traits.trains == ("lora_B",)
        return frozen and bool(getattr(self.of_link(), "freeze_a", True))

    def of_link(self, **fields: Any) -> Any:
        """Return the options of a link. All links have one rank and scale, so allocation is off."""
        record = self.method.options
        known = set(record.field_names())
        own = {name: value for name, value in vars(self).items() if name in known}
        equal = {name: False for name in _ALLOCATION if name in known}
        return record(**own | equal | self.link_options | fields)


class _Chain:
    """Shared by both methods: how to make a chain from any link."""

    options: ClassVar[type] = ChainOptions
    traits: ClassVar[Traits]

    def prepare(
        self, model: torch.nn.Module, options: Any, batches: Batches, plan: Any = None
    ) -> Prepared:
        """Prepare ``model`` for the first link, with a callback that starts the others."""
        from tlora.adapter.chain import ChainCallback, make_chain, random_links, save_chain
        from tlora.adapter.freeze import FrozenACallback

        method, record = options.method(), options.of_link()
        if plans := isinstance(method, Plans):
            _refuse_unmergeable(model, options, record)
            samples = Samples.of(batches)
            batches = dataclasses.replace(samples, batches=_Kept(samples.batches))
        prepared: Prepared = method.prepare(model, record, batches, plan)
        make_chain(prepared.model, options.length, options.link, prepared.optimizer is None)
        frozen = next((c for c in prepared.callbacks if isinstance(c, FrozenACallback)), None)
        next_a = partial(_planned_a, method, options, batches) if plans else random_links
        chained = ChainCallback(options.length, next_a, plans, frozen)
        return dataclasses.replace(
            prepared,
            callbacks=[*prepared.callbacks, chained],
            writer=partial(save_chain, prepared.model),
        )


class _Kept:
    """Batches that are read once: later links must not disturb the trainer's rows."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._kept: list[Mapping[str, Any]] | None = None

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        if self._kept is None:
            self._kept = list(self._batches)
        return iter(self._kept)


def _refuse_unmergeable(model: torch.nn.Module, options: ChainOptions, record: Any) -> None:
    """Check that a link can calibrate on a model that holds the earlier links.

    Raises:
        ConfigError: it cannot.
    """
    from tlora.adapter.stock import targets_of
    from tlora.calibration.weights import holds_floats

    why = None
    if any(not holds_floats(target.module) for target in targets_of(model, record)):
        why = "the base is quantized, so its weights differ; load the model unquantized"
    elif options.trainable_token_indices is not None:
        why = "rows of the embedding train too, which calibration does not read; add none"
    if why:
        raise ConfigError(
            f"`link` {options.link!r} calibrates each link on the weights with the "
            f"last one merged, but {why}, or choose the link lora or lora-fa.",
            where="adapter",
        )


def _planned_a(
    method: Plans, options: ChainOptions, batches: Batches, base: torch.nn.Module, names: list[str]
) -> dict[str, torch.Tensor]:
    """Return A of every layer from the link's own plan for a base model."""
    # A cache only holds the statistics of the base model.
    samples = dataclasses.replace(Samples.of(batches), cache=None)
    record = options.of_link(target_modules=names, exclude_modules=None)
    plan = method.plan(base, record, samples)
    return {name: module.lora_A for name, module in plan.modules.items()}


class XgbLora(_Chain):
    """y = W x + s (B_1 A_1 + ... + B_k A_k) x: link k trains, earlier links are part of W.

    Gradient boosting with LoRAs of rank 1: each link trains for its share of the steps, is merged,
    and
    is followed by a new one with random A and zero B. The saved adapter is one plain LoRA of the
    summed rank.

    Source: Zhang et al., arXiv 2410.19694, according to its abstract and later papers; we could not
    read its algorithm (docs/methods.md).
    """

    traits: ClassVar[Traits] = Traits(
        title="Less is More: Extreme Gradient Boost Rank-1 Adaption for Efficient Finetuning of"
        " LLMs",
        arxiv="2410.19694",
        year=2024,
        formula="W x + (alpha / r) (B_1 A_1 + ... + B_k A_k) x, the last link alone trains",
        trains=("lora_A", "lora_B"),
        parameters="r (m + d)",
        start="identical",
        saved="LoRA of rank r * length",
        learning_rates=_RATES,
        source="tlora",
    )


@dataclass(kw_only=True)
class RacLoraOptions(ChainOptions):
    """Options of a chain, with LoRA-FA as its link."""

    link: str = "lora-fa"
    """Method of a link: lora, rslora, lora-fa, tlora (A is calibrated again for each), or another
    method that makes a plain LoRA of one rank."""


class RacLora(_Chain):
    """y = W x + s (B_1 A_1 + ... + B_k A_k) x: A_k is drawn again for each link, and B_k trains.

    This is the paper's form with A fixed and B trained; its other form fixes B. With
    `link: tlora` A_k comes from the task instead: it is calibrated on the model that includes the
    earlier links. The saved adapter is one plain LoRA of the summed rank.

    Source: Malinovsky et al., arXiv 2410.08305, algorithm 1.
    """

    options: ClassVar[type] = RacLoraOptions
    traits: ClassVar[Traits] = Traits(
        title="Randomized Asymmetric Chain of LoRA: The First Meaningful Theoretical Framework for"
        " Low-Rank Adaptation",
        arxiv="2410.08305",
        year=2024,
        formula="W x + (alpha / r) (B_1 A_1 + ... + B_k A_k) x, A_k random and frozen, B_k trains",
        trains=("lora_B",),
        parameters="r m",
        start="identical",
        saved="LoRA of rank r * length",
        learning_rates=_RATES,
        source="tlora",
    )
