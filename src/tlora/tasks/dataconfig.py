"""The record of `--data.*`: where rows come from and how they become tokens.

The text below a field is its help on the command line. Nothing here imports torch.
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
        "a share below 1 or a number of rows",
        lambda size: 0 < size < 1 or (size >= 1 and float(size).is_integer()),
    ),
]

_SOURCES = ("messages_column", "text_column", "prompt_column", "prompt_template")
"""Fields of which one says what is read of a row."""
_TEXT = ("response_column", "system", "chat_template", "loss_on")
_LABELS = ("text_pair_column", "label_column", "label_names")
ABOUT_TEXT = (*_SOURCES, *_TEXT, *_LABELS)
"""Fields of `data` on columns and on how rows become text, which not every task reads."""


@dataclass(kw_only=True)
class DataConfig(Section):
    """Where rows come from and how they become tokens."""

    where: ClassVar[str] = "data"
    prefix: ClassVar[str] = "data."

    kind: Kind | None = None
    """What is learned, for tasks that leave it open: "causal" (jsonl's default), "seq2seq"
    (GLUE tasks as text to text), "classification" or "regression"."""
    dataset: str | None = None
    """Name of a dataset on the Hub, in place of --train_file."""
    dataset_config: str | None = None
    """Configuration (subset) of `dataset`."""
    train_split: str = "train"
    """Split of `dataset` to train on."""
    eval_split: str | None = None
    """Split of `dataset` to evaluate on at the end."""
    prompt_column: str | None = None
    """Column of the prompt (the source text of seq2seq)."""
    response_column: str | None = None
    """Column of the response (the target text of seq2seq)."""
    messages_column: str | None = None
    """Column of a chat: a list of {role, content} or of {from, value}."""
    text_column: str | None = None
    """Column of plain text (causal), or of the text to classify."""
    text_pair_column: str | None = None
    """Column of the second text of a pair to classify."""
    label_column: str | None = None
    """Column of the class or of the number to predict."""
    label_names: list[str] | None = None
    """Classes in the order of their ids; by default the sorted ones of the training rows. In
    an evaluation: of the model's outputs, by default as its run or checkpoint names them."""
    prompt_template: str | None = None
    """Prompt with columns in braces: "Question: {question}\\nAnswer:"."""
    format: Format = "auto"
    """How rows become text: "chat" (the model's chat template), "alpaca" (the paper's instruction
    prompt), "raw" (as they are), or "auto": the chat template where the model has one, else the
    Alpaca prompt; plain text, prompts with completions and your own templates stay as they are."""
    system: str | None = None
    """System message of rows that have none."""
    chat_template: str | None = None
    """Chat template in place of the model's, saved with the adapter: a file, or one of "alpaca",
    "chatml", "gemma", "llama3", "mistral", "phi3", "qwen", "zephyr"."""
    loss_on: LossOn = "response"
    """Which tokens count: "response" (in a chat the assistant's turns) or "all"."""
    max_length: Annotated[int, at_least(1)] | None = None
    """Tokens kept of a row, by default what the model holds, 2048 at most; longer rows lose their
    end, and a warning counts them."""
    val_size: HeldOut | None = None
    """Rows to hold out of the training rows and evaluate on: a share (0.1) or a number (500). Rows
    that ask the same stay on one side."""
    max_train_rows: Annotated[int, at_least(1)] | None = None
    """Use only the first training rows: this number of them."""
    max_eval_rows: Annotated[int, at_least(1)] | None = None
    """Use only the first evaluation rows: this number of them."""
    subset_seed: Annotated[int, SEED] | None = None
    """Draw the rows with this seed instead of taking the first: files are often sorted."""
    overlap: Overlap = "refuse"
    """What to do if training rows ask what evaluation rows ask: "refuse" to start, "drop" those
    training rows, or "allow" them; each time they are counted and some are named."""
    guard: list[str] | str = field(default_factory=list)
    """Evaluations of `tlora list evaluations`, "a,b", whose questions are kept apart from the
    training rows like those of evaluation rows; see `overlap`."""
    guard_dir: str | None = None
    """Folder with their files, in place of the Hub: what `tlora eval` calls `data_dir`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.guard = split_names(self.guard)

    def given(self) -> list[str]:
        """Return the names of the fields that differ from their defaults."""
        default = DataConfig()
        return [
            name for name in self.field_names() if getattr(self, name) != getattr(default, name)
        ]

    def undrawn(self) -> Iterator[str]:
        """Yield what is wrong with `subset_seed` where no file has a weight."""
        drawn = (self.max_train_rows, self.max_eval_rows, self.val_size)
        if self.subset_seed is not None and not any(drawn):
            yield (
                "`data.subset_seed` says how rows are drawn, not how many; give"
                " `data.max_train_rows` or `data.max_eval_rows` too."
            )

    def relations(self) -> Iterator[str]:
        """Yield what is wrong between fields."""
        if self.val_size is not None and self.eval_split:
            yield "`data.val_size` and `data.eval_split` are both given; give one of them."
        if len(set(names := self.label_names or [])) < len(names):
            yield "`data.label_names` names a class twice; give each once."
        pairs = (*combinations(_SOURCES, 2), *(("response_column", name) for name in _SOURCES[:2]))
        for one, other in pairs:
            if getattr(self, one) and getattr(self, other):
                yield f"`data.{one}` and `data.{other}` are both given; give one of them."


def split_names(names: Any) -> Any:
    """Return names, given as a list or as "a,b", each once and none empty; else as given."""
    words = [names] if isinstance(names, str) else names
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        return names
    split = [name.strip() for word in words for name in word.split(",")]
    return list(dict.fromkeys(filter(None, split)))
