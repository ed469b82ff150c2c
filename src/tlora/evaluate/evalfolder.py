"""The folder of an evaluation.

::

    eval.json                   models, tasks, scores, the configuration, where it was made
    samples/MODEL/TASK.jsonl    one line an item: prompt, reply, answer, target, scores
    report.html, report.md

A pair of model and task is written when all its items are scored: its samples first, then
eval.json, which names it. So a killed evaluation keeps the pairs that were finished.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tlora.errors import ArtifactError, ConfigError
from tlora.files import (
    clear_leftovers,
    locked,
    read_state,
    refuse_unless_free,
    replacing_file,
    write_state,
)
from tlora.integrity import MISMATCH, file_digest

_MADE_BY = ("tlora evaluation", 1)
_FILES = ("eval.json", "report.html", "report.md", "report.csv")


class EvalFolder:
    """The files of one evaluation; making this object touches nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.samples = self.path / "samples"
        self.judgments = self.path / "judgments"
        self._file = self.path / "eval.json"
        self._lock = self.path / ".lock"

    @property
    def exists(self) -> bool:
        """Whether an evaluation was started here."""
        return self._file.is_file()

    def read(self) -> dict[str, Any]:
        """Return what eval.json holds.

        Raises:
            ArtifactError: there is no evaluation in the folder, or the file is damaged.
        """
        if not self.exists:
            raise ArtifactError(f"{self.path}: there is no eval.json; no evaluation is here.")
        found = read_state(self._file)
        if not isinstance(found, dict) or (found.get("kind"), found.get("format")) != _MADE_BY:
            raise ArtifactError(f"{self._file}: not written by this version's `tlora eval`.")
        return found

    def refuse_unless_free(self) -> None:
        """Check that an evaluation may be written here, without writing anything.

        Raises:
            ConfigError: the folder is a file, or holds something else.
        """
        refuse_unless_free(self.path, own=self.exists)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second process from writing here, for as long as this one lives.

        Raises:
            ConfigError: one is.
        """
        refusal = ConfigError(
            f"{self.path}: another process is evaluating into it; wait for it, or give each its"
            " own --output_dir.",
            where="output_dir",
        )
        with locked(self._lock, refusal):
            clear_leftovers(self.path, _FILES)
            for folder in (self.judgments, *self.samples.glob("*/")):
                clear_leftovers(folder)
            yield

    @contextmanager
    def undone_unless_finished(self) -> Iterator[None]:
        """Remove what a new evaluation wrote, if the body raises before a pair is finished.

        So a start that fails leaves a folder that takes the corrected command.
        """
        new = not self.exists
        try:
            yield
        except Exception:
            if new and not self.samples.is_dir():
                self._file.unlink(missing_ok=True)
                self._lock.unlink(missing_ok=True)
                with suppress(OSError):  # what else is in it is the user's
                    self.path.rmdir()
            raise

    def write(self, evaluation: dict[str, Any]) -> None:
        """Write eval.json, atomically."""
        kind, form = _MADE_BY
        write_state(self._file, {"kind": kind, "format": form} | evaluation)

    def samples_file(self, model: str, task: str) -> Path:
        """Return where the samples of a pair are, or will be."""
        return self.samples / model / f"{file_name(task)}.jsonl"

    def write_samples(self, model: str, task: str, lines: list[dict[str, Any]]) -> str:
        """Write the samples of a finished pair, atomically; return the digest of the file."""
        with replacing_file(self.samples_file(model, task)) as part:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            part.write_text(text, encoding="utf-8")
            return file_digest(part)

    def read_samples(
        self, model: str, task: str, digest: str | None = None
    ) -> list[dict[str, Any]]:
        """Return the samples of a finished pair.

        Args:
            model: name of the model.
            task: name of the task.
            digest: what `write_samples` returned, as eval.json has it; None: it is not checked.

        Raises:
            ArtifactError: the file is missing or damaged.
        """
        file = self.samples_file(model, task)
        try:
            if digest not in (None, file_digest(file)):
                raise ArtifactError(
                    f"{file}: {MISMATCH}, so it was edited or is damaged; put it back as it was, or"
                    " evaluate into another folder."
                )
            with file.open(encoding="utf-8") as lines:
                return [json.loads(line) for line in lines]
        except ArtifactError:
            raise
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{file}: missing or damaged ({error}).") from error


def file_name(name: str) -> str:
    """Return a name that can be a file's: what else stands in it becomes an underscore."""
    return re.sub(r"[^\w.+-]", "_", name)
