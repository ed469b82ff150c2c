"""Replies of a model to conversations: the prompt that each becomes, and generation in batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tlora.tasks.base import INSTRUCTION_PROMPT
from tlora.tasks.tokens import prompt_ids

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class ChatForm:
    """How a conversation becomes a prompt."""

    says: str
    """What it is, for a result's protocol line."""
    render: Callable[[Any, Messages], str]
    """(tokenizer, messages that end with the user's) -> the prompt."""
    special_tokens: bool
    """Whether the tokenizer adds its special tokens; a chat template has written them already."""
    stops: tuple[str, ...] = ()
    """Texts that a reply ends before."""


def _templated(tokenizer: Any, messages: Messages) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


_TURN = "\n\n### Instruction:\n{instruction}\n\n### Response:"


def _instructed(_: Any, messages: Messages) -> str:
    text = ""
    for message in messages:
        if message["role"] == "system":
            text += f"{message['content']}\n\n"
        elif message["role"] == "assistant":
            text += message["content"]
        else:
            later = "### Response:" in text
            text += (_TURN if later else INSTRUCTION_PROMPT).format(instruction=message["content"])
    return text


TEMPLATE = ChatForm("the model's chat template", _templated, special_tokens=False)
INSTRUCTION = ChatForm(
    "the instruction prompt of arXiv 2604.18124, an earlier turn standing before it",
    _instructed,
    special_tokens=True,
    stops=("### Instruction:",),
)


def form_of(tokenizer: PreTrainedTokenizerBase) -> ChatForm:
    """Return the tokenizer's chat template, or without one the paper's instruction prompt."""
    return TEMPLATE if tokenizer.chat_template else INSTRUCTION


@dataclass(frozen=True)
class Decoding:
    """How replies are written."""

    max_new_tokens: int = 1024
    batch_size: int = 16
    """Prompts at a time; those of similar length stand together."""
    seed: int = 0
    """Seed of every batch that is sampled; what stands in a batch decides its samples too."""
    context: int | None = None
    """Most tokens of prompt and reply; by default the model's own limit."""


@dataclass(frozen=True)
class Written:
    """A model's replies, in the order of the prompts."""

    replies: list[str]
    shortened: int
    """How many prompts lost their beginning for the model's context."""


def write_replies(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[str, float]],
    form: ChatForm,
    decoding: Decoding,
) -> Written:
    """Return what the model writes after each prompt, without special tokens and outer blanks.

    Greedy at temperature 0. What the model's generation configuration says else (top-p, penalties)
    stays. A prompt that leaves no room for `max_new_tokens` in the context loses its beginning, as
    long as it keeps half of the context; then the reply has what is left.

    Args:
        model: a transformers or PEFT model that generates.
        tokenizer: its tokenizer.
        prompts: texts in `form`, each with its temperature.
        form: what the prompts were rendered by.
        decoding: how to write.
    """
    ids = [_encode(model, tokenizer, text, form) for text, _ in prompts]
    context, most = _context(model, decoding), decoding.max_new_tokens
    if context is not None:
        most = max(1, min(most, context // 2))
        kept = [tokens[-(context - most) :] for tokens in ids]
    else:
        kept = ids
    shortened = sum(len(k) < len(all_) for k, all_ in zip(kept, ids, strict=True))
    replies = [""] * len(prompts)
    with _evaluating(model), tqdm(total=len(prompts), desc="replies", disable=None) as bar:
        for batch in _batches(kept, [temperature for _, temperature in prompts], decoding):
            options = _options(tokenizer, prompts[batch[0]][1], form, most)
            texts = _generate(model, tokenizer, [kept[i] for i in batch], options, decoding.seed)
            for index, text in zip(batch, texts, strict=True):
                replies[index] = _ended(text, form.stops)
            bar.update(len(batch))
    return Written(replies, shortened)


def _encode(model: Any, tokenizer: PreTrainedTokenizerBase, text: str, form: ChatForm) -> list[int]:
    if form.special_tokens and not model.config.is_encoder_decoder:
        return prompt_ids(tokenizer, text)
    return tokenizer(text, add_special_tokens=form.special_tokens)["input_ids"]


def _context(model: Any, decoding: Decoding) -> int | None:
    if decoding.context is not None or model.config.is_encoder_decoder:
        return decoding.context
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _batches(
    ids: Sequence[Sequence[int]], temperatures: Sequence[float], decoding: Decoding
) -> Iterator[list[int]]:
    """Yield indices of one temperature and like lengths, the longest first: what does not fit
    into memory is seen at once."""
    order = sorted(range(len(ids)), key=lambda i: (temperatures[i], -len(ids[i])))
    for _, same in groupby(order, key=lambda i: temperatures[i]):
        indices = list(same)
        for start in range(0, len(indices), decoding.batch_size):
            yield indices[start : start + decoding.batch_size]


def _options(
    tokenizer: PreTrainedTokenizerBase, temperature: float, form: ChatForm, most: int
) -> dict[str, Any]:
    sampled = {"do_sample": True, "temperature": temperature}
    options: dict[str, Any] = {
        "max_new_tokens": most,
        "pad_token_id": _pad(tokenizer),
        **(sampled if temperature > 0 else {"do_sample": False}),
    }
    if form.stops:
        options |= {"stop_strings": list(form.stops), "tokenizer": tokenizer}
    return options


def _generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[list[int]],
    options: dict[str, Any],
    seed: int,
) -> list[str]:
    import torch

    width = max(map(len, ids))
    pad = options["pad_token_id"]
    tokens = torch.tensor([[pad] * (width - len(row)) + list(row) for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    with _seeded(model.device, seed), torch.no_grad():
        written = model.generate(
            input_ids=tokens.to(model.device), attention_mask=mask.to(model.device), **options
        )
    new = written if model.config.is_encoder_decoder else written[:, width:]
    return tokenizer.batch_decode(new, skip_special_tokens=True)


def _pad(tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0  # masked, so any will do


def _ended(text: str, stops: tuple[str, ...]) -> str:
    ends = [end for stop in stops if (end := text.find(stop)) >= 0]
    return text[: min(ends, default=None)].strip()


@contextlib.contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    import torch

    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
