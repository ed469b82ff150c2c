"""The interface of a method: an options record, its properties, and how to prepare a base model.

The call order, in `tlora.training`::

    options = method.options(**fields)                   # flags and YAML, checked at once
    prepared = method.prepare(model, options, batches, plan)   # plan: None, or of a resumed run
    trainer = Trainer(prepared.model, callbacks=prepared.callbacks, **prepared.trainer_kwargs)
    # with `optimizers=(prepared.optimizer(prepared.model, arguments), None)`, where one is given
    prepared.save(folder)                                # a plain PEFT folder

Importing a method's file must be cheap: the command line reads its options record for --help.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from tlora.methods.learningrates import LearningRates

if TYPE_CHECKING:
    import torch
    from transformers import TrainerCallback

    from tlora.adapter.initial import InitialAdapter
    from tlora.adapter.plan import AdapterPlan
    from tlora.calibration.probe import CalibrateOptions

    Plan = AdapterPlan | InitialAdapter

Batches = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Samples:
    """Calibration batches with reading options; iterates over the batches."""

    batches: Batches
    """Dicts of the model's forward arguments (tensors)."""
    skip_bad_samples: bool = False
    """Skip bad samples, if the method checks them."""
    cache: str | None = None
    """File of the statistics, for a method that saves them."""

    @classmethod
    def of(cls, batches: Batches) -> Samples:
        """Return ``batches`` as `Samples`; unchanged if they already are."""
        return batches if isinstance(batches, cls) else cls(batches)

    @property
    def reading(self) -> CalibrateOptions:
        """Reading options, as keywords of `tlora.calibrate`."""
        return {"skip_bad_samples": self.skip_bad_samples, "cache": self.cache}

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.batches)


@dataclass(frozen=True, kw_only=True)
class Traits:
    """Properties of a method. Tables show them, and the contract tests verify them.

    Described at the method's default options.
    """

    title: str
    """Title of its paper."""
    arxiv: str | None
    """The paper's number on arXiv, if it has one."""
    year: int
    """Year of the paper."""
    formula: str
    """The adapted layer, in one line of plain text."""
    trains: tuple[str, ...]
    """A part of the name of each kind of trainable parameter; "" means all parameters. New heads
    (`modules_to_save`) and biases train too."""
    parameters: str
    """Trainable parameters of an m x d module, as a formula in m, d and the options."""
    start: Literal["identical", "rounding", "moved"]
    """The output before the first step: bit-identical to the base's, equal up to rounding, or
    already changed by the adapter's initialization."""
    plain: bool = True
    """Whether lora_A and lora_B, if it trains them, are PEFT's own matrices, which a chain or the
    optimizer LoRA-RITE can take over."""
    changes_base: bool = False
    """Whether the base weights differ from the loaded ones during training. The saved adapter still
    fits the loaded weights."""
    reads: Literal["nothing", "inputs", "gradients"] = "nothing"
    """The calibration statistics that the method uses before training; gradients include inputs."""
    pools: bool = False
    """Whether each process may get its own share of the calibration batches, because the statistics
    are summed; otherwise every process gets all of them."""
    source: Literal["PEFT", "tlora"] = "PEFT"
    """Whose code implements the method's own step."""
    learning_rates: LearningRates
    """Default learning rates."""
    leaves: Literal["adapter", "model", "own"] = "adapter"
    """Saved form: a plain PEFT folder, a whole transformers model, or an adapter folder in our own
    form, which `tlora.load_adapter` reads and which cannot be exported or merged."""
    saved: str = "LoRA of rank r"
    """Description of the saved form: PEFT's type of adapter and its rank."""
    merges: bool = True
    """Whether PEFT merges the saved adapter into the base weights."""


@dataclass(kw_only=True)
class Prepared:
    """A model ready to train, with the settings for its trainer."""

    model: torch.nn.Module
    """The model to train, usually a `peft.PeftModel`."""
    plan: Plan | None = None
    """Decisions made before training, if any: saved with the run, and passed to `Method.prepare`
    when the run is resumed."""
    callbacks: list[TrainerCallback] = field(default_factory=list)
    """Callbacks that guard the method's invariants during training."""
    trainer_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the trainer's constructor."""
    optimizer: Callable[[torch.nn.Module, Any], torch.optim.Optimizer] | None = None
    """Makes the optimizer from the model and the training arguments, for a method with its own
    parameter groups; by default the trainer makes it. The schedule multiplies every group's
    learning rate."""
    writer: Callable[[Path], None] | None = None
    """Writes the result into a folder, for a method whose model is not saved as an adapter."""

    def save(self, folder: Path) -> None:
        """Write the trained result into ``folder``: a plain PEFT adapter (of `full`: the model)."""
        if self.writer is not None:
            self.writer(folder)
        else:
            from tlora.adapter.stock import save_adapter

            save_adapter(self.model, folder)


class Method(Protocol):
    """A way to adapt a model: a class with these members, registered by name."""

    options: type
    """The options record: a dataclass with a `task_type` field that validates itself."""
    traits: Traits
    """The method's properties."""

    def prepare(
        self,
        model: torch.nn.Module,
        options: Any,
        batches: Batches,
        plan: Any = None,
    ) -> Prepared:
        """Adapt a freshly loaded ``model``.

        A resumed run calls this again before its checkpoint is loaded. Every decision and random
        draw here must then be repeated: from ``plan``, from torch's seeded generator, or
        from the checkpoint.

        Args:
            model: the base model; it may be changed in place.
            options: an instance of `self.options`.
            batches: the calibration batches, exactly as in training: dicts of the model's forward
                arguments (tensors), often as `Samples`. Only methods that calibrate read them.
            plan: the plan of an earlier call, saved by the run; it is used unchanged, without
                calibration.

        Raises:
            ConfigError: no module matches, or the method cannot adapt one (its kind, its size, its
                storage); nothing is changed.
            CalibrationError: there are no batches, or they are unsuitable.
        """
        ...


@runtime_checkable
class Plans(Protocol):
    """A method that decides everything from the base model, so it can adapt a sharded one.

    Given the plan, `Method.prepare` needs no weights.
    """

    def plan(self, model: torch.nn.Module, options: Any, batches: Batches) -> AdapterPlan:
        """Return the plan that `Method.prepare` attaches; ``model`` may be sharded."""
        ...
