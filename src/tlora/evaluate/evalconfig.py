"""The record of `tlora eval`: which models, on which tasks, under which protocol.

Where lm-evaluation-harness has a word for a field, it is the field's name. Nothing here imports
torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from tlora.checks import FOLDER, SEED, Record, Rule, at_least, fault
from tlora.scoring.mtbench.judgeconfig import JudgeConfig
from tlora.tasks.dataconfig import DataConfig, split_names
from tlora.tasks.mixture import written
from tlora.training.runconfig import Dtype, Quantization

Backend = Literal["hf", "vllm"]
ChatPrompt = Literal["auto", "template", "instruction", "raw"]
Sandbox = Literal["namespaces", "landlock"]

SETTINGS = (
    "num_fewshot",
    "limit",
    "gen_kwargs",
    "apply_chat_template",
    "fewshot_as_multiturn",
    "system_instruction",
    "chat_prompt",
    "n_samples",
    "max_length",
    "dtype",
    "quantization",
    "backend",
    "tokenizer",
    "seed",
    "data_dir",
    "test_file",
    "train_file",
    "laplace",
    "data",
)
"""Fields that can change a score; all results of a folder have them in common."""
_OF_TRAINING = (
    "train_split",
    "loss_on",
    "max_train_rows",
    "val_size",
    "overlap",
    "guard",
    "guard_dir",
)
"""Fields of `data` that have no meaning where nothing is trained."""
REPLY_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What `gen_kwargs` may call the most tokens of a reply; the first is the harness' own name."""
_GENERATION = {
    **dict.fromkeys(REPLY_TOKENS, Annotated[int, at_least(1)]),
    "temperature": Annotated[float, at_least(0)],
    "do_sample": bool,
}

_ITEMS = Rule(
    "a number of items or a share below 1",
    lambda limit: 0 < limit < 1 or (limit >= 1 and float(limit).is_integer()),
)


