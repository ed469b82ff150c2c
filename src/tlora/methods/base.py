"""What a method is: an options record, and how to turn a base model into one ready to train.

The call order, in `tlora.stages`::

    options = method.options(**fields)                   # flags and YAML, checked at once
    prepared = method.prepare(model, options, batches, plan)   # plan: None, or of a resumed run
    trainer = Trainer(prepared.model, callbacks=prepared.callbacks, **prepared.trainer_kwargs)

Importing a method's file must be cheap: the command line reads its options record for --help.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from transformers import TrainerCallback

    from tlora.adapter.plan import AdapterPlan

Batches = Iterable[Mapping[str, Any]]


@dataclass(kw_only=True)
class Prepared:
    """A model ready to train, and what the trainer must know about it."""

    model: torch.nn.Module
    """The model to train, usually a `peft.PeftModel`."""
    plan: AdapterPlan | None = None
    """What was decided before training, if the method decides anything; saved with the run."""
    callbacks: list[TrainerCallback] = field(default_factory=list)
    """Callbacks that guard the method's invariants while training."""
    trainer_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the trainer's constructor, such as `optimizers` for a method that
    groups its parameters by learning rate."""


class Method(Protocol):
    """A way to adapt a model. A class with these members, registered by name."""

    options: type
    """The options record: a dataclass with a `task_type` field that checks itself when made."""

    def prepare(
        self,
        model: torch.nn.Module,
        options: Any,
        batches: Batches,
        plan: AdapterPlan | None = None,
    ) -> Prepared:
        """Adapt a freshly loaded ``model``.

        A resumed run calls this once more before its checkpoint is loaded. Whatever is decided or
        drawn here must then come out the same: from ``plan``, from torch's seeded generator, or
        from the checkpoint.

        Args:
            model: the base model; it may be changed in place.
            options: an instance of `self.options`.
            batches: the calibration batches, exactly as training will see them: dicts of tensors
                that the model's forward takes. Read only by methods that calibrate.
            plan: what an earlier call has returned and the run has saved; used as it is, and
                nothing is calibrated.
        """
        ...
