"""Configuration of `tlora eval`: which models, on which tasks, under which protocol.

Fields that lm-evaluation-harness has too use its names. Nothing here imports torch.
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
"""Fields that can change a score; all results in a folder share their values."""
_OF_TRAINING = (
    "train_split",
    "loss_on",
    "max_train_rows",
    "val_size",
    "overlap",
    "guard",
    "guard_dir",
)
"""Fields of `data` that only apply to training."""
REPLY_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the reply length limit in `gen_kwargs`; the first is the harness' own."""
_GENERATION = {
    **dict.fromkeys(REPLY_TOKENS, Annotated[int, at_least(1)]),
    "temperature": Annotated[float, at_least(0)],
    "do_sample": bool,
}

_ITEMS = Rule(
    "a number of items or a fraction below 1",
    lambda limit: 0 < limit < 1 or (limit >= 1 and float(limit).is_integer()),
)


@dataclass(kw_only=True)
class EvalConfig(Record):
    """One evaluation: models on tasks, every model with the same prompts, one table.

    Raises:
        ConfigError: values are missing or out of range; one error lists all faults.
    """

    where: ClassVar[str] = "eval"

    models: list[str] = field(default_factory=list, metadata={"positional": True})
    """Models to evaluate: folders or Hub names of models and PEFT adapters, or `tlora train`
    folders. NAME=PATH sets the name in tables."""
    tasks: list[str] | str = field(default_factory=list)
    """Tasks, "a,b": from `tlora list evaluations` or lm-evaluation-harness; with `test_file`, and
    for models with a head, from `tlora list tasks` (default: jsonl)."""
    output_dir: Annotated[str, FOLDER] = "tlora-eval"
    """Folder for the results; rerun the same command to resume."""
    model: str | None = None
    """Base model for the adapters, instead of the one they name; alone, the model to evaluate."""
    adapter: str | None = None
    """An adapter to evaluate, like a positional argument."""
    with_base: bool = False
    """Also evaluate the base model of each adapter first, as the baseline for comparison."""
    merge: bool = False
    """Evaluate each adapter merged into its base in memory, instead of unmerged."""
    with_merged: bool = False
    """Evaluate each adapter both merged and unmerged."""
    laplace: bool = False
    """Also evaluate each adapter with predictions averaged by a Laplace approximation fitted to its
    training rows (Laplace-LoRA), and report -nll and -ece for all models; for classification
    and multiple choice by likelihood."""
    train_file: str | None = None
    """Training rows of a classifier for `laplace`; by default, those recorded by its run."""
    num_fewshot: Annotated[int, at_least(0)] | None = None
    """Few-shot examples before each question; by default, the task's own number."""
    limit: Annotated[float, _ITEMS] | None = None
    """Evaluate only the first items of each task: a number, or a fraction below 1."""
    batch_size: Annotated[int, at_least(1)] | Literal["auto"] = 16
    """Prompts per batch, or "auto"; the longest come first."""
    max_batch_size: Annotated[int, at_least(1)] = 64
    """Initial batch size for "auto"."""
    max_length: Annotated[int, at_least(1)] | None = None
    """Maximum tokens of prompt and reply; by default, the model's own limit. Longer prompts lose
    their beginning."""
    gen_kwargs: dict[str, Any] = field(default_factory=dict)
    """Generation options over the task's: max_gen_toks=256,temperature=0.7,do_sample=true."""
    apply_chat_template: bool = False
    """Format prompts with the tokenizer's chat template."""
    fewshot_as_multiturn: bool = False
    """With a chat template, add few-shot examples as earlier turns of the chat."""
    system_instruction: str | None = None
    """Text to put before every prompt."""
    data_dir: str | None = None
    """Folder with the tasks' files, to use instead of the Hub."""
    test_file: str | None = None
    """Files of rows to score for a task of `tlora list tasks`, in the formats of `tlora train`."""
    allow_code_execution: bool = False
    """Run programs written by models, for tasks that need it, in the sandbox described in
    docs/evaluation.md. Python code that comes with a task's YAML also runs, without a sandbox."""
    sandbox: Sandbox = "namespaces"
    """Sandbox for programs; "landlock" is weaker, for machines that forbid the first."""
    n_samples: Annotated[int, at_least(1)] = 1
    """Programs to generate per coding problem; with more than 1, sampled instead of greedy."""
    backend: Backend = "hf"
    """Generation backend: transformers, or vLLM if installed."""
    dtype: Dtype = "auto"
    """Precision to load models in; "auto" uses the checkpoint's own, or float32 on a CPU."""
    quantization: Quantization = "none"
    """Quantize the base model with bitsandbytes while loading: "nf4" or "int8"."""
    device: str | None = None
    """Device to compute on ("cuda:1"); by default, the first accelerator."""
    parallelize: bool = False
    """Spread a model that does not fit on one device over all devices."""
    tokenizer: str | None = None
    """Tokenizer for all models, instead of each base model's own."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model or with a task's YAML."""
    seed: Annotated[int, SEED] = 1234
    """Seed for choosing few-shot examples and for sampling."""
    chat_prompt: ChatPrompt = "auto"
    """Prompt format for conversations: the chat "template" of the run or model, the paper's
    "instruction" prompt (as in `--task chat`), "raw" text, or "auto": the format the run was
    trained in, else the template if there is one, else the instruction prompt."""
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
        """Return the models to evaluate, as the user wrote them."""
        given = [*self.models, *([self.adapter] if self.adapter else [])]
        return given or ([self.model] if self.model else [])

    @property
    def only_grades(self) -> bool:
        """Whether only a judge is given, to grade the conversations in the folder."""
        return self.judge.url is not None and not self.entries()

    def limited(self, there: int) -> int:
        """Return how many of ``there`` items to evaluate, according to `limit`."""
        if self.limit is None:
            return there
        wanted = int(self.limit) if self.limit >= 1 else math.ceil(self.limit * there)
        return min(there, wanted)

    def settings(self) -> dict[str, Any]:
        """Return the settings that can change a score, as plain JSON values."""
        values = self.to_dict()
        return {name: values[name] for name in SETTINGS}

    def relations(self) -> Iterator[str]:
        """Yield errors in combinations of fields and in free-form fields."""
        for name in self.data.given():
            if name in _OF_TRAINING:
                yield f"`data.{name}` only applies to training; remove it."
        if ":" not in str(self.test_file):
            yield from self.data.undrawn()
        for name, kind in _GENERATION.items():
            if name in self.gen_kwargs:
                yield from fault(f"gen_kwargs.{name}", kind, self.gen_kwargs[name])
        if not (self.entries() or self.judge.url):
            yield "no model to evaluate is given; give the folder of a model or an adapter."
        if not (self.tasks or self.only_grades):
            yield "`tasks` is empty; give --tasks (see `tlora list evaluations`)."
        if self.merge and self.with_merged:
            yield "`merge` and `with_merged` are both set; keep one of them."
        if self.train_file and not self.laplace:
            yield "`train_file` has no effect without `laplace`; remove it."
        if self.laplace and self.backend != "hf":
            yield "`laplace` needs gradients, which vLLM does not provide; remove --backend."
