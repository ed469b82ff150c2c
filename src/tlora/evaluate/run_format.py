"""Choose the prompt format of an evaluation: that of the runs, unless `data.format` is set.

A run records how its rows were written (`data.format`, `data.system`) and saves its chat template.
Rows of a task and the questions of MT-Bench use the same format; the evaluations of `tlora list
evaluations` use the paper's Alpaca prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.errors import ConfigError, damaged, shortened
from tlora.evaluate import loading, preflight
from tlora.evaluate.class_order import run_of
from tlora.evaluate.evalconfig import ChatPrompt, EvalConfig
from tlora.evaluate.evaluated_models import EvaluatedModel
from tlora.registry import CONVERSATIONS, EVALUATIONS, TASKS
from tlora.tasks.base import Row
from tlora.tasks.rendering import set_template, written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHAT_PROMPTS: dict[str, ChatPrompt] = {
    "chat": "template",
    "alpaca": "instruction",
    "raw": "raw",
}


def settled(config: EvalConfig, models: Sequence[EvaluatedModel]) -> EvalConfig:
    """Set an evaluation's format to the one that its runs were trained in.

    Args:
        config: the evaluation.
        models: its models.

    Raises:
        ConfigError: the runs differ in format, system message or chat template, or an evaluation
            uses another format.
    """
    if all(each.head == "labeled" for each in models):
        return config  # no prompts
    runs = {m.name: found for m in models if (found := recorded(m))}
    formats = {name: run["format"] for name, run in runs.items()}
    asked, of_a_task = config.data, preflight.of_a_task(config)
    pinned = [name for name in config.tasks if name in EVALUATIONS.names()]
    if pinned and not of_a_task and asked.format == "auto" and {*formats.values()} - {"alpaca"}:
        raise ConfigError(
            f"{', '.join(pinned)} uses the Alpaca prompt, but the runs were trained in another"
            f" format ({_said(formats)}); set --data.format alpaca to evaluate anyway.",
            where="data.format",
        )
    if not (of_a_task or _converses(config)):
        return config
    style, system = asked.format, asked.system
    if style == "auto" and (of_a_task or config.chat_prompt == "auto"):
        style = _common(formats, "format") or style
    if not (system or config.system_instruction) and asked.format == "auto":
        system = _common({name: run.get("system") for name, run in runs.items()}, "system")
    if of_a_task and style == "chat" and not asked.chat_template:
        saved = {m.name: text for m in models if (text := _saved_template(m))}
        _common(saved, "chat_template", said=", ".join(saved))
    if not of_a_task and config.chat_prompt == "auto":
        prompt = _CHAT_PROMPTS.get(style, "auto")
        config, style = dataclasses.replace(config, chat_prompt=prompt), asked.format
    data = dataclasses.replace(asked, format=style, system=system)
    return dataclasses.replace(config, data=data)


def _converses(config: EvalConfig) -> bool:
    return any(name in CONVERSATIONS.names() for name in config.tasks)


def _said(values: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name}: {shortened(value or 'none', 40)}" for name, value in values.items())


def _common(values: Mapping[str, Any], field: str, said: str = "") -> Any:
    """Return the value shared by all runs; None without runs.

    Args:
        values: values by run name.
        field: of `data`.
        said: text for messages instead of the values.

    Raises:
        ConfigError: they differ.
    """
    if len(set(values.values())) > 1:
        raise ConfigError(
            f"the runs were trained with different values ({said or _said(values)}); evaluate them"
            f" separately, or set --data.{field}.",
            where=f"data.{field}",
        )
    return next(iter(values.values()), None)


def recorded(evaluated: EvaluatedModel) -> dict[str, Any] | None:
    """Return the row format recorded by a model's run; None if there is no run or format.

    A task with labels has no prompts.
    """
    run = run_of(evaluated)
    values = run.config() if run else {}
    data, task = values.get("data", {}), values.get("task")
    known = task in TASKS.names() and data.get("format", "auto") != "auto"
    return data if known and evaluated.head != "labeled" else None


def template_tokenizer(
    evaluated: EvaluatedModel, config: EvalConfig, models: Sequence[EvaluatedModel] = ()
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model, with the chat template for its prompts.

    The template comes from `data.chat_template`, else from the run, which saves it with the
    adapter. A base uses that of the first of ``models`` trained on it, for a fair comparison.
    """
    tokenizer = loading.load_tokenizer(evaluated, config)
    if config.data.chat_template:
        set_template(tokenizer, config.data.chat_template)
        return tokenizer
    compared = models if evaluated.adapter is None else ()
    runs = [evaluated, *(each for each in compared if each.model == evaluated.model)]
    if saved := next(filter(None, map(_saved_template, runs)), None):
        tokenizer.chat_template = saved
    return tokenizer


def _saved_template(evaluated: EvaluatedModel) -> str | None:
    file = Path(evaluated.adapter or "") / "chat_template.jinja"
    if evaluated.adapter is None or not file.is_file():
        return None
    with damaged(file, "copy the adapter again"):
        return file.read_text(encoding="utf-8")


def as_prompt(row: Row, tokenizer: PreTrainedTokenizerBase) -> Row:
    """Split a row into prompt and response; the response of a chat is its last answer."""
    if "messages" not in row:
        return row
    last = max(i for i, turn in enumerate(row["messages"]) if turn["role"] == "assistant")
    asked = row | {"messages": row["messages"][:last]}
    prompt = written(tokenizer, asked, prompt=True)
    return {"prompt": prompt, "response": row["messages"][last]["content"]}
