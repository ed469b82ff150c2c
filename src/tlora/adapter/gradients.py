"""The mean gradient of each target's weight over the calibration batches, by PEFT's LoRA-GA."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tlora.calibration.batches import as_batch
from tlora.calibration.placement import device_of
from tlora.calibration.preserve import undo_after
from tlora.calibration.weights import Target
from tlora.errors import CalibrationError

if TYPE_CHECKING:
    from peft import LoraConfig


def gradients_by_peft(
    model: nn.Module,
    targets: Sequence[Target],
    config: LoraConfig,
    batches: Iterable[Mapping[str, Any]],
) -> dict[str, Tensor]:
    """Return dL/dW (m x d) of each target, the mean over ``batches``; dropout is off.

    The model is restored afterwards, also if a batch raises.

    Args:
        model: the base model.
        targets: its modules.
        config: names the targets, and has a `lora_ga_config`.
        batches: with labels.

    Raises:
        CalibrationError: there is no batch, a loss is missing or not finite, or no gradient
            reaches a module.
    """
    from peft.tuners.lora.loraga import preprocess_loraga

    with undo_after(model), torch.inference_mode(False), warnings.catch_warnings():
        # For modules that read embeddings, which need no gradient.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        preprocess_loraga(model, config, lambda: _backward(model, batches))
        found: dict[str, Any] = {
            t.name: getattr(t.module, "_peft_loraga_grad", None) for t in targets
        }
    missing = [name for name, gradient in found.items() if gradient is None]
    if missing:
        raise CalibrationError(
            f"{missing[0]}: no calibration batch's loss depends on it, so LoRA-GA has "
            "no gradient for it; exclude it by `exclude_modules`."
        )
    conv = {t.name for t in targets if isinstance(t.module, Conv1D)}
    return {n: (g.T if n in conv else g).detach().float() for n, g in found.items()}


def _backward(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
    from tqdm.auto import tqdm

    model.eval()
    device = device_of(model)
    count = 0
    for batch in tqdm(batches, desc="Calibrating", unit=" batches", disable=None):
        loss = getattr(model(**as_batch(batch, device)), "loss", None)
        if loss is None or not loss.isfinite():
            raise CalibrationError(
                f"the loss of batch {count} (counted from 0) is"
                f" {'missing' if loss is None else loss.item()}; check its labels and text, or"
                " calibrate in float32 or bfloat16."
            )
        loss.backward()
        count += 1
    if not count:
        raise CalibrationError("`batches` gave no sample; give at least one batch.")
