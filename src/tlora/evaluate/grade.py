"""Grade the conversations in an evaluation folder with a judge, without loading a model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from tlora.errors import ConfigError
from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.evalfolder import EvalFolder
from tlora.registry import CONVERSATIONS
from tlora.scoring.mtbench.endpoint import read_key, request_body
from tlora.scoring.mtbench.judging import (
    counts,
    graded,
    judge,
    judge_prompts,
    means,
    metric_names,
)

logger = logging.getLogger(__name__)


def check_judge(config: EvalConfig) -> None:
    """Check the judge's settings before running any model.

    Raises:
        ConfigError: its key is not valid in a request.
        DataError: its prompts file is missing or damaged.
    """
    if config.judge.url:
        judge_prompts(config.judge)
        read_key(config.judge)


def grade(
    folder: EvalFolder,
    config: EvalConfig,
    protocols: Mapping[str, str],
    tell: Callable[[str], None] = lambda text: None,
) -> None:
    """Grade all conversations in the folder, of all models, with one judge.

    Grades all models again, so that a table has the grades of one judge with one set of prompts;
    the judge's earlier replies are cached and cost nothing.

    Args:
        folder: a locked evaluation folder; eval.json is read here and written at the end.
        config: the evaluation; without a judge, nothing is graded.
        protocols: protocol lines of the conversations just generated.
        tell: called with a line of text for each graded model.

    Raises:
        ConfigError: the folder has no conversations, or the judge's endpoint rejects the
            request.
        DataError: the judge's prompts file is missing or damaged.
        JudgeError: some answers could not be graded; the grades of the others are kept.
    """
    evaluation = folder.read()
    known = CONVERSATIONS.names()
    entries = [entry for entry in evaluation["tasks"] if entry["name"] in known]
    if config.only_grades and not any(entry["scores"] for entry in entries):
        raise ConfigError(
            f"{folder.path} has no conversations to grade; run one of {', '.join(known)} first.",
            where="judge",
        )
    for entry in entries:
        entry["asking"] = protocols.get(entry["name"]) or entry.get("asking", entry["protocol"])
        if config.judge.url:
            _grade(folder, entry, config, tell)
        entry["protocol"] = f"{entry['asking']}; {_by(entry.get('judge'))}"
    if entries:
        folder.write(evaluation)


def _grade(
    folder: EvalFolder, entry: dict[str, Any], config: EvalConfig, tell: Callable[[str], None]
) -> None:
    took: dict[str, Any] = {}
    scores = {}
    for model in entry["scores"]:
        # Unchecked: an interrupted grading may have written them before eval.json.
        lines = folder.read_samples(model, entry["name"])
        replies = judge(lines, config.judge, folder.judgments, f"{model}: judging")
        lines = [graded(*each) for each in zip(lines, replies, strict=True)]
        took[model], scores[model] = counts(replies), means(lines)
        entry["metrics"] = metric_names(lines)
        entry["samples"][model] = folder.write_samples(model, entry["name"], lines)
        if unrated := took[model]["unrated"]:
            logger.warning(
                "%s: %d of %d answers to %s have no grade and are excluded from the mean: %s.",
                model,
                sum(unrated.values()),
                len(lines),
                entry["name"],
                ", ".join(f"{n} {name}" for name, n in unrated.items()),
            )
        tokens = "tokens {tokens_in} in, {tokens_out} out".format(**took[model])
        tell(f"{model}: {entry['name']}: {len(lines)} answers judged; {tokens}")
    entry["scores"] = scores
    entry["judge"] = {
        "url": config.judge.url,
        "prompts": judge_prompts(config.judge).label,
        "request": {k: v for k, v in request_body(config.judge, []).items() if k != "messages"},
        "models": took,
    }


def _by(judge_entry: Mapping[str, Any] | None) -> str:
    if judge_entry is None:
        return "not graded"
    request = judge_entry["request"]
    at = request.get("temperature")
    own = "its own temperature" if at is None else f"temperature {at}"
    return f"graded 1 to 10 by {request['model']} at {own}, {judge_entry['prompts']}"