@dataclass(kw_only=True)
class EvalConfig(Record):
    """One evaluation: models on tasks, every model with the same prompts, one table.

    Raises:
        ConfigError: values are missing or out of range; all faults are collected into one error.
    """

    where: ClassVar[str] = "eval"

    models: list[str] = field(default_factory=list, metadata={"positional": True})
    """What to evaluate: folders or Hub names of models and PEFT adapters, folders of `tlora
    train`; NAME=PATH says what tables call it."""
    tasks: list[str] | str = field(default_factory=list)
    """Tasks, "a,b": those of `tlora list evaluations`, any of lm-evaluation-harness; for models
    with a head, and with `test_file`, those of `tlora list tasks`, by default jsonl."""
    output_dir: Annotated[str, FOLDER] = "tlora-eval"
    """Folder of the result; rerun the same command to resume."""
    model: str | None = None
    """Base model of the adapters, in place of the one that they name; alone: what to evaluate."""
    adapter: str | None = None
    """An adapter to evaluate, like a further word before the flags."""
    with_base: bool = False
    """Evaluate the base model of each adapter too, first: what the others are compared with."""
    merge: bool = False
    """Evaluate each adapter merged into its base, in memory, instead of beside it."""
    with_merged: bool = False
    """Evaluate each adapter both ways."""
    laplace: bool = False
    """Evaluate each adapter with averaged predictions too, by a Laplace approximation fitted to its
    training rows (Laplace-LoRA), and report -nll and -ece of all: of classifications and of
    multiple choice by likelihood."""
    train_file: str | None = None
    """Training rows of a classifier for `laplace`; by default those that its run records."""
    num_fewshot: Annotated[int, at_least(0)] | None = None
    """Examples before each question; by default the task's own number."""
    limit: Annotated[float, _ITEMS] | None = None
    """Only the first items of each task: a number, or below 1 a share."""
    batch_size: Annotated[int, at_least(1)] | Literal["auto"] = 16
    """Prompts at a time, or "auto"; the longest come first."""
    max_batch_size: Annotated[int, at_least(1)] = 64
    """Where "auto" starts from."""
    max_length: Annotated[int, at_least(1)] | None = None
    """Tokens of prompt and reply; by default the model's own limit. Longer prompts lose their
    beginning."""
    gen_kwargs: dict[str, Any] = field(default_factory=dict)
    """Generation over the task's own: max_gen_toks=256,temperature=0.7,do_sample=true."""
    apply_chat_template: bool = False
    """Put prompts into the tokenizer's chat template."""
    fewshot_as_multiturn: bool = False
    """With a chat template, examples are earlier turns of the chat."""
    system_instruction: str | None = None
    """What stands before every prompt."""
    data_dir: str | None = None
    """Folder with the tasks' files, in place of the Hub."""
    test_file: str | None = None
    """Rows of a task of `tlora list tasks` to score, in files as `tlora train` takes them."""
    allow_code_execution: bool = False
    """Run the programs that models write, where a task asks for it; docs/evaluation.md says in
    what sandbox. Python code that comes with a task's YAML runs too, in none."""
    sandbox: Sandbox = "namespaces"
    """How programs are kept apart; "landlock" is weaker, for machines that forbid the first."""
    n_samples: Annotated[int, at_least(1)] = 1
    """Programs for each problem of code; more than 1 are drawn, not greedy."""
    backend: Backend = "hf"
    """What generates: transformers, or vLLM where it is installed."""
    dtype: Dtype = "auto"
    """Precision to load models in; "auto" takes the checkpoint's own, on a CPU float32."""
    quantization: Quantization = "none"
    """Quantize the base while loading, by bitsandbytes: "nf4" or "int8"."""
    device: str | None = None
    """Where to compute ("cuda:1"); by default the first accelerator."""
    parallelize: bool = False
    """Spread a model that one device does not hold over all of them."""
    tokenizer: str | None = None
    """Tokenizer for all models, in place of each base model's own."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model or with a task's YAML."""
    seed: Annotated[int, SEED] = 1234
    """Seed of the choice of examples and of sampling."""
    chat_prompt: ChatPrompt = "auto"
    """Prompts of conversations: the run's or model's chat "template", the paper's "instruction"
    prompt, which `--task chat` trains on, "raw" text, or "auto": as the run was trained, else the
    template if there is one, else the instruction prompt."""
    data: DataConfig = field(default_factory=DataConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self) -> None:
        self.tasks = split_names(self.tasks)
        self.test_file = written(self.test_file, "test_file")
        self.train_file = written(self.train_file, "train_file")
        if self.test_file and not self.tasks:
            self.tasks = ["jsonl"]
        if isinstance(self.limit, float) and self.limit >= 1 and self.limit.is_integer():
            self.limit = int(self.limit)
        super().__post_init__()

    def entries(self) -> list[str]:
        """Return what is to be evaluated, as the user wrote it."""
        given = [*self.models, *([self.adapter] if self.adapter else [])]
        return given or ([self.model] if self.model else [])

    @property
    def only_grades(self) -> bool:
        """Whether no model is named, and a judge is: what the folder holds is graded."""
        return self.judge.url is not None and not self.entries()

    def limited(self, there: int) -> int:
        """Return how many of ``there`` items are evaluated, by `limit`."""
        if self.limit is None:
            return there
        wanted = int(self.limit) if self.limit >= 1 else math.ceil(self.limit * there)
        return min(there, wanted)

    def settings(self) -> dict[str, Any]:
        """Return what can change a score, as plain JSON values."""
        values = self.to_dict()
        return {name: values[name] for name in SETTINGS}

    def relations(self) -> Iterator[str]:
        """Yield what is wrong between fields, and in the open ones."""
        for name in self.data.given():
            if name in _OF_TRAINING:
                yield f"`data.{name}` is for training only; leave it out."
        if ":" not in str(self.test_file):
            yield from self.data.undrawn()
        for name, kind in _GENERATION.items():
            if name in self.gen_kwargs:
                yield from fault(f"gen_kwargs.{name}", kind, self.gen_kwargs[name])
        if not (self.entries() or self.judge.url):
            yield "no model to evaluate is named; give the folder of a model or an adapter."
        if not (self.tasks or self.only_grades):
            yield "`tasks` is empty; give --tasks; see `tlora list evaluations`."
        if self.merge and self.with_merged:
            yield "`merge` and `with_merged` are both given; give one of them."
        if self.train_file and not self.laplace:
            yield "`train_file` has no effect without `laplace`; leave it out."
        if self.laplace and self.backend != "hf":
            yield "`laplace` needs gradients, which vLLM does not give; leave --backend out."
