"""What every evaluation here is: rows -> prompts, replies -> answers -> scores.

The call order, by lm-evaluation-harness::

    task = SomeTask(name, data_dir, settings)   # all rows are read and checked here
    task.build_all_requests()                   # prompts; each asks for a generation
    task.apply_filters()                        # all replies at once -> a `Reading` each
    task.process_results(doc, readings)         # its scores

A subclass says how a raw row becomes a `doc`, and how replies are read. A doc is a dict of
"item" (text, the same for every model), "prompt", "target", and whatever reading needs besides.
"""

from __future__ import annotations

import copy
import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task, TaskConfig

from tlora.errors import DataError
from tlora.evaluation.answers import Protocol
from tlora.evaluation.code import truncated
from tlora.evaluation.harness.rows import Raw, Source
from tlora.evaluation.sandbox import Protection
from tlora.tasks.base import INSTRUCTION_PROMPT

Doc = dict[str, Any]

PAPER_PROMPT = "zero-shot in the prompt of training, greedy"
STOPS = ("### Instruction:",)
"""Where a reply ends if the model goes on to pose itself a further task.

The paper names no stop, and its lineage generates with none; departure, since what follows is no
longer an answer to the question.
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user decides about evaluations."""

    allow_code_execution: bool = False
    """Run what the model writes, in the sandbox; without it, evaluations of code are refused."""
    protection: Protection = "namespaces"
    """How strongly the sandbox keeps programs apart; see `tlora.evaluation.sandbox`."""
    samples: int = 1
    """Programs for each problem of code: 1 is greedy, more are drawn at `temperature`."""
    temperature: float = 0.8
    """Of drawn programs."""


@dataclass(frozen=True)
class Group:
    """A name for several evaluations."""

    members: tuple[str, ...]
    """Their names."""


@dataclass(frozen=True)
class Reading:
    """What was found in the replies to one item."""

    reply: str
    """The reply that was scored; of several, the first."""
    answer: str | None
    """The answer in it, None where there is none."""
    scores: dict[str, float]
    """By metric, from 0 (wrong) to 1."""


