"""Exact match: the fraction of rows whose response the model generates exactly.

Works on tokenized rows, so it supports every causal task and any subset of rows.
"""

from __future__ import annotations

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
    """Return the fraction of ``rows`` whose response is generated exactly, ignoring white space.

    Generates greedily, up to the length of the longest response, ignoring penalties and beams in
    the model's generation config. The EOS token ends an answer; special tokens are not compared.

    Args:
        model: a causal model, possibly with an adapter; set to evaluation mode only here.
        rows: rows with "input_ids" and "labels" of one prompt and response.
        batch_size: rows per batch.

    Raises:
        DataError: a row is not a prompt followed by one response.
    """
    import torch

    pairs = [prompt_and_response(row) for row in rows]
    longest = max(len(response) for _, response in pairs)
    training, right = model.training, 0
    model.eval()
    try:
        with greedy(model, tokenizer), torch.no_grad():
            for start in range(0, len(pairs), batch_size):
                prompts, responses = zip(*pairs[start : start + batch_size], strict=True)
                # With padding on the left, all answers start at the same position.
                batch = tokenizer.pad(
                    {"input_ids": list(prompts)},
                    padding_side="left",
                    return_attention_mask=True,
                    return_tensors="pt",
                ).to(model.device)
                tokens = model.generate(**batch, max_new_tokens=longest)
                written, wanted = (
                    tokenizer.batch_decode(ids, skip_special_tokens=True)
                    for ids in (tokens[:, batch["input_ids"].shape[1] :], list(responses))
                )
                right += sum(a.strip() == b.strip() for a, b in zip(written, wanted, strict=True))
    finally:
        model.train(training)
    return right / len(pairs)


def prompt_and_response(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Return the token ids before the first trained token, and the trained ones.

    Drops tokens after the response, such as the line break of ChatML.

    Raises:
        DataError: there is no prompt, or more than one response.
    """
    ids, learned = row["input_ids"], [label != IGNORED for label in row["labels"]]
    start = learned.index(True)
    end = start + sum(learned)
    if start == 0 or not all(learned[start:end]):
        raise DataError(
            "exact match needs rows with one prompt and one response, and `data.loss_on`"
            ' "response"; use `metric: loss` for plain text and for chats with several answers.'
        )
    return [*ids[:start]], [*ids[start:end]]


def check_rows(
    rows: Dataset, name: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> None:
    """Check that every row is a prompt with one whole response.

    A row counts as truncated if it has ``max_length`` tokens and does not end with EOS.

    Raises:
        DataError: a row is something else, or responses are truncated.
    """
    cut = 0
    for row in rows:
        _, response = prompt_and_response(row)
        cut += len(row["input_ids"]) >= max_length and response[-1] != tokenizer.eos_token_id
    if cut:
        raise DataError(
            f"the responses of {cut} of {len(rows)} {name} rows are truncated at `data.max_length`,"
            f" {max_length} tokens, so exact match would only compare a part; raise"
            " --data.max_length."
        )
