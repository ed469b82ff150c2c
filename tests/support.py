"""Small inputs, toy models and an independent definition of the statistics, for several folders."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

VOCABULARY = 160
Sample = dict[str, Any]


@dataclass(frozen=True)
class Expected:
    """What METHOD 2 says of one module, in float64."""

    sensitivity: float
    covariance: Tensor
    uncentred: Tensor
    tokens: int


def one_at_a_time(
    model: nn.Module, samples: Sequence[Sample], names: Iterable[str]
) -> dict[str, Expected]:
    """Follow METHOD 2 to the letter: one sample at a time, weights that require a gradient."""
    model = copy.deepcopy(model).double().eval().requires_grad_(False)
    modules = {name: model.get_submodule(name) for name in names}
    rows: dict[str, list[Tensor]] = {name: [] for name in modules}
    for name, module in modules.items():
        module.weight.requires_grad_(True)
        module.register_forward_hook(
            lambda _, x, kw, __, to=rows[name]: to.append((x[0] if x else kw["input"]).detach()),
            with_kwargs=True,
        )
    sensitivity = dict.fromkeys(modules, 0.0)
    tokens = dict.fromkeys(modules, 0)
    centred: dict[str, Any] = dict.fromkeys(modules, 0.0)
    uncentred: dict[str, Any] = dict.fromkeys(modules, 0.0)
    for sample in samples:
        for seen in rows.values():
            seen.clear()
        model.zero_grad(set_to_none=True)
        loss = model(**as_double(sample)).loss
        if loss.requires_grad:
            loss.backward()
        for name, module in modules.items():
            width = getattr(module, "in_features", None) or module.nx
            x = torch.cat([torch.zeros(0, width), *(r.reshape(-1, width) for r in rows[name])])
            if len(x):
                around = x - x.mean(dim=0)
                centred[name] = centred[name] + around.T @ around / len(samples)
                uncentred[name] = uncentred[name] + x.T @ x / len(samples)
            tokens[name] += len(x)
            if module.weight.grad is not None:
                product = (module.weight * module.weight.grad).abs().mean().item()
                sensitivity[name] += product / len(samples)
    return {
        name: Expected(sensitivity[name], centred[name], uncentred[name], tokens[name])
        for name in modules
    }


def as_double(sample: Sample) -> Sample:
    return {
        key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in sample.items()
    }


def distance(value: Tensor, expected: Tensor) -> float:
    """The relative Frobenius distance; absolute where the expectation is zero."""
    expected = torch.as_tensor(expected, dtype=torch.float64).cpu()
    norm = expected.norm().item() or 1.0
    return (value.double().cpu() - expected).norm().item() / norm


def assert_agrees(stats: Any, expected: dict[str, Expected], tolerance: float = 1e-4) -> None:
    assert list(stats.modules) == list(expected)
    for name, module in stats.modules.items():
        want = expected[name]
        assert module.tokens == want.tokens, name
        assert abs(module.sensitivity - want.sensitivity) <= tolerance * want.sensitivity, name
        assert distance(module.covariance(), want.covariance) < tolerance, name
        assert distance(module.uncentred(), want.uncentred) < tolerance, name


def ids(length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(3, VOCABULARY, (1, length), generator=generator)


def causal_samples(lengths: Sequence[int] = (7, 3, 10, 5, 2), seed: int = 0) -> list[Sample]:
    """Texts whose first third is a prompt, masked in the labels."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for length in lengths:
        text = ids(length, generator)
        labels = text.clone()
        labels[:, : length // 3] = -100
        mask = torch.ones_like(text)
        samples.append({"input_ids": text, "attention_mask": mask, "labels": labels})
    return samples


def labelled_samples(
    label: Callable[[torch.Generator], Tensor], lengths: Sequence[int] = (7, 1, 10, 5, 3)
) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    samples = []
    for length in lengths:
        text = ids(length, generator)
        samples.append(
            {
                "input_ids": text,
                "attention_mask": torch.ones_like(text),
                "labels": label(generator),
            }
        )
    return samples


def classified_samples(lengths: Sequence[int] = (7, 1, 10, 5, 3)) -> list[Sample]:
    return labelled_samples(lambda g: torch.randint(0, 2, (1,), generator=g), lengths)


def translated_samples(
    lengths: Sequence[tuple[int, int]] = ((7, 4), (3, 9), (10, 2), (5, 6), (2, 1)),
) -> list[Sample]:
    generator = torch.Generator().manual_seed(2)
    samples = []
    for source, target in lengths:
        text = ids(source, generator)
        mask, labels = torch.ones_like(text), ids(target, generator)
        samples.append({"input_ids": text, "attention_mask": mask, "labels": labels})
    return samples


def image_samples(count: int = 5) -> list[Sample]:
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "pixel_values": torch.randn(1, 3, 8, 8, generator=generator),
            "labels": torch.randint(0, 2, (1,), generator=generator),
        }
        for _ in range(count)
    ]


