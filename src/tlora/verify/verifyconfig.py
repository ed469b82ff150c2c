"""Configuration of `tlora verify`. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from tlora.checks import Record, at_least
from tlora.exporters.exportconfig import Server

Reader = Literal["peft"] | Server


@dataclass(kw_only=True)
class VerifyConfig(Record):
    """Check from the files alone which readers interpret an adapter correctly, or whether an export
    is the same adapter. With a base model, also compare log probabilities and greedy replies.

    The exit code is 1 if the reader in --for (default: PEFT) is wrong, or if the two differ.

    Raises:
        ConfigError: values are missing or out of range; one error lists all faults.
    """

    where: ClassVar[str] = "verify"

    paths: list[str] = field(metadata={"positional": True})
    """An adapter (the folder of a run, or of any LoRA saved by PEFT), and optionally an export of
    it to compare: another adapter, a merged model, or a folder with an adapter.gguf."""
    server: Reader | None = field(default=None, metadata={"typed": "--for"})
    """The reader to check."""
    model: str | None = None
    """Base model, instead of the one named by the adapter; loads it and compares replies."""
    prompts: str | None = None
    """Prompts for comparing replies: a text file with one prompt per line, or JSONL with `prompt`
    or `messages`; by default, a few built-in ones."""
    max_new_tokens: Annotated[int, at_least(1)] = 16
    """Number of greedy tokens to compare per reply."""
    max_rank: Annotated[int, at_least(1)] | None = None
    """Compare with the adapter cut to this rank, as `tlora export --max_rank` does it; an adapter
    or GGUF file with fewer ranks of a DyLoRA run is recognized without it."""
    output: str | None = None
    """JSON file for all numbers."""
    trust_remote_code: bool = False
    """Run Python code that comes with the base model."""

    def relations(self) -> Iterator[str]:
        """Yield errors in combinations of fields."""
        if not 1 <= len(self.paths) <= 2:
            yield "`paths` must be an adapter and at most one export of it to compare."
        if self.max_rank is not None and len(self.paths) == 1:
            yield "`max_rank` requires an export to compare; give its folder as the second path."
        if self.output is not None and not self.output.endswith(".json"):
            yield f"`output` is {self.output!r}; give the name of a .json file."
