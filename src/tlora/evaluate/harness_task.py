"""Run tasks of lm-evaluation-harness on one model at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tlora.errors import ConfigError, did_you_mean
from tlora.evaluate.evalconfig import REPLY_TOKENS, EvalConfig
from tlora.evaluate.loading import unheard
from tlora.scoring.confidence import calibration_error, log_probabilities

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from transformers import PreTrainedTokenizerBase

    from tlora.evaluate.evaluated_models import EvaluatedModel

logger = logging.getLogger(__name__)

_ONE_NAME = dict.fromkeys(REPLY_TOKENS, REPLY_TOKENS[0])


@dataclass(frozen=True)
class TaskResult:
    """Result of one model on one task."""

    lines: list[dict[str, Any]]
    """One line per item, as in `samples/MODEL/TASK.jsonl`."""
    scores: dict[str, float]
    """The task's scores, the main one first; higher is always better."""
    truncated: int = 0
    """Number of prompts truncated to the model's context length."""


def with_odds(
    found: TaskResult, logits: Sequence[Any], right: Sequence[Sequence[int]]
) -> TaskResult:
    """Add the quality of the probabilities to a result: "-nll" and "-ece".

    Args:
        found: the result.
        logits: one array per item with the logits of its choices.
        right: the indices of the right choices of each item.
    """
    import numpy as np

    odds = [log_probabilities(np.asarray(each)) for each in logits]
    certain = [
        float(np.logaddexp.reduce(each[list(gold)])) for each, gold in zip(odds, right, strict=True)
    ]
    hits = [each.argmax() in gold for each, gold in zip(odds, right, strict=True)]
    error = calibration_error(np.exp([each.max() for each in odds]), np.array(hits, dtype=float))
    lines = [
        line | {"scores": line["scores"] | {"-nll": value}}
        for line, value in zip(found.lines, certain, strict=True)
    ]
    scores = found.scores | {"-nll": float(np.mean(certain)), "-ece": -error}
    return dataclasses.replace(found, lines=lines, scores=scores)


class HarnessTask:
    """A task of lm-evaluation-harness, configured by an evaluation."""

    def __init__(self, task: Task, config: EvalConfig) -> None:
        from lm_eval.evaluator_utils import get_sample_size

        from tlora.evaluations.catalog import protocol

        self._task, self._config = task, config
        _set_up(task, config)
        limit = get_sample_size(task, config.limit)
        there = len(task.eval_docs)
        self.items = there if limit is None else min(limit, there)
        self.shots = task.config.num_fewshot or 0
        self.protocol: str = protocol(task)
        # Mutual information adds a second request per choice, without a context.
        informed = any("mutual_info" in metric for metric in task.aggregation())
        chooses = task.OUTPUT_TYPE == "multiple_choice" and not informed
        self.has_odds = chooses and task.has_training_docs()

    def check(
        self, evaluated: EvaluatedModel, tokenizer: PreTrainedTokenizerBase, longest: int
    ) -> None:
        """Check before loading the model that it supports the task.

        Args:
            evaluated: the model.
            tokenizer: its tokenizer.
            longest: its context length in tokens, prompt and reply.

        Raises:
            ConfigError: there is no room for a prompt, a required chat template is missing, or
                `gen_kwargs` has a name unknown to transformers.
        """
        from lm_eval.models.utils import normalize_gen_kwargs

        if self._config.apply_chat_template and not tokenizer.chat_template:
            raise ConfigError(
                f"{evaluated.name}: the tokenizer has no chat template; remove"
                " --apply_chat_template.",
                where=self._task.task_name,
            )
        if self._task.OUTPUT_TYPE != "generate_until":
            return
        if faults := _unknown(self._config):
            raise ConfigError(faults, where="eval")
        tokens = normalize_gen_kwargs(self._task.config.generation_kwargs)["max_gen_toks"]
        check_room(self._task.task_name, evaluated, tokens, longest)

    def evaluate(self, lm: Any) -> TaskResult:
        """Run all items on one model.

        Args:
            lm: the model, wrapped for the harness.
        """
        import transformers
        from lm_eval import evaluate

        from tlora.evaluate.records import likelihoods, metrics, records, right_options
        from tlora.evaluations.catalog import ours

        config, task = self._config, self._task
        name, system = task.task_name, config.system_instruction
        if system and ours(task) and not config.apply_chat_template:
            system += "\n\n"
        # So that a sampled reply does not depend on earlier requests.
        transformers.set_seed(config.seed)
        task.set_fewshot_seed(seed=config.seed)
        if hasattr(lm, "fit"):
            lm.fit(self._training_requests(lm, system))
        before = getattr(lm, "truncated", 0)
        # The printed lines report long prompts one by one; they are counted and reported once.
        printed = contextlib.redirect_stdout(io.StringIO())
        with printed, unheard("lm_eval", "transformers.tokenization_utils_base"):
            found = evaluate(
                lm=lm,
                task_dict={"tasks": {name: task}, "groups": {}},
                limit=config.limit,
                bootstrap_iters=0,
                log_samples=True,
                system_instruction=system,
                apply_chat_template=config.apply_chat_template,
                fewshot_as_multiturn=config.fewshot_as_multiturn,
                confirm_run_unsafe_code=config.allow_code_execution,
            )
        lines = records(task, found["samples"][name])
        scores = metrics(found["results"][name])
        lower = [key for key in scores if not _higher(task, key)]
        result = TaskResult(
            [line | {"scores": _turned(line["scores"], lower)} for line in lines],
            _turned(scores, lower),
            getattr(lm, "truncated", 0) - before,
        )
        if not config.laplace:
            return result
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        logits = [likelihoods(task, sample) for sample in samples]
        return with_odds(result, logits, [right_options(task, sample) for sample in samples])

    def _training_requests(self, lm: Any, system: str | None) -> list[Any]:
        """Return the requests for evaluating the training rows."""
        config, task = self._config, self._task
        chat = {"apply_chat_template": config.apply_chat_template}
        if config.apply_chat_template:
            chat["chat_template"] = lm.apply_chat_template
        requests: list[Any] = []
        for number, doc in enumerate(task.training_docs()):
            context = task.fewshot_context(
                doc,
                num_fewshot=task.config.num_fewshot or 0,
                system_instruction=system,
                fewshot_as_multiturn=config.fewshot_as_multiturn,
                gen_prefix=task.doc_to_prefix(doc),
                **chat,
            )
            named = (task.task_name, number, 1)
            requests += task.construct_requests(doc=doc, ctx=context, metadata=named, **chat)
        return requests


