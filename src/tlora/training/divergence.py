"""Stops a training that has diverged, names the step, and prevents saving.

A step is bad if its loss or its gradient norm is not finite. Under `fp16` the loss scaler skips bad
steps and lowers its scale, so a bad step alone does not stop a run. It stops if

- the weights are not finite: no later step repairs them;
- `RECOVERY_STEPS` steps in a row are bad;
- the training ends with a loss that is not finite, or without a good step.

Losses and norms stay on their device. They are read together every `READ_STEPS` steps, and when the
trainer logs, evaluates or saves, so that steps do not synchronize; the reported step is still
exact.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import TrainerCallback

from tlora.calibration.group import process_group
from tlora.calibration.placement import is_dtensor, local_part
from tlora.errors import DivergenceError
from tlora.linalg.matrices import not_finite

RECOVERY_STEPS = 20
"""Consecutive bad steps that end a training with finite weights. The loss scale of `fp16` starts at
2^16 and is halved at each bad step: 16 steps bring it down to 1."""

READ_STEPS = 10
"""Maximum number of steps between reads of losses and norms."""


def diverged(what: str, args: Any, step: int) -> DivergenceError:
    """Return the error of a diverged training, with advice.

    Args:
        what: where the divergence shows, and how.
        args: the training arguments.
        step: the first bad step.
    """
    return DivergenceError(
        f"training diverged {what}. Start a new run with a lower learning rate "
        f"(now {args.learning_rate:g}), or in float32 or bfloat16 if this was "
        "float16.",
        step=step,
    )


class DivergenceCallback(TrainerCallback):
    """Watches the losses, gradient norms and weights of a trainer's steps."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._loss: Any = 0.0
        self._norm: Any = None
        self._unread: list[tuple[int, Any, Any]] = []
        self._first: tuple[int, str] | None = None
        self._streak = 0
        self._bad_loss = False

    def watch(self, trainer: Any) -> None:
        """Record the loss and the gradient norm of every step of ``trainer``.

        The trainer passes neither to its callbacks, and excludes losses that are not finite from
        its logged mean.
        """
        trainer.add_callback(self)
        step, clip = trainer.training_step, trainer.accelerator.clip_grad_norm_

        @functools.wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            loss = step(*args, **kwargs)
            self._loss = self._loss + loss
            return loss

        @functools.wraps(clip)
        def clip_grad_norm_(*args: Any, **kwargs: Any) -> Any:
            norm = clip(*args, **kwargs)
            self._norm = norm.full_tensor() if is_dtensor(norm) else norm
            return self._norm

        trainer.training_step = training_step
        trainer.accelerator.clip_grad_norm_ = clip_grad_norm_

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Clear the state of an earlier start."""
        self._reset()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        """Keep the step's values; read all kept values at intervals."""
        self._unread.append((state.global_step, self._loss, self._norm))
        self._loss, self._norm = 0.0, None
        due = control.should_log or control.should_evaluate or control.should_save
        if due or control.should_training_stop or len(self._unread) >= READ_STEPS:
            self._check(args, state, model, control.should_save, control.should_training_stop)

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        """Check before an epoch's evaluation and checkpoint."""
        if control.should_evaluate or control.should_save:
            self._check(args, state, model, control.should_save)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        """Check before the result is saved."""
        self._check(args, state, model, saves=True, ends=True)

    def _check(
        self, args: Any, state: Any, model: Any, saves: bool = False, ends: bool = False
    ) -> None:
        """Raise on every process of a group if the training has diverged.

        Raises:
            DivergenceError: the training has diverged.
        """
        self._read()
        group = process_group()
        trained = {n: local_part(p) for n, p in model.named_parameters() if p.requires_grad}
        bad = not_finite(trained) if saves or self._streak else []
        [lost] = group.all_reduce_max([len(bad)])
        unrecovered = self._streak >= RECOVERY_STEPS
        if ends and self._streak:
            unrecovered |= self._bad_loss or self._streak == state.global_step
        if not (lost or unrecovered):
            return
        step, what = self._first or (state.global_step, "")
        faults = [f"the {what} is not finite"] if what else []
        faults += [f"{lost} of {len(trained)} trained tensors are not finite"] if lost else []
        raise diverged(f"at step {step}: {' and '.join(faults)}", args, step)

    def _read(self) -> None:
        """Read the unread steps and count consecutive bad ones."""
        if not self._unread:
            return
        _, last, _ = self._unread[-1]
        pairs = torch.stack(
            [
                torch.as_tensor(value, dtype=torch.float32, device=last.device).reshape(())
                for _, loss, norm in self._unread
                # DeepSpeed may report no norm.
                for value in (loss, loss if norm is None else norm)
            ]
        )
        flags = process_group().all_reduce_max((~pairs.isfinite()).int().tolist())
        for (step, _, _), loss, norm in zip(self._unread, flags[::2], flags[1::2], strict=True):
            self._bad_loss = bool(loss)
            if not (loss or norm):
                self._streak, self._first = 0, None
                continue
            self._streak += 1
            self._first = self._first or (step, "loss" if loss else "gradient norm")
        self._unread = []
