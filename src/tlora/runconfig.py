"""Records that describe a run: what the verbs that train read from flags and YAML.

The text below a field is its help on the command line. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from tlora.checks import Record, Section, at_least
from tlora.registry import METHODS

Kind = Literal["causal", "seq2seq", "classification", "regression"]
LossOn = Literal["response", "all"]
Overlap = Literal["refuse", "drop", "allow"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "nf4", "int8"]


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
    """Column of a chat: a list of {role, content}."""
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
    loss_on: LossOn = "response"
    """Which tokens count: "response" (the prompt is masked) or "all"."""
    max_length: Annotated[int, at_least(1)] = 512
    """Tokens kept of a row; what is longer loses its end, and a warning counts such rows."""
    max_train_rows: Annotated[int, at_least(1)] | None = None
    """Use only the first training rows: this number of them."""
    max_eval_rows: Annotated[int, at_least(1)] | None = None
    """Use only the first evaluation rows: this number of them."""
    subset_seed: int | None = None
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

    def relations(self) -> Iterator[str]:
        """Yield what is wrong between fields."""
        if self.subset_seed is not None and self.max_train_rows is self.max_eval_rows is None:
            yield (
                "`data.subset_seed` says how rows are drawn, not how many; give"
                " `data.max_train_rows` or `data.max_eval_rows` too."
            )


@dataclass(kw_only=True)
class CalibrationConfig(Section):
    """Which training rows the method looks at before training."""

    where: ClassVar[str] = "calibration"
    prefix: ClassVar[str] = "calibration."

    samples: Annotated[int, at_least(1)] = 32
    """Training rows to calibrate on: the first ones after a seeded shuffle."""
    batch_size: Annotated[int, at_least(1)] = 4
    """Rows per calibration batch; it changes memory and speed, not the statistics (but for
    `lora-ga`, which takes the mean over batches, and `eva`, which goes on by batches)."""
    skip_bad_samples: bool = False
    """Leave out, and name, rows without a label that counts, or whose activations, loss or gradient
    are not finite; else they are an error (`tlora`, `corda`)."""
    cache: str | None = None
    """File that keeps the statistics (.safetensors): written after calibration, and used by
    every run with the same model, rows and modules (`tlora`, `corda`)."""


@dataclass(kw_only=True)
class SharedConfig(Record):
    """What does not depend on the method or the seed: a model, a task, its rows, the training.

    Raises:
        ConfigError: values are missing or out of range; all faults are collected into one error.
    """

    where: ClassVar[str] = "run"

    model: str | None = None
    """Model to adapt: a folder or a name on the Hub."""
    task: str = "jsonl"
    """What to learn; see `tlora list tasks`."""
    train_file: str | None = None
    """Training rows: a JSON, JSONL, CSV, TSV or Parquet file."""
    dtype: Dtype = "auto"
    """Precision to load the model in; "auto" takes the checkpoint's own."""
    quantization: Quantization = "none"
    """Quantize the model while loading, by bitsandbytes: "nf4" (4-bit, computing in `dtype`) or
    "int8"; "none" leaves a checkpoint as it is, quantized or not."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    adapter: dict[str, Any] = field(default_factory=dict)
    """Options of the method (--adapter.r 64)."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Fields of transformers' training arguments (--trainer.learning_rate 1e-4)."""
    data: DataConfig = field(default_factory=DataConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)

    def relations(self) -> Iterator[str]:
        """Yield what is wrong between fields."""
        if self.train_file and self.data.dataset:
            yield "`train_file` and `data.dataset` are both given; give one of them."


@dataclass(kw_only=True)
class RunConfig(SharedConfig):
    """One run: a model, a task, a method and where the result goes.

    Raises:
        ConfigError: values are missing or out of range; all faults are collected into one error.
    """

    eval_file: str | None = None
    """Rows to evaluate on after training."""
    output_dir: str = "tlora-run"
    """Folder of the run: adapter, plan, checkpoints, log, provenance."""
    method: str = "tlora"
    """How to adapt; see `tlora list methods`."""
    seed: Annotated[int, at_least(0)] = 0
    """Seed of the weights that start random, the order of the rows and dropout."""
    resume: bool = False
    """Continue the run in `output_dir` from its last good checkpoint."""

    def options(self) -> Any:
        """Return the method's options record, made from `adapter`.

        A method with a seed of its own takes the run's, unless it is given one.

        Raises:
            ConfigError: the method is unknown, or an option of it is unknown or out of range.
        """
        record = METHODS.load(self.method).options
        seeded = any(field.name == "seed" for field in dataclasses.fields(record))
        return record(**({"seed": self.seed} if seeded else {}) | self.adapter)

    def resolved(self) -> RunConfig:
        """Return this run with every option of the method written out, defaults included."""
        return dataclasses.replace(self, adapter=dataclasses.asdict(self.options()))


def split_names(names: Any) -> Any:
    """Return names, given as a list or as "a,b", each once and none empty; else as given."""
    words = [names] if isinstance(names, str) else names
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        return names
    split = [name.strip() for word in words for name in word.split(",")]
    return list(dict.fromkeys(filter(None, split)))
