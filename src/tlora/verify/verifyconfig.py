"""The record of `tlora verify`. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from tlora.checks import Record, at_least
from tlora.exporters.exportconfig import Server

Reader = Literal["peft"] | Server


@dataclass(kw_only=True)
class VerifyConfig(Record):
    """Check which readers get an adapter right, from its files alone; or whether an export of it is
    the same adapter. With a base model, compare log probabilities and greedy replies too.

    The exit code is 1 if the reader of --for, or without it PEFT, gets it wrong, or if the two
    differ.

    Raises:
        ConfigError: values are missing or out of range; all faults are collected into one error.
    """

    where: ClassVar[str] = "verify"

    paths: list[str] = field(metadata={"positional": True})
    """An adapter (the folder of a run, or of any LoRA that PEFT has saved); and, to compare with
    it, an export of it: another adapter, a merged model, or a folder with an adapter.gguf."""
    server: Reader | None = None
    """Who will read it."""
    model: str | None = None
    """Base model, in place of the one that the adapter names; it is loaded, and replies are
    compared."""
    prompts: str | None = None
    """Prompts to compare replies on: a text file with a prompt a line, or JSONL with `prompt` or
    `messages`; by default a few that come with the package."""
    max_new_tokens: Annotated[int, at_least(1)] = 16
    """Greedy tokens that are compared of each reply."""
    output: str | None = None
    """JSON file to write all numbers to."""
    trust_remote_code: bool = False
    """Run Python code that comes with the base model."""

    def relations(self) -> Iterator[str]:
        """Yield what is wrong between fields."""
        if not 1 <= len(self.paths) <= 2:
            yield "`paths` takes an adapter, and at most one export of it to compare."
        if self.output is not None and not self.output.endswith(".json"):
            yield f"`output` is {self.output!r}; give the name of a .json file."
