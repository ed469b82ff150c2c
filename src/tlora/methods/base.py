"""What a method is: an options record, what it promises, and how to make a base model ready.

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
    """Calibration batches that say how they are to be read; iterates over the batches."""

    batches: Batches
    """Dicts of tensors that the model's forward takes."""
    skip_bad_samples: bool = False
    """Leave samples out that cannot count, where the method looks."""
    cache: str | None = None
    """File of the statistics, for a method that keeps some."""

    @classmethod
    def of(cls, batches: Batches) -> Samples:
        """Return ``batches`` as `Samples`: themselves, if they are."""
        return batches if isinstance(batches, cls) else cls(batches)

    @property
    def reading(self) -> CalibrateOptions:
        """How they are to be read, as keywords of `tlora.calibrate`."""
        return {"skip_bad_samples": self.skip_bad_samples, "cache": self.cache}

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.batches)


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a method is and promises. Tables show it, and the contract tests hold it to it.

    Said of the method at its default options.
    """

    title: str
    """Title of its paper."""
    arxiv: str | None
    """The paper's number on arXiv, if it is there."""
    year: int
    """Of the paper."""
    formula: str
    """The adapted layer, in one line of plain text."""
    trains: tuple[str, ...]
    """A part of the name of each kind of parameter that trains; "" means all parameters. New
    heads (`modules_to_save`) and biases train beside them."""
    parameters: str
    """Trained numbers of an m x d module, as a formula in m, d and the options."""
    start: Literal["identical", "rounding", "moved"]
    """The output before the first step: the base's to the bit, or up to rounding, or already moved
    by what the adapter starts from."""
    changes_base: bool = False
    """Whether the base weights differ from the loaded ones while training. The saved adapter fits
    the loaded ones all the same."""
    reads: Literal["nothing", "inputs", "gradients"] = "nothing"
    """What of the calibration batches is used before training; gradients include inputs."""
    pools: bool = False
    """Whether the ranks of a process group may each be given a share of the calibration batches,
    because what they see is added up; else every rank gets all of them."""
    source: Literal["PEFT", "tlora"] = "PEFT"
    """Whose code the method's own step is."""
    learning_rates: LearningRates
    """What it starts from where the user gives no learning rate."""
    leaves: Literal["adapter", "model", "own"] = "adapter"
    """What is saved: a plain PEFT folder, a whole transformers model, or an adapter folder of our
    own form, which `tlora.load_adapter` reads and nothing exports or merges."""
    saved: str = "LoRA of rank r"
    """What that is: PEFT's type of adapter and its rank."""
    merges: bool = True
    """Whether PEFT merges the saved adapter into the base weights."""


@dataclass(kw_only=True)
class Prepared:
    """A model ready to train, and what the trainer must know about it."""

    model: torch.nn.Module
    """The model to train, usually a `peft.PeftModel`."""
    plan: Plan | None = None
    """What was decided before training, if anything is: saved with the run, and given back to
    `Method.prepare` when the run is resumed."""
    callbacks: list[TrainerCallback] = field(default_factory=list)
    """Callbacks that guard the method's invariants while training."""
    trainer_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the trainer's constructor."""
    optimizer: Callable[[torch.nn.Module, Any], torch.optim.Optimizer] | None = None
    """Makes the optimizer from the model and the training arguments, for a method that groups its
    parameters; by default the trainer makes its own. The schedule multiplies every group's rate."""
    writer: Callable[[Path], None] | None = None
    """Writes the result into a folder, for a method whose model does not save itself plainly."""

    def save(self, folder: Path) -> None:
        """Write the trained result into ``folder``: a plain PEFT adapter (of `full`: the model)."""
        if self.writer is not None:
            self.writer(folder)
        else:
            config = getattr(self.model, "peft_config", {}).get("default")
            # Rows that train are saved as such; PEFT would add all others of a longer embedding.
            rows = getattr(config, "trainable_token_indices", None) is not None
            more = {"save_embedding_layers": False} if rows else {}
            self.model.save_pretrained(folder, **more)  # type: ignore[operator]


class Method(Protocol):
    """A way to adapt a model. A class with these members, registered by name."""

    options: type
    """The options record: a dataclass with a `task_type` field that checks itself when made."""
    traits: Traits
    """What the method is and promises."""

    def prepare(
        self,
        model: torch.nn.Module,
        options: Any,
        batches: Batches,
        plan: Any = None,
    ) -> Prepared:
        """Adapt a freshly loaded ``model``.

        A resumed run calls this once more before its checkpoint is loaded. Whatever is decided or
        drawn here must then come out the same: from ``plan``, from torch's seeded generator, or
        from the checkpoint.

        Args:
            model: the base model; it may be changed in place.
            options: an instance of `self.options`.
            batches: the calibration batches, exactly as training will see them: dicts of tensors
                that the model's forward takes, often as `Samples`. Read only by methods that
                calibrate.
            plan: what an earlier call has returned and the run has saved; used as it is, and
                nothing is calibrated.

        Raises:
            ConfigError: no module matches, or the method cannot adapt one (its kind, its size, how
                it is stored); nothing is changed.
            CalibrationError: there are no batches, or they do not do.
        """
        ...


@runtime_checkable
class Plans(Protocol):
    """A method that decides all from the base model, so that it can adapt one in parts.

    `Method.prepare` needs no weights when it is given the plan.
    """

    def plan(self, model: torch.nn.Module, options: Any, batches: Batches) -> AdapterPlan:
        """Return what `Method.prepare` attaches; ``model`` may be sharded over processes."""
        ...
