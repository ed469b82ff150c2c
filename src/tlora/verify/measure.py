"""Measure replies: of the adapter under each reader's rule, an export, a GGUF in llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tlora.adapter.saved import SavedLora
from tlora.errors import ConfigError
from tlora.exporters.gguf import BASE
from tlora.exporters.readers import READERS
from tlora.verify import llamacpp
from tlora.verify.replies import Difference, Models, Replies, logs, scaled_as, written
from tlora.verify.verdicts import Verdict
from tlora.verify.verifyconfig import VerifyConfig

LIMIT = 0.1
"""Largest acceptable difference of an export's replies, relative to the adapter's effect."""
_NOISE = 3
"""Tolerance for llama.cpp's adapter, as a multiple of its base's difference to transformers."""


@dataclass
class Measured:
    """Results for the screen, for JSON, and for the exit code."""

    lines: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def add(self, title: str, difference: Difference, effect: Difference) -> None:
        """Record the difference of a model to the adapter."""
        self.lines.append(f"{title}: {difference.words(effect)}")
        share = difference.of_effect(effect)
        self.record[title] = {**vars(difference), "of_effect": share}


@dataclass(frozen=True)
class _Setting:
    models: Models
    prompts: list[list[int]]
    count: int

    @classmethod
    def of(cls, config: VerifyConfig, lora: SavedLora, base: str) -> _Setting | str:
        """Return the setting, or a line with the reason why replies are not compared."""
        models = Models(base, config.trust_remote_code)
        if not models.writes(str(lora.path)):
            return "replies: skipped, the model does not generate text"
        try:
            prompts = models.prompts(str(lora.path), config.prompts)
        except ConfigError as error:
            if config.prompts:
                raise
            return f"replies: skipped ({error.faults[0].rstrip('.')})"
        return cls(models, prompts, config.max_new_tokens)

    def adapted(self, model: Any, tokenizer: Any) -> Replies:
        """Return the replies of the adapter on its base, which the other models read."""
        own = written(model, tokenizer, self.prompts, self.count)
        return Replies(own, logs(model, self.prompts, own))

    def replies(self, model: Any, tokenizer: Any, meant: Replies) -> Replies:
        """Return the replies of another model."""
        own = written(model, tokenizer, self.prompts, self.count)
        return Replies(own, logs(model, self.prompts, meant.written))


def readers(
    config: VerifyConfig, lora: SavedLora, base: str, verdicts: Sequence[Verdict]
) -> Measured:
    """Measure the replies under the scales of each inexact reader."""
    setting = _Setting.of(config, lora, base)
    if isinstance(setting, str):
        return Measured([setting])
    wrong = [verdict.reader for verdict in verdicts if verdict.error and not verdict.exact]
    rules = {each.title: each.scales(lora) for each in READERS if each.name in wrong}
    found: dict[str, Difference] = {}

    def use(model: Any, tokenizer: Any) -> Replies:
        meant = setting.adapted(model, tokenizer)
        for title, scales in rules.items():
            with scaled_as(model, scales):
                found[title] = Difference.of(setting.replies(model, tokenizer, meant), meant)
        return meant

    meant = setting.models.run(str(lora.path), use)
    effect = _effect(setting, base, meant)
    measured = Measured()
    measured.add("base without the adapter", effect, effect)
    for title, difference in found.items():
        measured.add(title, difference, effect)
    return measured


def export(config: VerifyConfig, lora: SavedLora, base: str, path: Path) -> Measured:
    """Measure the difference between an export's and the adapter's replies in transformers."""
    setting = _Setting.of(config, lora, base)
    if isinstance(setting, str):
        return Measured([setting])
    meant = setting.models.run(str(lora.path), setting.adapted)
    effect = _effect(setting, base, meant)
    found = setting.models.run(str(path), lambda m, t: setting.replies(m, t, meant))
    measured, difference = Measured(), Difference.of(found, meant)
    measured.add("base without the adapter", effect, effect)
    measured.add(f"replies of {path}", difference, effect)
    if (difference.of_effect(effect) or 0.0) > LIMIT:
        measured.faults.append(f"replies of {path}: {difference.words(effect)}")
    return measured


def _effect(setting: _Setting, base: str, meant: Replies) -> Difference:
    found = setting.models.run(base, lambda m, t: setting.replies(m, t, meant))
    return Difference.of(found, meant)


def gguf(config: VerifyConfig, lora: SavedLora, base: str, file: Path) -> Measured:
    """Measure llama.cpp's next-token difference to the adapter, and between both bases.

    Differences within the noise of llama.cpp's base are not errors.
    """
    stored = file.with_name(BASE)
    if not llamacpp.is_installed():
        return Measured(["llama.cpp: skipped; it needs `pip install xllamacpp`"])
    if not stored.is_file():
        return Measured([f"llama.cpp: skipped, {stored} does not exist; export with --base_gguf"])
    setting = _Setting.of(config, lora, base)
    if isinstance(setting, str):
        return Measured([setting])

    def first(model: Any, _: Any) -> list[Any]:
        return logs(model, setting.prompts, [[0]] * len(setting.prompts))

    def letter(tokenizer: Any) -> int:
        return int(tokenizer("a", add_special_tokens=False)["input_ids"][-1])

    meant, mark = setting.models.run(str(lora.path), lambda m, t: (first(m, t), letter(t)))
    plain = setting.models.run(base, first)
    rows = meant[0].shape[1]
    ours = llamacpp.next_tokens(stored, file, setting.prompts, rows, mark)
    theirs = llamacpp.next_tokens(stored, None, setting.prompts, rows, mark)
    right, before = _first(meant), _first(plain)
    effect = Difference.of(before, right)
    noise, found = Difference.of(_first(theirs), before), Difference.of(_first(ours), right)
    measured = Measured()
    measured.add("base without the adapter, next token", effect, effect)
    measured.add("llama.cpp's base against transformers', next token", noise, effect)
    measured.add("llama.cpp with the adapter, next token", found, effect)
    if found.norm > max(LIMIT * effect.norm, _NOISE * noise.norm):
        measured.faults.append(f"llama.cpp's next token: {found.words(effect)}")
    return measured


def _first(found: list[Any]) -> Replies:
    return Replies([[int(each[0].argmax())] for each in found], found)
