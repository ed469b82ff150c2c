"""Reads a user's batch: number of samples, mask of real tokens, weight of each sample's loss.

A batch of B padded samples must give the same result as the samples one at a time. Two facts make
that possible in one pass:

- each row of a module's input belongs to a known sample and token (`TokenLayout`), and
- the model's loss is a mean over labels, so the gradient of sample s's own loss is the gradient of
  the batch's loss at the rows of s, times (labels in the batch) / (labels of s) (`loss_weights`).

If either is unknown, `single_samples` splits the batch, which is always correct but slower.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tlora.calibration.placement import class_name
from tlora.calibration.weights import has_layout
from tlora.errors import CalibrationError

Batch = Mapping[str, Any]

_IGNORED_LABEL = -100
# Models whose loss is a mean over samples, and causal models without a loss type in transformers.
_PER_SAMPLE = tuple(f"{kind}Classification" for kind in ("Sequence", "Image", "Audio", "Video"))
_CAUSAL = ("GPT2LMHeadModel", "OpenAIGPTLMHeadModel", "CTRLLMHeadModel", "BertLMHeadModel")
_SAMPLE_KEYS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values")


class UnknownLayout(Exception):
    """A module's input cannot be split into samples; internal: single samples are tried next."""


class BadSamples(Exception):
    """Samples that cannot be used; internal: raises or skips them.

    Attributes:
        rows: their rows in the micro-batch.
        reason: a few words, such as "its loss is nan".
        sentence: the whole error, with {} for the sample.
    """

    def __init__(self, rows: list[int], reason: str, sentence: str) -> None:
        super().__init__(reason)
        self.rows = rows
        self.reason = reason
        self.sentence = sentence


def numbered(first: int, count: int) -> str:
    """Return "samples 4 to 7 (counted from 0)"."""
    samples = f"sample {first}" if count == 1 else f"samples {first} to {first + count - 1}"
    return f"{samples} (counted from 0)"


def as_batch(batch: Any, device: torch.device) -> dict[str, Any]:
    """Return a batch as a dict with its tensors on ``device``.

    Raises:
        CalibrationError: it is not a mapping, or holds no tensor.
    """
    if not isinstance(batch, Mapping):
        raise CalibrationError(
            f"a calibration batch is a {type(batch).__name__}; give dicts of the model's "
            "forward arguments (input_ids, attention_mask, labels, ...)."
        )
    moved: dict[str, Any] = {key: _to_device(value, device) for key, value in batch.items()}
    ids = moved.get("input_ids")
    if isinstance(ids, Tensor) and ids.dim() < 2:
        raise CalibrationError(
            f"input_ids has the shape {tuple(ids.shape)}; give samples x tokens (for one "
            "sample input_ids[None])."
        )
    if not any(isinstance(value, Tensor) for value in moved.values()):
        raise CalibrationError(
            f"a calibration batch with the keys {sorted(moved)} holds no tensor; let the "
            'tokenizer or collator return tensors (return_tensors="pt").'
        )
    return moved


def _to_device(value: Any, device: torch.device) -> Any:
    """Return ``value`` with the tensors in it, and in its lists and dicts, on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_to_device(item, device) for item in value)
    return value


def batch_size(batch: Batch) -> int:
    """Return B, the first dimension of the batch's inputs."""
    for key in _SAMPLE_KEYS:
        if isinstance(inputs := batch.get(key), Tensor):
            return inputs.shape[0]
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    return next((value.shape[0] for value in tensors if value.dim() > 0), 1)


def real_tokens(batch: Any) -> int:
    """Return how many real tokens (of the encoder, or rows of a first layer) a batch has."""
    tensors = {}
    if isinstance(batch, Mapping):
        tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    if "attention_mask" in tensors:
        return int((tensors["attention_mask"] != 0).sum())
    if "input_ids" in tensors:
        return tensors["input_ids"].numel()
    floating = (value for value in tensors.values() if value.is_floating_point())
    return next((value.shape[:-1].numel() for value in floating), 0)