class ReplyTask(Task):
    """An evaluation that asks for a text and reads it.

    Args:
        name: what it is called in results.
        data_dir: the user's folder of files; None reads from the Hub.
        settings: what the user decides.

    Raises:
        DataError: the rows are missing, or one of them is not what it should be.
        SandboxError: it runs programs, which is not allowed here or not possible.
    """

    VERSION = 1
    OUTPUT_TYPE = "generate_until"
    UNSAFE_CODE = False

    source: ClassVar[Source]
    protocol: ClassVar[str]
    """Prompt, reading and scoring in a line, each with its source."""
    reads: ClassVar[str]
    """Short name of how replies are read; results are called "metric,reads"."""
    metrics: tuple[str, ...] = ("exact_match",)
    """Names of the scores, the main one first; all lie from 0 to 1, 1 is right."""
    max_gen_toks: ClassVar[int] = 512
    """Tokens of a reply."""
    stops: ClassVar[tuple[str, ...]] = STOPS
    item_column: ClassVar[str | None] = None
    """Column that names a row; without one it is the row's number, from 0."""
    runs_code: ClassVar[bool] = False
    """Whether replies are run as programs."""

    def __init__(
        self, name: str, data_dir: str | None = None, settings: Settings | None = None
    ) -> None:
        self.settings = settings or Settings()
        self.name = name
        # Not by Task.__init__, which takes a config for the task's name, and warns.
        self._config = TaskConfig(
            task=name,
            dataset_path=self.source.hub,
            num_fewshot=0,
            output_type=self.OUTPUT_TYPE,
            generation_kwargs=self.generation(),
            metadata={"version": self.VERSION, "protocol": self.protocol},
        )
        self._instances: list[Instance] | None = None
        self.fewshot_rnd = None
        self.download(data_dir)

    def generation(self) -> dict[str, Any]:
        """Return how replies are generated, as lm-evaluation-harness names it."""
        return {
            "until": list(self.stops),
            "max_gen_toks": self.max_gen_toks,
            "do_sample": False,
            "temperature": 0.0,
        }

    @abstractmethod
    def doc(self, raw: Raw, where: str) -> Doc:
        """Return {"prompt", "target", ...} of a raw row.

        Raises:
            DataError: a column is missing, or not what it should be.
        """

    @abstractmethod
    def read(self, docs: Sequence[Doc], replies: Sequence[Sequence[str]]) -> list[Reading]:
        """Read and score the replies to all ``docs``, one or more to each; in their order."""

    def keep(self, raw: Raw) -> bool:
        """Whether a row of the file belongs to the evaluation."""
        return True

    def download(
        self, data_dir: str | None = None, cache_dir: str | None = None, download_mode: Any = None
    ) -> None:
        """Read the rows; lm-evaluation-harness calls it when the task is made."""
        rows = self.source.rows(self.name, data_dir)
        raws = [(i, raw) for i, raw in enumerate(rows.raw) if self.keep(raw)]
        if not raws:
            raise DataError(
                f"{rows.place}: none of its rows belongs to {self.name}; see its source."
            )
        column = self.item_column
        named = [raw.get(column) for _, raw in raws] if column else []
        distinct = len(raws) == len({str(name) for name in named if name is not None})
        self.dataset = [
            {
                "item": str(raw[column] if distinct and column else i),
                **self.doc(raw, f"{rows.place}, row {i + 1}"),
            }
            for i, raw in raws
        ]

    def has_training_docs(self) -> bool:
        """No: nothing is shown before the question."""
        return False

    def has_validation_docs(self) -> bool:
        """No: all rows are test rows."""
        return False

    def has_test_docs(self) -> bool:
        """Yes."""
        return True

    def test_docs(self) -> list[Doc]:
        """Return every doc."""
        return self.dataset

    def doc_to_text(self, doc: Doc) -> str:
        """Return the prompt."""
        return doc["prompt"]

    def doc_to_target(self, doc: Doc) -> str:
        """Return the bare reference."""
        return doc["target"]

    def fewshot_context(self, doc: Doc, num_fewshot: int, *_: Any, **chat: Any) -> str:
        """Return the prompt; as a user's message if a chat template is asked for.

        Examples are never put before it: the protocols here are zero-shot.
        """
        system = chat.get("system_instruction")
        template: Callable[[list[dict[str, str]]], str] | None = chat.get("chat_template")
        if not chat.get("apply_chat_template") or template is None:
            return f"{system}\n\n{doc['prompt']}" if system else doc["prompt"]
        said = [{"role": "system", "content": system}] if system else []
        return template([*said, {"role": "user", "content": doc["prompt"]}])

    def construct_requests(self, doc: Doc, ctx: str, **kwargs: Any) -> Instance:
        """Return the request of one generation."""
        arguments = (ctx, copy.deepcopy(self.config.generation_kwargs))
        return Instance(self.OUTPUT_TYPE, doc, arguments, 0, metadata=kwargs["metadata"])

    def apply_filters(self) -> list[Instance]:
        """Read all replies at once; beside each request lies then its `Reading`, as a dict."""
        # Where processes share the work, the last request may have further replies as padding.
        replies = [
            [truncated(reply, self.stops) for reply in instance.resps[: instance.repeats]]
            for instance in self.instances
        ]
        readings = self.read([instance.doc for instance in self.instances], replies)
        for instance, reading in zip(self.instances, readings, strict=True):
            instance.filtered_resps[self.reads] = dataclasses.asdict(reading)
        return self.instances

    def process_results(self, doc: Doc, results: list[dict[str, Any]]) -> dict[str, float]:
        """Return the scores of one doc."""
        return dict(results[0]["scores"])

    def aggregation(self) -> dict[str, Callable[[list[float]], float]]:
        """Return the mean for every metric."""
        return dict.fromkeys(self.metrics, mean)

    def higher_is_better(self) -> dict[str, bool]:
        """Return True for every metric."""
        return dict.fromkeys(self.metrics, True)


class AnswerTask(ReplyTask):
    """An evaluation whose answer is found and compared by one protocol of `answers`."""

    rule: ClassVar[Protocol]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Take over what the rule says of itself."""
        super().__init_subclass__(**kwargs)
        if "rule" in cls.__dict__:
            cls.reads = cls.rule.name
            if "protocol" not in cls.__dict__:
                cls.protocol = f"{PAPER_PROMPT}; {cls.rule.source}"

    def read(self, docs: Sequence[Doc], replies: Sequence[Sequence[str]]) -> list[Reading]:
        """Read the first reply to each doc by the rule."""
        return [self._reading(doc, first) for doc, (first, *_) in zip(docs, replies, strict=True)]

    def _reading(self, doc: Doc, reply: str) -> Reading:
        answer = self.rule.extract(reply)
        right = answer is not None and self.rule.correct(answer, doc["target"])
        return Reading(reply, answer, {"exact_match": float(right)})


def prompt_of(instruction: str) -> str:
    """Return the paper's prompt of an instruction, as `tlora.tasks.instruct` makes it."""
    return INSTRUCTION_PROMPT.format(instruction=instruction.strip())
