"""The one exception tree of the library.

Every message says what was wrong (value and name), where (module, file, field), and what to do.
The second base of a class is the builtin that a caller without ``tlora`` in mind would catch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from types import TracebackType

from tlora.credentials import redacted


class TLoraError(Exception):
    """Base of everything that tlora raises on purpose; its message shows no credential."""

    def __str__(self) -> str:
        return redacted(super().__str__())


class ConfigError(TLoraError, ValueError):
    """One or more fields of a configuration are wrong; all faults are listed at once."""

    def __init__(
        self, faults: str | Sequence[str], where: str = "configuration", placed: bool = False
    ) -> None:
        self.placed = placed
        """Whether each fault says itself where it is."""
        self.faults: tuple[str, ...] = (faults,) if isinstance(faults, str) else tuple(faults)
        self.where = where
        if len(self.faults) == 1:
            message = f"{where}: {self.faults[0]}"
        else:
            lines = "".join(f"\n  - {fault}" for fault in self.faults)
            message = f"{where}: {len(self.faults)} faults:{lines}"
        super().__init__(message)


class CalibrationError(TLoraError, RuntimeError):
    """The calibration pass cannot give statistics for this model and these samples."""


class PlanError(TLoraError, ValueError):
    """Ranks, scales or subspaces cannot be planned from these statistics."""


class AdapterError(TLoraError, RuntimeError):
    """An adapter cannot be attached to, loaded into or read from this model."""


class MisfitError(AdapterError):
    """A saved adapter is not of this model's sizes; ``misfit`` says where."""

    def __init__(self, path: object, model: str, misfit: str, advice: str) -> None:
        self.misfit = misfit
        super().__init__(f"{path} does not fit {model}: {misfit}; {advice}")


class DivergenceError(TLoraError, FloatingPointError):
    """A training diverged; ``step`` is the first one whose loss or gradients are not finite."""

    def __init__(self, message: str, step: int) -> None:
        self.step = step
        super().__init__(message)


class DataError(TLoraError, ValueError):
    """A data file or a row of it is not what the task expects."""


class ArtifactError(TLoraError, OSError):
    """A file that tlora wrote (calibration, plan, run folder) is missing or damaged."""


class JudgeError(TLoraError, RuntimeError):
    """A judge of answers did not answer, though it was asked again."""


class SandboxError(TLoraError, RuntimeError):
    """Programs cannot be run here as safely as was asked for."""


class Faults:
    """Collects what checks refuse, so that everything is reported at once.

    Example:
        >>> faults = Faults("run")
        >>> with faults:
        ...     raise ConfigError("`model` is missing.", "model")
        >>> with faults:
        ...     raise DataError("rows.jsonl: there is no such file.")
        >>> faults.raise_found()
        Traceback (most recent call last):
        tlora.errors.ConfigError: run: 2 faults:
          - model: `model` is missing.
          - rows.jsonl: there is no such file.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._found: list[ConfigError | DataError | ArtifactError] = []

    def __enter__(self) -> None:
        """Start a check."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        """Keep what the check refuses; any other exception passes."""
        if isinstance(error, (ConfigError, DataError, ArtifactError)):
            self._found.append(error)
            return True
        return False

    def raise_found(self) -> None:
        """Raise the one error that was collected, or a ConfigError of all of them."""
        sentences = dict.fromkeys(each for error in self._found for each in _placed(error))
        if len(sentences) == 1 or len(self._found) == 1:
            raise self._found[0]
        if sentences:
            raise ConfigError(list(sentences), self._where, placed=True)


def _placed(error: ConfigError | DataError | ArtifactError) -> list[str]:
    if not isinstance(error, ConfigError):
        return [str(error)]
    place = "" if error.placed else f"{error.where}: "
    return [f"{place}{fault}" for fault in error.faults]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; other libraries' messages can fill pages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first names, and how many there are besides: "a, b, c and 4 more"."""
    more = f" and {len(names) - most} more" if names[most:] else ""
    return ", ".join(names[:most]) + more


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name closest to ``name``, else ``""``."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def unknown_names(names: Iterable[str], known: Sequence[str], kind: str) -> list[str]:
    """Return a sentence, with a suggestion, for each name that is not among ``known``.

    Args:
        names: what was given.
        known: what there is.
        kind: what a name is called in the sentence: "field", "option".
    """
    return [
        f"there is no {kind} `{name}`.{did_you_mean(name, known)}"
        for name in names
        if name not in known
    ]