def loss_weights(batch: Batch, model: nn.Module) -> Tensor | None:
    """Return (labels in the batch) / (labels of s) for each sample, B float32.

    Not finite for a sample without counted labels. None if the way this model's loss weighs its
    samples is unknown. Causal models score the label at position t + 1 from position t, so the
    first label of a sample never counts (`scored_from_tokens`).
    """
    labels = batch.get("labels")
    size = batch_size(batch)
    if getattr(getattr(model, "config", None), "output_router_logits", False):
        return None  # The load-balancing loss of experts is not a mean over labels.
    if not isinstance(labels, Tensor) or labels.shape[:1] != (size,):
        return None
    if any(kind in class_name(model) for kind in _PER_SAMPLE):
        if labels.is_floating_point() or labels.numel() != size or _regresses(model):
            return torch.full((size,), float(size), device=labels.device)
        counted = labels.reshape(size, 1) != _IGNORED_LABEL
    elif (first := _first_scored(model)) is not None:
        counted = (labels[:, first:] != _IGNORED_LABEL).flatten(1)
    else:
        return None
    return counted.sum() / counted.sum(dim=1)


def checked_weights(weights: Tensor | None) -> Tensor:
    """Return the weights of the samples' losses (`loss_weights`); 1 where unknown.

    Raises:
        BadSamples: some samples have no counted label.
    """
    if weights is None:
        return torch.ones(1)
    if empty := (~weights.isfinite()).nonzero().flatten().tolist():
        raise BadSamples(
            empty,
            "it has no label that counts",
            "{} has no label that counts: every label is -100, so its loss is undefined; "
            "skip it (skip_bad_samples) or truncate less.",
        )
    return weights


