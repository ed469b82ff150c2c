"""Model families, each with samples as they stand alone and the way they are batched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import support

FAMILIES = {
    "llama-right": ("tiny_llama", "right"),
    "llama-left": ("tiny_llama", "left"),
    "gpt2-right": ("tiny_gpt2", "right"),
    "gpt2-left": ("tiny_gpt2", "left"),
    "bert": ("tiny_bert_classifier", "right"),
    "bert-regression": ("tiny_bert_classifier", "right"),
    "bert-multilabel": ("tiny_bert_classifier", "right"),
    "t5": ("tiny_t5", "right"),
    "t5-equal": ("tiny_t5", "right"),
    "bart-classifier": (support.tiny_bart_classifier, "right"),
    "vit": (support.tiny_vit, "right"),
}


@dataclass
class Family:
    model: Any
    samples: list[support.Sample]
    side: str
    config: dict[str, Any]

    def batches(self, size: int) -> list[support.Sample]:
        return support.in_batches(self.samples, size, self.side)


@pytest.fixture(params=list(FAMILIES))
def family(request: Any, family_of: Callable[[str], Family]) -> Family:
    """Every family in turn."""
    return family_of(request.param)


@pytest.fixture
def family_of(request: Any) -> Callable[[str], Family]:
    def make(name: str) -> Family:
        factory, side = FAMILIES[name]
        if isinstance(factory, str):
            factory = request.getfixturevalue(factory)
        kind = {"bert": "SEQ_CLS", "bart": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
        config = {"r": 2, "task_type": kind.get(name.split("-", maxsplit=1)[0])}
        return Family(_build(factory, name), _samples(name), side, config)

    return make


def _build(factory: Callable[..., Any], name: str) -> Any:
    # Weights large enough that attention is far from uniform.
    if name.startswith("t5"):
        return factory(initializer_factor=1.5)
    if name in ("vit", "bart-classifier"):
        return factory()
    overrides: dict[str, Any] = {"initializer_range": 0.2}
    if name == "bert-regression":
        overrides["num_labels"] = 1
    if name == "bert-multilabel":
        overrides |= {"num_labels": 3, "problem_type": "multi_label_classification"}
    return factory(**overrides)


def _samples(name: str) -> Sequence[support.Sample]:
    if name in ("t5", "vit"):
        return support.translated_samples() if name == "t5" else support.image_samples()
    if name == "t5-equal":
        return support.translated_samples(((6, 2), (2, 6), (4, 3), (1, 5), (6, 6)))
    if name == "bart-classifier":
        samples = support.classified_samples()
        for sample in samples:
            sample["input_ids"][:, -1] = 2
        return samples
    if name == "bert-regression":
        return support.labelled_samples(lambda g: torch.randn(1, generator=g))
    if name == "bert-multilabel":
        return support.labelled_samples(lambda g: torch.rand(1, 3, generator=g).round())
    return support.classified_samples() if name == "bert" else support.causal_samples()
