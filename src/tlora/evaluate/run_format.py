"""The format of prompts in an evaluation: that of the runs, unless `data.format` asks for another.

A run records how its rows were written (`data.format`, `data.system`). Rows of a task are written
the same way; the evaluations of `tlora list evaluations` ask in the paper's Alpaca prompt, and
MT-Bench in the form that the run was trained in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.errors import ConfigError
from tlora.evaluate import loading, preflight
from tlora.evaluate.class_order import run_of
from tlora.evaluate.evalconfig import ChatPrompt, EvalConfig
from tlora.evaluate.evaluated_models import EvaluatedModel
from tlora.registry import EVALUATIONS, TASKS
from tlora.tasks.base import Row
from tlora.tasks.rendering import set_template, written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHAT_PROMPTS: dict[str, ChatPrompt] = {"chat": "template", "alpaca": "instruction"}


def settled(config: EvalConfig, models: Sequence[EvaluatedModel]) -> EvalConfig:
    """Return the evaluation with the format that its runs were trained in.

    Args:
        config: the evaluation.
        models: what it evaluates.

    Raises:
        ConfigError: runs differ in their format, or an evaluation asks in another one.
    """
    runs = {m.name: found for m in models if (found := recorded(m))}
    formats = {name: run["format"] for name, run in runs.items()}
    if not formats or config.data.format != "auto":
        return config
    of_a_task = preflight.of_a_task(config)
    said = ", ".join(f"{name}: {style}" for name, style in formats.items())
    if len(set(formats.values())) > 1 and of_a_task:
        raise ConfigError(
            f"the runs were trained in different formats ({said}); evaluate them apart, or give"
            " --data.format.",
            where="data.format",
        )
    style = next(iter(formats.values()))
    if of_a_task:
        system = config.data.system or next(iter(runs.values())).get("system")
        data = dataclasses.replace(config.data, format=style, system=system)
        return dataclasses.replace(config, data=data)
    pinned = [name for name in config.tasks if name in EVALUATIONS.names()]
    if pinned and set(formats.values()) != {"alpaca"}:
        raise ConfigError(
            f"{', '.join(pinned)} asks in the Alpaca prompt, and the runs were trained in another"
            f" format ({said}); give --data.format alpaca to ask all the same.",
            where="data.format",
        )
    if config.chat_prompt == "auto" and len(set(formats.values())) == 1:
        return dataclasses.replace(config, chat_prompt=_CHAT_PROMPTS.get(style, "auto"))
    return config


def recorded(evaluated: EvaluatedModel) -> dict[str, Any] | None:
    """Return how the rows of a model's run became text; None where no run or format is known.

    A task with labels has no prompts.
    """
    run = run_of(evaluated)
    values = run.config() if run else {}
    data, task = values.get("data", {}), values.get("task")
    known = task in TASKS.names() and data.get("format", "auto") != "auto"
    return data if known and evaluated.head != "labeled" else None


def template_tokenizer(evaluated: EvaluatedModel, config: EvalConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer whose chat template writes the prompts.

    It is that of `data.chat_template`, else that of the run, which is saved with the adapter.
    """
    tokenizer = loading.load_tokenizer(evaluated, config)
    if config.data.chat_template:
        set_template(tokenizer, config.data.chat_template)
    elif evaluated.adapter and (file := Path(evaluated.adapter) / "chat_template.jinja").is_file():
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    return tokenizer


def as_prompt(row: Row, tokenizer: PreTrainedTokenizerBase) -> Row:
    """Return a row as prompt and response: of a chat, all before the last answer, and this one."""
    if "messages" not in row:
        return row
    last = max(i for i, turn in enumerate(row["messages"]) if turn["role"] == "assistant")
    asked = row | {"messages": row["messages"][:last]}
    prompt = written(tokenizer, asked, prompt=True)
    return {"prompt": prompt, "response": row["messages"][last]["content"]}
