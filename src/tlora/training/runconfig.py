"""Records that describe a run: the fields that training verbs read from flags and YAML.

The text below a field is its help on the command line. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from tlora.checks import FOLDER, SEED, Record, Section, at_least
from tlora.registry import METHODS
from tlora.tasks.dataconfig import DataConfig
from tlora.tasks.mixture import written

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "nf4", "int8"]


@dataclass(kw_only=True)
class CalibrationConfig(Section):
    """Training rows that the method reads before training."""

    where: ClassVar[str] = "calibration"
    prefix: ClassVar[str] = "calibration."

    samples: Annotated[int, at_least(1)] = 32
    """Training rows to calibrate on: the first ones after a seeded shuffle."""
    batch_size: Annotated[int, at_least(1)] = 4
    """Rows per calibration batch; it changes memory and speed, not the statistics (except for
    `lora-ga`, which averages over batches, and `eva`, which proceeds by batches)."""
    skip_bad_samples: bool = False
    """Skip, and name, rows without a counted label, or whose activations, loss or gradient are not
    finite; otherwise they raise an error (`tlora`, `corda`)."""
    cache: str | None = None
    """File that keeps the statistics (.safetensors): written after calibration, and used by every
    run with the same model, rows and modules (`tlora`, `corda`)."""


@dataclass(kw_only=True)
class TokensConfig(Section):
    """Additions to the tokenizer."""

    where: ClassVar[str] = "tokens"
    prefix: ClassVar[str] = "tokens."

    add: list[str] = field(default_factory=list)
    """Special tokens to add, "<a>,<b>"; their rows of the embedding, and of the head, start at the
    mean of the others and train."""

    def relations(self) -> Iterator[str]:
        """Yield faults of the tokens."""
        if not all(token.strip() for token in self.add) or len(set(self.add)) < len(self.add):
            yield "`tokens.add` names a token twice, or an empty one; give each once."


@dataclass(kw_only=True)
class SharedConfig(Record):
    """The fields that do not depend on the method or the seed: model, task, rows, training.

    Raises:
        ConfigError: values are missing or out of range; all faults are collected into one error.
    """

    where: ClassVar[str] = "run"

    model: str | None = None
    """Model to adapt: a folder or a name on the Hub."""
    task: str = "jsonl"
    """What to learn; see `tlora list tasks`."""
    train_file: str | None = None
    """Training rows: a JSON, JSONL, CSV, TSV, Parquet or text file; several as "a.jsonl,b/*.csv",
    and "c.jsonl:0.3" for three tenths of the rows of one."""
    dtype: Dtype = "auto"
    """Precision to load the model in; "auto" takes the checkpoint's own."""
    quantization: Quantization = "none"
    """Quantize the model while loading, by bitsandbytes: "nf4" (4-bit, computing in `dtype`) or
    "int8"; "none" loads a checkpoint unchanged, quantized or not."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    adapter: dict[str, Any] = field(default_factory=dict)
    """Options of the method (--adapter.r 64)."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Training arguments by their own names. Those of every task are at
    https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments and
    those of causal tasks at https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig ."""
    data: DataConfig = field(default_factory=DataConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)

    def __post_init__(self) -> None:
        self.train_file = written(self.train_file, "train_file")
        super().__post_init__()

    def relations(self) -> Iterator[str]:
        """Yield faults between fields."""
        if self.train_file and self.data.dataset:
            yield "`train_file` and `data.dataset` are both given; give one of them."
        if not (self.train_file and ":" in str(self.train_file)):
            yield from self.data.undrawn()


@dataclass(kw_only=True)
class RunConfig(SharedConfig):
    """One run: a model, a task, a method and an output folder.

    Raises:
        ConfigError: values are missing or out of range; all faults are collected into one error.
    """

    eval_file: str | None = None
    """Rows to evaluate on after training; see `train_file`."""
    output_dir: Annotated[str, FOLDER] = "tlora-run"
    """Folder of the run: adapter, plan, checkpoints, log, provenance."""
    method: str = "tlora"
    """Method of adaptation; see `tlora list methods`."""
    tokens: TokensConfig = field(default_factory=TokensConfig)
    continue_from: str | None = None
    """An adapter to train further, instead of a new one: the folder of a run, an adapter or a
    checkpoint. Its A stays frozen if its run froze it; nothing is calibrated."""
    seed: Annotated[int, SEED] = 0
    """Seed of random initial weights, the order of the rows and dropout."""
    early_stopping: Annotated[int, at_least(1)] | None = None
    """Stop when the evaluation loss has not fallen for this number of evaluations, and keep the
    best checkpoint."""
    resume: bool = False
    """Resume the run in `output_dir` with its own configuration, so that the other flags can be
    omitted. Rerunning the same command resumes it too."""

    def __post_init__(self) -> None:
        self.eval_file = written(self.eval_file, "eval_file")
        super().__post_init__()

    def relations(self) -> Iterator[str]:
        """Yield faults between fields."""
        yield from super().relations()
        if self.eval_file and self.data.val_size is not None:
            yield "`eval_file` and `data.val_size` are both given; give one of them."

    def options(self) -> Any:
        """Return the method's options record, made from `adapter`.

        A method with its own seed takes the run's, unless it is given one.

        Raises:
            ConfigError: the method is unknown, or an option of it is unknown or out of range.
        """
        record = METHODS.load(self.method).options
        seeded = any(field.name == "seed" for field in dataclasses.fields(record))
        return record(**({"seed": self.seed} if seeded else {}) | self.adapter)

    def resolved(self) -> RunConfig:
        """Return this run with every option of the method written out, defaults included."""
        return dataclasses.replace(self, adapter=dataclasses.asdict(self.options()))
