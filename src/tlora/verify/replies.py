"""How far an export's replies are from the adapter's, in units of what the adapter does.

The adapter writes a greedy continuation of each prompt; base, adapter and export then read it, one
model in memory at a time. The difference is the norm of the difference of their log probabilities
over the norm of that between adapter and base, both over all positions and tokens: 0 is the same
model, 1 as wrong as the base.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tlora.adapter.freeze import lora_layers
from tlora.adapter.saved import PREFIX
from tlora.errors import DataError
from tlora.evaluate import loading
from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.evaluated_models import EvaluatedModel, resolve
from tlora.models.greedy import greedy
from tlora.tasks import rendering, source, tokens

PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain in two sentences why the sky is blue.",
    "A shop sells pens at 3 dollars each. How much do 7 pens cost?",
    "Write a Python function that reverses a string.",
    "Translate into German: The weather is nice today.",
)
"""What is asked where no file of prompts is given."""


@dataclass
class Replies:
    """What a model does with the prompts.

    Attributes:
        written: its own greedy continuation of each prompt, token ids.
        logs: log probabilities (tokens, vocabulary) of what follows each prompt, along the
            adapter's continuation.
    """

    written: list[list[int]]
    logs: list[Tensor]


@dataclass(frozen=True)
class Difference:
    """How far a model is from the adapter on its base.

    Attributes:
        norm: of the difference of all log probabilities.
        largest: the largest difference in the log probability of a token that the adapter wrote.
        alike: prompts whose greedy reply is the same, token by token.
        prompts: how many prompts there are.
    """

    norm: float
    largest: float
    alike: int
    prompts: int

    @classmethod
    def of(cls, found: Replies, meant: Replies) -> Difference:
        """Return the difference of a model's replies to the adapter's."""
        square, largest = 0.0, 0.0
        for one, other, ids in zip(found.logs, meant.logs, meant.written, strict=True):
            off = one[:, : other.shape[1]] - other[:, : one.shape[1]]
            square += float(off.double().square().sum())
            places = torch.tensor(ids)[: len(off), None]
            largest = max(largest, float(off.gather(1, places).abs().max()))
        pairs = [*zip(found.written, meant.written, strict=True)]
        return cls(math.sqrt(square), largest, sum(a == b for a, b in pairs), len(pairs))

    def of_effect(self, effect: Difference) -> float | None:
        """Return the difference over the adapter's effect; None where it has none."""
        return self.norm / effect.norm if effect.norm else None

    def words(self, effect: Difference) -> str:
        """Return the difference in words."""
        share = self.of_effect(effect)
        size = "" if share is None or self is effect else f"{share:.2g} of the adapter's effect, "
        return (
            f"differs by {size}at most {self.largest:.2g} in a token's log probability;"
            f" {self.alike} of {self.prompts} greedy replies are the same"
        )


class Models:
    """Loads one model after the other, all as `tlora eval` does.

    Args:
        base: folder or Hub name of the base model.
        trust_remote_code: run its code.
    """

    def __init__(self, base: str, trust_remote_code: bool = False) -> None:
        self._base, self._trust = base, trust_remote_code

    def resolved(self, path: str) -> tuple[EvaluatedModel, EvalConfig]:
        """Return what is loaded for a path, and how."""
        config = EvalConfig(
            models=[path], model=self._base, tasks=["chat"], trust_remote_code=self._trust
        )
        return resolve(config)[0], config

    def writes(self, path: str) -> bool:
        """Return whether a model goes on with a text; others are not compared."""
        return self.resolved(path)[0].head == "causal"

    def prompts(self, path: str, file: str | None) -> list[list[int]]:
        """Return the token ids of the prompts, as the adapter's tokenizer writes them.

        Raises:
            DataError: the file cannot be read, or a row has no prompt.
            ConfigError: there is no tokenizer.
        """
        tokenizer = loading.load_tokenizer(*self.resolved(path))
        rows = [{"prompt": each} for each in PROMPTS] if file is None else _rows(file)
        return [_ids(tokenizer, row) for row in rows]

    def run(self, path: str, use: Callable[[Any, Any], Any]) -> Any:
        """Load a model, give it and its tokenizer to ``use``, and let go of it."""
        evaluated, config = self.resolved(path)
        tokenizer = loading.load_tokenizer(
            dataclasses.replace(evaluated, tokenizer=evaluated.tokenizer or self._base), config
        )
        model = loading.load(evaluated, config)
        try:
            return use(model, tokenizer)
        finally:
            del model
            loading.release()


def _rows(file: str) -> list[dict[str, Any]]:
    """Return the rows of a file of prompts.

    Raises:
        DataError: it cannot be read, or has no column `prompt` or `messages`.
    """
    path = source.existing_file(file)
    if path.suffix != ".jsonl":
        lines = "".join(source.decoded(path)).splitlines()
        rows: list[dict[str, Any]] = [{"prompt": line} for line in lines if line.strip()]
    else:
        rows = [*source.read_file(file)]
    if not rows or not {"prompt", "messages"} & rows[0].keys():
        raise DataError(f"{file} has no prompts; give lines of text, or `prompt` or `messages`.")
    return rows


def _ids(tokenizer: Any, row: dict[str, Any]) -> list[int]:
    messages = row.get("messages")
    if messages is None and tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": row["prompt"]}]
    if messages is None:
        return tokens.prompt_ids(tokenizer, row["prompt"])
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    text = rendering.written(tokenizer, {"messages": messages}, prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def written(model: Any, tokenizer: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Return a model's greedy continuations, of at most ``count`` tokens each."""
    found = []
    with torch.no_grad(), greedy(model, tokenizer):
        for ids in prompts:
            inputs = torch.tensor([ids], device=model.device)
            made = model.generate(
                input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=count
            )
            found.append(made[0, len(ids) :].tolist())
    return found


def logs(model: Any, prompts: list[list[int]], along: list[list[int]]) -> list[Tensor]:
    """Return the log probabilities of the tokens that follow each prompt, in float32 on the CPU.

    Args:
        model: what reads.
        prompts: token ids.
        along: the continuations that it reads, token ids.
    """
    found = []
    with torch.no_grad():
        for ids, more in zip(prompts, along, strict=True):
            inputs = torch.tensor([[*ids, *more[:-1]]], device=model.device)
            rows = model(input_ids=inputs).logits[0, len(ids) - 1 :]
            found.append(rows.float().log_softmax(-1).cpu())
    return found


@contextlib.contextmanager
def scaled_as(model: Any, scales: Mapping[str, float]) -> Iterator[None]:
    """Let a loaded adapter have a reader's scales while the body runs.

    Args:
        model: a PeftModel.
        scales: by the module's full name in the base.
    """
    layers = {name.removeprefix(PREFIX): layer for name, layer in lora_layers(model)}
    before = {name: layer.scaling["default"] for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.scaling["default"] = scales[name]
        yield
    finally:
        for name, layer in layers.items():
            layer.scaling["default"] = before[name]
