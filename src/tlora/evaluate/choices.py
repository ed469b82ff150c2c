"""Multiple choice by likelihood, with probabilities averaged by a Laplace approximation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.instance import Instance
from tqdm import tqdm

from tlora.calibration.kfac import ScoredBatch
from tlora.evaluate.laplace import Laplace
from tlora.evaluate.lm import TransformersLM

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from tlora.evaluate.evalconfig import EvalConfig
    from tlora.evaluate.evaluated_models import EvaluatedModel

_BATCH = 8

Choice = tuple[list[int], list[int]]
"""Tokens of the context and of its continuation."""


class LaplaceLM(TransformersLM):
    """A causal model with an adapter, whose choice likelihoods are Laplace averages.

    Args:
        model: the adapter on its base.
        tokenizer: its tokenizer.
        config: batch size, maximum length and seed.
        evaluated: the adapter.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        config: EvalConfig,
        evaluated: EvaluatedModel,
    ) -> None:
        super().__init__(model, tokenizer, config, evaluated.head)
        self._laplace = Laplace(evaluated, model, config.seed)
        self._size = config.batch_size if isinstance(config.batch_size, int) else _BATCH
        self._fits, self._docs = False, [0]

    def fit(self, requests: list[Instance]) -> None:
        """Fit the approximation to the requests of a task's training items."""
        before = self.truncated
        self._fits = True
        self.loglikelihood(requests, disable_tqdm=True)
        self._fits, self.truncated = False, before

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return the averaged log-likelihood of each choice, grouped by doc."""
        self._docs = [request.doc_id for request in requests]
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self._count_truncated(requests)
        pairs = zip(self._docs, requests, strict=True)
        items = [
            [(context, following) for _, (_, context, following) in group]
            for _, group in groupby(pairs, key=lambda pair: pair[0])
        ]
        starts = tqdm(range(0, len(items), self._size), desc="laplace", disable=None)
        batches = (self._batch(items[start : start + self._size]) for start in starts)
        if self._fits:
            self._laplace.fit(batches)
            return []
        found = [logits for batch in batches for logits in self._laplace.logits(batch)]
        return [(value, False) for logits in found for value in logits.tolist()]

    def _batch(self, items: Sequence[Sequence[Choice]]) -> ScoredBatch:
        """Return the choices as sequences, each scored by the likelihood of its continuation."""
        choices = [choice for item in items for choice in item]
        rows = [(context + end)[-(self.max_length + 1) :][:-1] for context, end in choices]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
            mask[number, : len(row)] = 1

        def scores(output: Any) -> Tensor:
            found = []
            for logits, row, (_, end) in zip(output.logits, rows, choices, strict=True):
                chances = logits[len(row) - len(end) : len(row)].float().log_softmax(dim=-1)
                found.append(chances.gather(1, torch.tensor(end, device=logits.device)[:, None]))
            return torch.stack([each.sum() for each in found])[:, None]

        inputs = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        return ScoredBatch(inputs, scores, [len(item) for item in items])