def padded(samples: Sequence[Sample], side: str = "right", length: int = 0) -> Sample:
    """Join samples into one batch: padding of 0, labels of -100, positions where on the left."""
    batch = {}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        if values[0].dim() == 2 and values[0].dtype == torch.long:
            columns = max(length, *(value.shape[1] for value in values))
            fill = -100 if key == "labels" else 0
            values = [_pad(value, columns, fill, side) for value in values]
        batch[key] = torch.cat(values)
    if side == "left":
        mask = batch["attention_mask"]
        batch["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)
    return batch


def _pad(value: Tensor, columns: int, fill: int, side: str) -> Tensor:
    missing = columns - value.shape[1]
    return nn.functional.pad(
        value, (missing, 0) if side == "left" else (0, missing), value=float(fill)
    )


def in_batches(samples: Sequence[Sample], size: int, side: str = "right") -> list[Sample]:
    return [padded(samples[i : i + size], side) for i in range(0, len(samples), size)]


def seeded(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().float().eval()


def tiny_vit(**overrides: Any) -> Any:
    fields = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "num_labels": 2,
        "initializer_range": 0.2,
    }
    config = transformers.ViTConfig(**(fields | overrides))
    return seeded(lambda: transformers.ViTForImageClassification(config))


def tiny_bart_classifier() -> Any:
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        num_labels=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        init_std=0.2,
    )
    return seeded(lambda: transformers.BartForSequenceClassification(config))


class Toy(nn.Module):
    """Base of the toy classifiers: `encode` maps B x T x 8 to B x T x 8, then a masked mean.

    The loss is the mean over samples; the name of a subclass says so, as transformers' names do.
    """

    width = 8

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(self.width, self.width)
        self.head = nn.Linear(self.width, 3)

    def encode(self, x: Tensor, **_: Any) -> Tensor:
        return self.first(x).tanh()

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **extra: Any,
    ) -> SequenceClassifierOutput:
        hidden = self.encode(inputs_embeds, **extra)
        keep = torch.ones_like(hidden[..., :1])
        if attention_mask is not None:
            keep = attention_mask[..., None].to(hidden.dtype)
        # where: a model does not look at what stands in the padding.
        hidden = torch.where(keep != 0, hidden, torch.zeros_like(hidden))
        logits = self.head(hidden.sum(dim=1) / keep.sum(dim=1))
        loss = None if labels is None else self.loss(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, labels)


def toy_samples(lengths: Sequence[int] = (4, 1, 6, 3), seed: int = 4) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "inputs_embeds": torch.randn(1, length, Toy.width, generator=generator) + 1.0,
            "attention_mask": torch.ones(1, length, dtype=torch.long),
            "labels": torch.randint(0, 3, (1,), generator=generator),
        }
        for length in lengths
    ]


def toy_batch(samples: Sequence[Sample], fill: float = 0.0) -> Sample:
    """Join toy samples, padded on the right by ``fill``."""
    columns = max(s["inputs_embeds"].shape[1] for s in samples)
    padding = [columns - s["inputs_embeds"].shape[1] for s in samples]
    pad = nn.functional.pad
    return {
        "inputs_embeds": torch.cat(
            [
                pad(s["inputs_embeds"], (0, 0, 0, p), value=fill)
                for s, p in zip(samples, padding, strict=True)
            ]
        ),
        "attention_mask": torch.cat(
            [pad(s["attention_mask"], (0, p)) for s, p in zip(samples, padding, strict=True)]
        ),
        "labels": torch.cat([s["labels"] for s in samples]),
    }
