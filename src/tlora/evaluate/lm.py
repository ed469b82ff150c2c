"""lm-evaluation-harness' transformers model, with replies independent of batching.

`HFLM` sorts prompts by length, pads them on the left and generates with a KV cache. This class
changes the following: it tokenizes each prompt separately and as in training (without a closing
token); ends each row at its own stop sequence; counts only the new tokens of an encoder-decoder;
ignores the checkpoint's generation settings for greedy replies; computes likelihoods in float32;
and never passes labels, because some adapters cannot compute a loss outside training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from lm_eval.models.huggingface import HFLM

from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.loading import unheard
from tlora.models.greedy import end_tokens, greedy

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


class TransformersLM(HFLM):
    """A loaded model, wrapped for the harness.

    Args:
        model: a transformers model or a PeftModel, on its device.
        tokenizer: its tokenizer; a missing padding token is set.
        config: batch size and maximum length.
        head: "causal" or "seq2seq".
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, config: EvalConfig, head: str
    ) -> None:
        self.truncated = 0
        with unheard("lm_eval"), _tied_already(model):  # it warns about preloaded models
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                backend=head,
                batch_size=config.batch_size,
                max_batch_size=config.max_batch_size,
                max_length=config.max_length,
                softmax_dtype="float32",
            )
        self._closes = head == "causal" and _closes(tokenizer)

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Tokenize a text, keeping an opening token but no closing one."""
        ids: list[int] = super().tok_encode(string, add_special_tokens, **kwargs)
        if self._closes and add_special_tokens is not False and ids[-1:] == [self.eot_token_id]:
            ids = ids[:-1]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self,
        strings: Sequence[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Tokenize each prompt separately and pad; return ids and mask, both (prompts, tokens)."""
        rows = [self.tok_encode(string) for string in strings]
        if left_truncate_len:
            self.truncated += sum(len(row) > left_truncate_len for row in rows)
            rows = [row[-left_truncate_len:] for row in rows]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            real = slice(width - len(row), width) if padding_side == "left" else slice(len(row))
            ids[number, real] = torch.tensor(row, dtype=ids.dtype)
            mask[number, real] = 1
        return ids, mask

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self._count_truncated(requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)

    def _count_truncated(self, requests: Any) -> None:
        if self.backend == "causal":
            most = self.max_length + 1
            self.truncated += sum(len(ctx) + len(cont) > most for _, ctx, cont in requests)

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        if labels is None:
            return super()._model_call(inps)
        decoder = self.model.prepare_decoder_input_ids_from_labels(labels=labels)
        with torch.no_grad():
            return self.model(
                input_ids=inps, attention_mask=attn_mask, decoder_input_ids=decoder
            ).logits

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        new_tokens = max_length - context.shape[1]
        start = context.shape[1] if self.backend == "causal" else 1
        ends = end_tokens(self.model, self.tokenizer)
        alone: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if not generation_kwargs.get("do_sample"):
            generation_kwargs |= {"do_sample": False}
            for name in ("temperature", "top_p", "top_k"):
                generation_kwargs.pop(name, None)
            alone = greedy(self.model, self.tokenizer)
        texts = [text for text in stop if text and text != self.tokenizer.eos_token]
        criteria = [EndOfRows(self.tokenizer, texts, start)] if texts else []
        with alone:
            return self.model.generate(
                input_ids=context,
                max_new_tokens=new_tokens,
                stopping_criteria=transformers.StoppingCriteriaList(criteria),
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=ends or None,
                use_cache=True,
                **generation_kwargs,
            )


class EndOfRows(transformers.StoppingCriteria):
    """Ends each row at a stop sequence in its own reply, independently of other rows.

    Args:
        tokenizer: decodes tokens.
        stop: the stop sequences.
        start: the first column of a reply.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], start: int) -> None:
        self._tokenizer, self._stop, self._start = tokenizer, stop, start
        # A token adds at least one character, or is part of one of at most four bytes.
        self._back = max(len(text.encode()) for text in stop) + 4
        self._ended: list[bool] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return which rows have ended: one boolean per row of ``input_ids``."""
        self._ended = self._ended or [False] * len(input_ids)
        tails = input_ids[:, max(self._start, input_ids.shape[1] - self._back) :].tolist()
        for row, tail in enumerate(tails):
            if not self._ended[row]:
                text = self._tokenizer.decode(tail)
                self._ended[row] = any(stop in text for stop in self._stop)
        return torch.tensor(self._ended, device=input_ids.device)


@contextlib.contextmanager
def _tied_already(model: Any) -> Iterator[None]:
    """Keep `HFLM` from tying the weights again, which fails with an adapted head."""
    model.tie_weights = lambda *_, **__: None
    try:
        yield
    finally:
        del model.tie_weights


def _closes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer appends the EOS token to a text."""
    end = tokenizer.eos_token_id
    return end is not None and tokenizer("a")["input_ids"][-1:] == [end]
