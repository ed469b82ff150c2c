"""Exact match of a comparison's run: the model writes its answer, right to the letter or wrong.

Works on tokenised rows, so on whatever a causal task makes of its rows and on any part of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tlora.errors import DataError
from tlora.models.greedy import greedy
from tlora.tasks.tokens import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def exact_match(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Dataset, batch_size: int
) -> float:
    """Return the share of ``rows`` whose response the model writes exactly, white space aside.

    Written greedily, by as many tokens as the longest response has, without penalties or beams that
    the model's generation config asks for; special tokens, of which the closing one ends an answer,
    are not compared.

    Args:
        model: a causal model, or one with an adapter; in evaluation mode only in here.
        rows: "input_ids" and "labels" of a prompt with its response each.
        batch_size: rows at a time.

    Raises:
        DataError: a row is no prompt with one response after it.
    """
    import torch

    pairs = [prompt_and_response(row) for row in rows]
    longest = max(len(response) for _, response in pairs)
    right = 0
    with greedy(model, tokenizer), _evaluating(model), torch.no_grad():
        for start in range(0, len(pairs), batch_size):
            some = pairs[start : start + batch_size]
            batch = _padded_left([prompt for prompt, _ in some], tokenizer.pad_token_id)
            tokens = model.generate(
                **{name: torch.tensor(value).to(model.device) for name, value in batch.items()},
                max_new_tokens=longest,
            )
            new = tokens[:, len(batch["input_ids"][0]) :]
            right += sum(
                written.strip() == wanted.strip()
                for written, wanted in zip(
                    tokenizer.batch_decode(new, skip_special_tokens=True),
                    tokenizer.batch_decode([r for _, r in some], skip_special_tokens=True),
                    strict=True,
                )
            )
    return right / len(pairs)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Keep a model in evaluation mode, and put it back into its own afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def prompt_and_response(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Return the token ids of a row up to the first that is learnt, and those from there on.

    Raises:
        DataError: there is no prompt, or something after the response that is not learnt.
    """
    ids, learnt = row["input_ids"], [label != IGNORED for label in row["labels"]]
    start = learnt.index(True)
    if start == 0 or not all(learnt[start:]):
        raise DataError(
            "exact match needs rows of a prompt with one response, the prompt left out of the loss;"
            ' compare plain text and chats by `metric: loss`, and leave `data.loss_on` "response".'
        )
    return [*ids[:start]], [*ids[start:]]


def check_rows(
    rows: Dataset, name: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> None:
    """Check that every row is a prompt with one whole response.

    A row is taken for cut if it has ``max_length`` tokens and does not end in the closing one.

    Raises:
        DataError: a row is something else, or the responses of some are cut.
    """
    cut = 0
    for row in rows:
        prompt_and_response(row)
        ids = row["input_ids"]
        cut += len(ids) >= max_length and ids[-1] != tokenizer.eos_token_id
    if cut:
        raise DataError(
            f"{cut} of {len(rows)} {name} rows end at `data.max_length`, {max_length} tokens,"
            " before their response does, so exact match would ask for a part of it; raise"
            " --data.max_length."
        )


def _padded_left(prompts: Sequence[list[int]], pad: int) -> dict[str, list[list[int]]]:
    """Return prompts of one length, so that all answers start at the same place."""
    width = max(map(len, prompts))
    missing = [width - len(prompt) for prompt in prompts]
    return {
        "input_ids": [[pad] * gap + prompt for gap, prompt in zip(missing, prompts, strict=True)],
        "attention_mask": [[0] * gap + [1] * (width - gap) for gap in missing],
    }
