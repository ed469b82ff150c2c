"""The last lines of a training: scores on the held-out rows, and the next commands."""

from __future__ import annotations

import shlex
from typing import Any

from tlora.adapter.saved import announced
from tlora.adapter.savedconfig import CONFIG
from tlora.files import read_json
from tlora.sealed import adapter_fields
from tlora.training.runfolder import RunFolder

_NAMES = {"mean_token_accuracy": "token accuracy"}
_NO_SCORES = ("epoch", "entropy")
_COLUMNS = ("prompt_column", "response_column", "messages_column", "text_column", "prompt_template")


def held_out(folder: RunFolder) -> str:
    """Return the scores on the held-out rows in one sentence; "" if there are none."""
    if not folder.metrics.is_file():
        return ""
    scores = ", ".join(
        f"{_NAMES.get(name, name.replace('_', ' '))} {value:.3f}"
        for name, value in read_json(folder.metrics).items()
        if isinstance(value, int | float) and name not in _NO_SCORES
    )
    rows = folder.measured().get("held_out_rows")
    return f"On the {'' if rows is None else f'{rows:,} '}held-out rows: {scores}."


def _needs_no_flags(config: dict[str, Any]) -> bool:
    """Return whether `tlora eval` reads rows like those of the training without further flags."""
    data = config["data"]
    named = any(data.get(name) for name in _COLUMNS)
    return config["task"] == "jsonl" and data.get("kind") in (None, "causal") and not named


def next_commands(folder: RunFolder) -> str:
    """Return the commands that fit the run's adapter in one line; "" if it has none."""
    if not (folder.adapter / CONFIG).is_file():
        return ""
    fields, run = adapter_fields(folder.adapter / CONFIG), shlex.quote(str(folder.path))
    said = [f"tlora chat {run}"]
    if _needs_no_flags(folder.config()):
        said.append(f"tlora eval {run} --with_base --test_file FILE")
    plain = fields.get("peft_type") == "LORA" and not any(announced(fields))
    if plain and fields.get("task_type") == "CAUSAL_LM":
        said.append(f"tlora export {run} --for vllm --output_dir served")
    return f"Next: {' · '.join(said)}"
