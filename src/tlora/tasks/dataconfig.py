"""Configuration for `--data.*`: where rows come from and how to tokenize them.

The string below a field is its help text on the command line. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Annotated, Any, ClassVar, Literal

from tlora.checks import SEED, Rule, Section, at_least

Kind = Literal["causal", "seq2seq", "classification", "regression"]
LossOn = Literal["response", "all"]
Overlap = Literal["refuse", "drop", "allow"]
Format = Literal["auto", "chat", "alpaca", "raw"]
HeldOut = Annotated[
    float,
    Rule(
        "a fraction below 1 or a number of rows",
        lambda size: 0 < size < 1 or (size >= 1 and float(size).is_integer()),
    ),
]

_SOURCES = ("messages_column", "text_column", "prompt_column", "prompt_template")
"""Mutually exclusive fields that select the main column."""
_TEXT = ("response_column", "system", "chat_template", "loss_on")
_LABELS = ("text_pair_column", "label_column", "label_names")
ABOUT_TEXT = (*_SOURCES, *_TEXT, *_LABELS)
"""Fields of `data` about columns and text format, which some tasks ignore."""


@dataclass(kw_only=True)
class DataConfig(Section):
    """Where rows come from and how to tokenize them."""

    where: ClassVar[str] = "data"
    prefix: ClassVar[str] = "data."

    kind: Kind | None = None
    """Training objective, for tasks with a choice: "causal" (jsonl's default), "seq2seq"
    (GLUE tasks as text to text), "classification" or "regression"."""
    dataset: str | None = None
    """Hub dataset to use instead of --train_file."""
    dataset_config: str | None = None
    """Configuration (subset) of `dataset`."""
    train_split: str = "train"
    """Split of `dataset` to train on."""
    eval_split: str | None = None
    """Split of `dataset` to evaluate on after training."""
    prompt_column: str | None = None
    """Column with the prompt (the source text for seq2seq)."""
    response_column: str | None = None
    """Column with the response (the target text for seq2seq)."""
    messages_column: str | None = None
    """Column with a chat: a list of {role, content} or {from, value}."""
    text_column: str | None = None
    """Column with plain text (causal) or the text to classify."""
    text_pair_column: str | None = None
    """Column with the second text of a pair to classify."""
    label_column: str | None = None
    """Column with the class or number to predict."""
    label_names: list[str] | None = None
    """Class names in the order of their ids; by default, the sorted classes of the training rows.
    In an evaluation, by default, the class names stored in the model's run or checkpoint."""
    prompt_template: str | None = None
    """Prompt template with columns in braces: "Question: {question}\\nAnswer:"."""
    format: Format = "auto"
    """How to format rows as text: "chat" (the model's chat template), "alpaca" (the paper's
    instruction prompt), "raw" (unchanged), or "auto": the chat template if the model has one, else
    the Alpaca prompt; "auto" leaves plain text, completions and your own templates unchanged."""
    system: str | None = None
    """System message for rows without one."""
    chat_template: str | None = None
    """Chat template to use instead of the model's, saved with the adapter: a file or "alpaca",
    "chatml", "gemma", "llama3", "mistral", "phi3", "qwen" or "zephyr"."""
    loss_on: LossOn = "response"
    """Tokens to compute the loss on: "response" (in a chat, the assistant's turns) or "all"."""
    max_length: Annotated[int, at_least(1)] | None = None
    """Maximum tokens per row; by default, the model's context length, up to 2048. Longer rows are
    truncated, and a warning counts them."""
    val_size: HeldOut | None = None
    """Training rows to hold out for evaluation: a fraction (0.1) or a number (500). Rows with the
    same prompt stay on the same side of the split."""
    max_train_rows: Annotated[int, at_least(1)] | None = None
    """Maximum number of training rows; uses the first ones unless `subset_seed` is set."""
    max_eval_rows: Annotated[int, at_least(1)] | None = None
    """Maximum number of evaluation rows; uses the first ones unless `subset_seed` is set."""
    subset_seed: Annotated[int, SEED] | None = None
    """Seed for choosing rows at random instead of taking the first; files are often sorted."""
    overlap: Overlap = "refuse"
    """What to do with training rows that repeat evaluation prompts: "refuse" to start, "drop" them,
    or "allow" them. Every mode reports how many there are and lists some."""
    guard: list[str] | str = field(default_factory=list)
    """Evaluations, "a,b", whose questions the training rows must not repeat; see `overlap` and
    `tlora list evaluations`."""
    guard_dir: str | None = None
    """Folder with files of those evaluations, as `--data_dir` in `tlora eval`; default: the Hub."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.guard = split_names(self.guard)

    def given(self) -> list[str]:
        """Return the names of fields that differ from their defaults."""
        default = DataConfig()
        return [
            name for name in self.field_names() if getattr(self, name) != getattr(default, name)
        ]

    def undrawn(self) -> Iterator[str]:
        """Yield an error if `subset_seed` is set without a row limit or a weighted file."""
        drawn = (self.max_train_rows, self.max_eval_rows, self.val_size)
        if self.subset_seed is not None and not any(drawn):
            yield (
                "`data.subset_seed` chooses rows at random but not how many; set"
                " `data.max_train_rows` or `data.max_eval_rows` too."
            )

    def relations(self) -> Iterator[str]:
        """Yield errors in combinations of fields."""
        if self.val_size is not None and self.eval_split:
            yield "`data.val_size` and `data.eval_split` are both set; keep one of them."
        if len(set(names := self.label_names or [])) < len(names):
            yield "`data.label_names` names a class twice; give each once."
        pairs = (*combinations(_SOURCES, 2), *(("response_column", name) for name in _SOURCES[:2]))
        for one, other in pairs:
            if getattr(self, one) and getattr(self, other):
                yield f"`data.{one}` and `data.{other}` are both set; keep one of them."


def split_names(names: Any) -> Any:
    """Return unique, non-empty names from a list or "a,b"; other values unchanged."""
    words = [names] if isinstance(names, str) else names
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        return names
    split = [name.strip() for word in words for name in word.split(",")]
    return list(dict.fromkeys(filter(None, split)))
