"""Records that describe a run: what the verbs that train read from flags and YAML.

The text below a field is its help on the command line. Nothing here imports torch.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

from tlora.errors import ConfigError, unknown_names
from tlora.registry import METHODS

Kind = Literal["causal", "seq2seq", "classification", "regression"]
LossOn = Literal["response", "all"]
Overlap = Literal["refuse", "drop", "allow"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "nf4", "int8"]


@dataclass(kw_only=True)
class DataConfig:
    """Where rows come from and how they become tokens."""

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
    max_length: int = 512
    """Tokens kept of a row; what is longer loses its end, and a warning counts such rows."""
    max_train_rows: int | None = None
    """Use the first so many training rows."""
    max_eval_rows: int | None = None
    """Use the first so many evaluation rows."""
    subset_seed: int | None = None
    """Draw those so many rows with this seed, in place of the first: files are often sorted."""
    overlap: Overlap = "refuse"
    """What to do if training rows ask what evaluation rows ask: "refuse" to start, "drop" those
    training rows, or "allow" them; each time they are counted and some are named."""
    guard: list[str] | str = field(default_factory=list)
    """Evaluations of `tlora list evaluations`, "a,b", whose questions are kept apart from the
    training rows like those of evaluation rows; see `overlap`."""
    guard_dir: str | None = None
    """Folder with their files, in place of the Hub: what `tlora eval` calls `data_dir`."""

    def __post_init__(self) -> None:
        self.guard = split_names(self.guard)

    def given(self) -> list[str]:
        """Return the names of the fields that differ from their defaults."""
        default = DataConfig()
        names = (field.name for field in dataclasses.fields(self))
        return [name for name in names if getattr(self, name) != getattr(default, name)]

    def faults(self) -> list[str]:
        """Return what is wrong with the values, a sentence each."""
        faults = []
        for name in ("max_length", "max_train_rows", "max_eval_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                faults.append(f"`data.{name}` is {value!r}; give a whole number, 1 or more.")
        if self.subset_seed is not None and self.max_train_rows is self.max_eval_rows is None:
            faults.append(
                "`data.subset_seed` says how rows are drawn, not how many; give"
                " `data.max_train_rows` or `data.max_eval_rows` too."
            )
        return faults


@dataclass(kw_only=True)
class CalibrationConfig:
    """Which training rows the method looks at before training."""

    samples: int = 32
    """Training rows to calibrate on: the first ones after a seeded shuffle."""
    batch_size: int = 4
    """Rows per calibration batch; it changes memory and speed, not the statistics (but for
    `lora-ga`, which takes the mean over batches, and `eva`, which goes on by batches)."""
    skip_bad_samples: bool = False
    """Leave out, and name, rows without a label that counts, or whose activations, loss or gradient
    are not finite; else they are an error (`tlora`, `corda`)."""
    cache: str | None = None
    """File that keeps the statistics (.safetensors): written once, progress included, and used by
    every run with the same model, rows and modules (`tlora`, `corda`)."""

    def faults(self) -> list[str]:
        """Return what is wrong with the values, a sentence each."""
        return [
            f"`calibration.{name}` is {value!r}; give a whole number, 1 or more."
            for name, value in (("samples", self.samples), ("batch_size", self.batch_size))
            if isinstance(value, bool) or not isinstance(value, int) or value < 1
        ]


@dataclass(kw_only=True)
class SharedConfig:
    """What does not depend on the method or the seed: a model, a task, its rows, the training.

    Raises:
        ConfigError: values are missing or out of range; all faults are collected into one error.
    """

    model: str | None = None
    """Model to adapt: a folder or a name on the Hub."""
    task: str = "jsonl"
    """What to learn; see `tlora list tasks`."""
    train_file: str | None = None
    """Training rows: a JSON, JSONL, CSV, TSV or Parquet file."""
    dtype: Dtype = "auto"
    """Precision to load the model in; "auto" takes the checkpoint's own."""
    quantization: Quantization = "none"
    """Quantise the model while loading, by bitsandbytes: "nf4" (4-bit, computing in `dtype`) or
    "int8"; "none" leaves a checkpoint as it is, quantised or not."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    adapter: dict[str, Any] = field(default_factory=dict)
    """Options of the method (--adapter.r 64)."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Fields of transformers' training arguments (--trainer.learning_rate 1e-4)."""
    data: DataConfig = field(default_factory=DataConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)

    def __post_init__(self) -> None:
        if faults := self.faults():
            raise ConfigError(faults, where="run")

    def faults(self) -> list[str]:
        """Return what is wrong with the values, a sentence each."""
        faults = [*self.data.faults(), *self.calibration.faults()]
        for name, value, kind in (
            ("dtype", self.dtype, Dtype),
            ("quantization", self.quantization, Quantization),
            ("data.loss_on", self.data.loss_on, LossOn),
            ("data.overlap", self.data.overlap, Overlap),
        ):
            if value not in get_args(kind):
                options = ", ".join(map(repr, get_args(kind)))
                faults.append(f"`{name}` is {value!r}; choose one of {options}.")
        if self.train_file and self.data.dataset:
            faults.append("`train_file` and `data.dataset` are both given; give one of them.")
        return faults

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Make a record from plain values; the inverse of `to_dict`. A section may be None: empty.

        Raises:
            ConfigError: a name is unknown (with a suggestion) or a value out of range.
        """
        check_names(cls, values, where="run")
        sections: dict[str, Any] = {}
        for name, record in (("data", DataConfig), ("calibration", CalibrationConfig)):
            given = values.get(name) or {}
            check_names(record, given, where=name)
            sections[name] = record(**given)
        opened = {name: values.get(name) or {} for name in ("adapter", "trainer")}
        return cls(**values | opened | sections)


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
    seed: int = 0
    """Seed of the weights that start random, the order of the rows and dropout."""
    resume: bool = False
    """Continue the run in `output_dir` from its last good checkpoint."""

    def faults(self) -> list[str]:
        """Return what is wrong with the values, a sentence each."""
        faults = super().faults()
        if self.seed < 0:
            faults.append(f"`seed` is {self.seed!r}; give a whole number, 0 or more.")
        return faults

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


def split_names(names: list[str] | str) -> list[str]:
    """Return names, given as a list or as "a,b", each once and without empty ones."""
    words = [names] if isinstance(names, str) else names
    split = [name.strip() for word in words for name in str(word).split(",")]
    return list(dict.fromkeys(filter(None, split)))


def check_names(record: type, values: dict[str, Any], where: str) -> None:
    """Raise if ``values`` names a field that ``record``, a dataclass, does not have.

    Raises:
        ConfigError: one fault, with a suggestion, for each unknown name.
    """
    known = [field.name for field in dataclasses.fields(record)]
    if faults := unknown_names(values, known, "field"):
        raise ConfigError(faults, where=where)


def field_docs(record: type) -> dict[str, str]:
    """Return the text written below each field of a dataclass, inherited ones too, a line each."""
    docs: dict[str, str] = {}
    for base in record.__bases__:
        if dataclasses.is_dataclass(base):
            docs |= field_docs(base)
    tree = ast.parse(textwrap.dedent(inspect.getsource(record)))
    body = tree.body[0].body  # type: ignore[attr-defined]
    for node, following in itertools.pairwise(body):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[node.target.id] = " ".join(str(following.value.value).split())
    return docs
