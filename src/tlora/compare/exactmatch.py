"""Exact match of a comparison's run: the model writes its answer, right to the letter or wrong.

Works on tokenized rows, so on whatever a causal task makes of its rows and on any part of them.
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
    training, right = model.training, 0
    model.eval()
    try:
        with greedy(model, tokenizer), torch.no_grad():
            for start in range(0, len(pairs), batch_size):
                prompts, responses = zip(*pairs[start : start + batch_size], strict=True)
                # Padded on the left, all answers start at the same place.
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
    """Return the token ids of a row up to the first that is learned, and those that are learned.

    What follows the response, such as the line break of ChatML, is left out.

    Raises:
        DataError: there is no prompt, or more than one response.
    """
    ids, learned = row["input_ids"], [label != IGNORED for label in row["labels"]]
    start = learned.index(True)
    end = start + sum(learned)
    if start == 0 or not all(learned[start:end]):
        raise DataError(
            "exact match needs rows of a prompt with one response, the prompt left out of the loss;"
            " compare plain text and chats of several answers by `metric: loss`, and leave"
            ' `data.loss_on` "response".'
        )
    return [*ids[:start]], [*ids[start:end]]


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
        _, response = prompt_and_response(row)
        cut += len(row["input_ids"]) >= max_length and response[-1] != tokenizer.eos_token_id
    if cut:
        raise DataError(
            f"{cut} of {len(rows)} {name} rows end at `data.max_length`, {max_length} tokens,"
            " before their response does, so exact match would ask for a part of it; raise"
            " --data.max_length."
        )