def scored_from_tokens(batch: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the batch without labels that a causal model would score from a padding token.

    With left padding, that is the first label of each sample, which a single unpadded sample does
    not score. Ignoring its gradient at the padding rows would be wrong: under eager attention a
    padding token attends to real ones.
    """
    labels, mask = batch.get("labels"), encoder_mask(batch)
    if not isinstance(labels, Tensor) or mask is None or mask.shape != labels.shape:
        return batch
    if _first_scored(model) != 1:
        return batch
    labels = labels.clone()
    labels[:, 1:][~mask[:, :-1].to(labels.device)] = _IGNORED_LABEL
    return batch | {"labels": labels}


def _first_scored(model: nn.Module) -> int | None:
    """Return the position of the first label that counts in a loss over tokens; None: unknown."""
    loss_type = getattr(model, "loss_type", None)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return 0
    if loss_type in ("ForCausalLM", "ForConditionalGeneration") or class_name(model) in _CAUSAL:
        return 1
    return 0 if loss_type in ("ForMaskedLM", "ForTokenClassification") else None


def _regresses(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return getattr(config, "problem_type", None) == "regression" or (
        getattr(config, "num_labels", None) == 1
    )


def encoder_mask(batch: Batch) -> Tensor | None:
    """Return the B x T mask of the batch's (encoder) tokens; None if all are real.

    Raises:
        CalibrationError: the attention mask is not two-dimensional.
    """
    mask = batch.get("attention_mask")
    if mask is None or not isinstance(mask, Tensor):
        return None
    if mask.dim() != 2:
        raise CalibrationError(
            f"attention_mask has the shape {tuple(mask.shape)}; calibration needs one entry "
            "per token (samples x tokens) to tell padding from text."
        )
    return mask != 0


def decoder_mask(batch: Batch) -> Tensor | None:
    """Return the B x T mask of the decoder's tokens of an encoder-decoder model.

    Without ``decoder_attention_mask`` the decoder's inputs are the labels shifted right, so tokens
    up to a sample's last label are real. A classifier's decoder reads the encoder's tokens.
    """
    mask = batch.get("decoder_attention_mask")
    if isinstance(mask, Tensor):
        return mask != 0
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return None if "decoder_input_ids" in batch else encoder_mask(batch)
    kept = (labels != _IGNORED_LABEL).int()
    return kept.flip(1).cummax(dim=1).values.flip(1) != 0


@dataclass
class TokenLayout:
    """Maps rows of a module's input to the real tokens of each sample, for one batch.

    Attributes:
        size: B.
        mask: mask of the encoder's (or only) tokens, B x T; None: all real.
        decoder: mask of the decoder's tokens, if there is a decoder.
        decoder_modules: the modules inside the decoder, by identity.
        routed: the modules inside experts, by identity; routing decides which rows they get.
        encoded: memory address of the encoder's output (read by cross attention).
    """

    size: int
    mask: Tensor | None
    decoder: Tensor | None = None
    decoder_modules: frozenset[int] = frozenset()
    routed: frozenset[int] = frozenset()
    encoded: int | None = None
    _padded: dict[int, bool] = field(default_factory=dict)
    _copies: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)

    def mask_on(self, mask: Tensor, device: torch.device) -> Tensor:
        """Return a mask on a device; all modules there share the same tensor."""
        key = id(mask), device
        if key not in self._copies:
            self._copies[key] = mask.to(device)
        return self._copies[key]

    def split(self, module: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return a module's input as B x T x d with its token mask (B x T, or None: all real).

        Raises:
            UnknownLayout: the rows cannot be assigned (an expert that routing feeds).
        """
        mask = self.mask
        in_decoder = id(module) in self.decoder_modules
        if in_decoder and inputs.data_ptr() != self.encoded:
            mask = self.decoder
        padded = self._is_padded(mask)
        if self.size == 1 and not padded:
            return inputs.reshape(1, -1, inputs.shape[-1]), None
        if inputs.dim() == 1 or id(module) in self.routed:
            raise UnknownLayout
        if inputs.dim() == 2:
            return self._split_rows(inputs, mask)
        if inputs.shape[0] != self.size:
            raise UnknownLayout
        tokens = inputs.flatten(1, -2)
        if mask is None or tokens.shape[1] == mask.shape[1]:
            return tokens, mask if padded else None
        raise UnknownLayout

    def _is_padded(self, mask: Tensor | None) -> bool:
        # Checked once per batch, not once per module: each check synchronizes with an accelerator.
        if mask is not None and id(mask) not in self._padded:
            self._padded[id(mask)] = not bool(mask.all())
        return mask is not None and self._padded[id(mask)]

    def _split_rows(self, rows: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if mask is not None and len(rows) == mask.numel():
            tokens = rows.reshape(self.size, -1, rows.shape[-1])
            return tokens, mask if self._is_padded(mask) else None
        if len(rows) == self.size:
            # A pooler or head: one row per sample, taken from a real token.
            return rows[:, None], None
        raise UnknownLayout


def token_layout(batch: Batch, model: nn.Module) -> TokenLayout:
    """Return the layout of a batch for ``model``, before its forward pass."""
    routed = frozenset(
        id(module)
        for name, module in model.named_modules()
        # Fused experts get all rows, and so do shared ones.
        if "expert" in name and "shared" not in name and not has_layout(module)
    )
    layout = TokenLayout(batch_size(batch), encoder_mask(batch), routed=routed)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        encoder = set(map(id, model.get_encoder().modules()))  # type: ignore[operator]
        inside = {id(module) for module in model.modules()} - encoder
        layout.decoder, layout.decoder_modules = decoder_mask(batch), frozenset(inside)
    return layout


def single_samples(batch: Batch, model: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield the batch's samples one at a time, without padding."""
    size = batch_size(batch)
    layout = token_layout(batch, model)
    for index in range(size):
        sample = {
            key: value[index : index + 1]
            if isinstance(value, Tensor) and value.shape[:1] == (size,)
            else value
            for key, value in batch.items()
        }
        encoder = _real_span(layout.mask, index)
        decoder = _real_span(layout.decoder, index)
        for key, value in sample.items():
            in_decoder = layout.decoder is not None and _is_decoder_key(key)
            mask, span = (layout.decoder, decoder) if in_decoder else (layout.mask, encoder)
            if mask is None or not isinstance(value, Tensor) or value.dim() < 2:
                continue
            if value.shape[1] == mask.shape[1]:
                sample[key] = value[:, span]
        yield sample


def _is_decoder_key(key: str) -> bool:
    return key == "labels" or key.startswith("decoder_")


def _real_span(mask: Tensor | None, index: int) -> slice:
    """Return the columns from a sample's first to its last real token."""
    if mask is None:
        return slice(None)
    real = mask[index].nonzero()
    return slice(int(real[0]), int(real[-1]) + 1) if len(real) else slice(0, 0)
