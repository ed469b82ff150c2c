"""The folder of an evaluation.

::

    eval.json                   models, tasks, scores, the configuration, where it was made
    samples/MODEL/TASK.jsonl    one line per item: prompt, reply, answer, target, scores
    report.html, report.md

Once all items of a model and task are scored, the samples are written first, then eval.json, which
lists the pair. An interrupted evaluation therefore keeps its finished pairs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
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


def unnegated(scores: Mapping[str, float]) -> dict[str, float]:
    """Return scores as people read them.

    The files hold a metric where lower is better negated and under its name with a minus, as
    `-loss`, so that higher is always better.
    """
    return {
        name.removeprefix("-"): -value if name.startswith("-") and value else value
        for name, value in scores.items()
    }


class EvalFolder:
    """The files of one evaluation; creating this object touches no file."""

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
        """Return the contents of eval.json.

        Raises:
            ArtifactError: there is no evaluation in the folder, or the file is damaged.
        """
        if not self.exists:
            raise ArtifactError(
                f"{self.path}: there is no eval.json; give the folder of an evaluation."
            )
        found = read_state(self._file)
        if not isinstance(found, dict) or (found.get("kind"), found.get("format")) != _MADE_BY:
            raise ArtifactError(
                f"{self._file}: another version of `tlora eval` wrote this file; evaluate into"
                " another folder."
            )
        return found

    def refuse_unless_free(self) -> None:
        """Check that an evaluation may use this folder, without writing anything.

        Raises:
            ConfigError: the path is a file, or the folder has other contents.
        """
        refuse_unless_free(self.path, own=self.exists)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder against other processes while this one runs.

        Raises:
            ConfigError: another process holds the lock.
        """
        refusal = ConfigError(
            f"{self.path}: another process is evaluating into this folder; wait for it, or use"
            " another --output_dir.",
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
        """Return the samples file of a model and task."""
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
            digest: the digest from `write_samples`, as in eval.json; None skips the check.

        Raises:
            ArtifactError: the file is missing or damaged.
        """
        file = self.samples_file(model, task)
        try:
            if digest not in (None, file_digest(file)):
                raise ArtifactError(
                    f"{file}: {MISMATCH}, so it was edited or is damaged; restore it, or"
                    " evaluate into another folder."
                )
            with file.open(encoding="utf-8") as lines:
                return [json.loads(line) for line in lines]
        except ArtifactError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            raise ArtifactError(f"{file}: missing or damaged ({error}); restore it.") from error


def file_name(name: str) -> str:
    """Return a valid file name, with other characters replaced by underscores."""
    return re.sub(r"[^\w.+-]", "_", name)