def check_room(task: str, evaluated: EvaluatedModel, tokens: int, longest: int) -> None:
    """Check that a model has room for prompt and reply; encoder-decoders hold them separately.

    Args:
        task: name of the task, for the message.
        evaluated: the model.
        tokens: maximum tokens of a reply.
        longest: context length of the model, prompt and reply.

    Raises:
        ConfigError: it has no room.
    """
    if evaluated.head == "causal" and tokens >= longest:
        raise ConfigError(
            f"a reply may take {tokens} tokens, but {evaluated.name} has room for {longest}"
            " including the prompt; lower it with --gen_kwargs max_gen_toks=N.",
            where=task,
        )


def _set_up(task: Task, config: EvalConfig) -> None:
    """Override the task's settings with the user's, as `lm_eval` does."""
    own = task.get_config("num_fewshot")
    if config.num_fewshot is not None and own == 0 and config.num_fewshot > 0:
        logger.warning("%s is always zero-shot; ignoring `num_fewshot`.", task.task_name)
    elif config.num_fewshot is not None:
        task.set_config(key="num_fewshot", value=config.num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    if task.OUTPUT_TYPE == "generate_until" and config.gen_kwargs:
        value = _generation(config.gen_kwargs)
        task.set_config(key="generation_kwargs", value=value, update=True)


def _generation(given: dict[str, Any]) -> dict[str, Any]:
    """Normalize the user's generation options so that they override the task's.

    The harness would prefer the task's `max_gen_toks` to the user's `max_new_tokens`, and ignore
    a temperature if the task is greedy.
    """
    found = {_ONE_NAME.get(name, name): value for name, value in given.items()}
    if float(found.get("temperature") or 0) > 0:
        found.setdefault("do_sample", True)
    return found


def _unknown(config: EvalConfig) -> list[str]:
    """Return an error for each name in `gen_kwargs` that transformers does not support."""
    from transformers import GenerationConfig

    if config.backend != "hf":
        return []
    known = [*REPLY_TOKENS, "until", *GenerationConfig().to_dict()]
    return [
        f"`gen_kwargs` has the unknown option {name!r}; remove it.{did_you_mean(name, known)}"
        for name in config.gen_kwargs
        if name not in known
    ]


def _higher(task: Task, key: str) -> bool:
    return task.higher_is_better().get(key.partition(",")[0]) is not False


def _turned(scores: dict[str, float], lower: list[str]) -> dict[str, float]:
    """Negate the scores for which lower is better, as in -perplexity."""
    return {f"-{k}" if k in lower else k: -v if k in lower else v for k, v in scores.items()}
