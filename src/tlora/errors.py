"""The library's exception tree.

Every message says what was wrong (value and name), where (module, file, field), and what to do. The
second base of a class is the builtin that a caller who does not know ``tlora`` would catch.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import ClassVar

from tlora.credentials import redacted


class TLoraError(Exception):
    """Base of everything that tlora raises on purpose; its message shows no credential."""

    def __str__(self) -> str:
        return redacted(super().__str__())

    exit_code: ClassVar[int] = 2
    """Exit code of the command line: 2 if the input is at fault, otherwise 1."""


class ConfigError(TLoraError, ValueError):
    """One or more fields of a configuration are wrong; all faults are listed at once."""

    def __init__(
        self, faults: str | Sequence[str], where: str = "configuration", placed: bool = False
    ) -> None:
        self.placed = placed
        """Whether each fault contains its own location."""
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


class OutOfMemoryError(CalibrationError, MemoryError):
    """The calibration pass needs more memory than available."""

    exit_code = 1


class ProcessError(CalibrationError):
    """Another process of the group failed with an error from outside this tree."""

    exit_code = 1


class RunsFailedError(TLoraError, RuntimeError):
    """Runs of a comparison failed; the others are kept."""

    exit_code = 1


class PlanError(TLoraError, ValueError):
    """Ranks, scales or subspaces cannot be planned from these statistics."""


class AdapterError(TLoraError, RuntimeError):
    """An adapter cannot be attached to, loaded into or read from this model."""


class MisfitError(AdapterError):
    """A saved adapter does not match this model's sizes; ``misfit`` says where."""

    def __init__(self, path: object, model: str, misfit: str, advice: str) -> None:
        self.misfit = misfit
        super().__init__(f"{path} does not fit {model}: {misfit}; {advice}")


class VerificationError(TLoraError, RuntimeError):
    """An artifact is not of the expected form, or the requested reader loads it incorrectly."""

    exit_code = 1


class DivergenceError(TLoraError, FloatingPointError):
    """A training diverged; ``step`` is the first one whose loss or gradients are not finite."""

    exit_code = 1

    def __init__(self, message: str, step: int) -> None:
        self.step = step
        super().__init__(message)


class DataError(TLoraError, ValueError):
    """A data file or a row of it does not match the task's format."""


class ArtifactError(TLoraError, OSError):
    """A file that tlora wrote (calibration, plan, run folder) is missing or damaged."""


class JudgeError(TLoraError, RuntimeError):
    """A judge did not answer, even after retries."""

    exit_code = 1


class SandboxError(TLoraError, RuntimeError):
    """Programs cannot be run here as safely as requested."""

    exit_code = 1


class DiskFullError(TLoraError, OSError):
    """No disk space is left for writing."""

    exit_code = 1


class FileError(TLoraError, OSError):
    """The system refuses to read or write a requested file."""


_FULL = (
    "No space left on device",
    "Disk quota exceeded",
    "PytorchStreamWriter failed",
    "unexpected pos",
    "iostream error",
)
"""A full disk in the messages of safetensors and torch, which have no error number."""
_FOREIGN = re.compile(r"\(os error (\d+)\)(?: at path \"([^\"]*)\")?")
"""A system error in the messages of safetensors."""
_PEER_GONE = ("Connection closed by peer", "Connection reset by peer")
"""The death of another process of the group in torch's messages."""


def system_fault(error: BaseException) -> TLoraError | None:
    """Return the error of this tree for a refusal by the system; None for any other error.

    Args:
        error: raised by a library or Python while reading or writing a file.
    """
    number, file = getattr(error, "errno", None), getattr(error, "filename", None)
    if number is None and (told := _FOREIGN.search(str(error))):
        number, file = int(told[1]), told[2] or "a file"
    if number in (errno.ENOSPC, errno.EDQUOT) or any(each in str(error) for each in _FULL):
        return DiskFullError(
            f"no space left on the disk{f' for {file}' if file else ''}; free some space and"
            " rerun the same command to resume: finished work is kept."
        )
    if "gloo" in str(error) and any(each in str(error) for each in _PEER_GONE):
        return ProcessError(
            "another process of the launch has ended; see its lines, and rerun the same command to"
            " resume."
        )
    if number is not None and file is not None:
        short = str(file) if len(str(file)) < 200 else f"{str(file)[:80]}..."
        said = getattr(error, "strerror", None) or os.strerror(number)
        return FileError(f"{short}: {said}; check the path and its permissions.")
    return None


class Faults:
    """Collects refusals of checks, so that all are reported at once.

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
        """Keep the check's error; any other exception passes."""
        if isinstance(error, (ConfigError, DataError, ArtifactError)):
            self._found.append(error)
            return True
        return False

    def raise_found(self) -> None:
        """Raise the collected error, or a ConfigError of all of them."""
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
    """Return the first line of an error's message; other libraries' messages can fill pages.

    The type is named if the message alone says little: a KeyError's is the key.
    """
    lines = str(error).strip().splitlines()
    kind = type(error).__name__
    if not lines or isinstance(error, LookupError):
        return ": ".join([kind, *lines[:1]])
    # A line that ends in a colon announces the next one.
    said = " ".join(line.strip() for line in lines[: 1 + lines[0].endswith(":")])
    return _CLASS.sub(r"\1", said)


_CLASS = re.compile(r"<class '(?:\w+\.)*(\w+)'>")
"""How Python shows a class; its name says the same."""


@contextlib.contextmanager
def damaged(path: object, advice: str = "make it again") -> Iterator[None]:
    """Turn any error from reading a file's content into a sentence with the file's name.

    For files that may be truncated or edited: their content can fail in any way.

    Args:
        path: the file.
        advice: what the user should do.

    Raises:
        ArtifactError: the reader cannot read the content.
    """
    try:
        yield
    except (ArtifactError, MemoryError):
        raise
    except Exception as error:
        cause = " ".join(str(error).split()) if isinstance(error, TLoraError) else first_line(error)
        raise ArtifactError(f"{path}: damaged ({cause.rstrip('.')}); {advice}.") from error


_MEANT = {
    alias: name
    for name, aliases in {
        "r": "rank lora_r lora_rank",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "target_modules": "lora_target lora_target_modules lora_target_linear",
        "learning_rate": "lr",
        "lr_scheduler_type": "lr_scheduler scheduler",
        "optim": "optimizer",
        "num_train_epochs": "epochs num_epochs",
        "max_steps": "steps num_steps",
        "warmup_steps": "warmup warmup_ratio",
        "per_device_train_batch_size": "batch_size",
        "batch_size": "micro_batch_size train_batch_size",
        "gradient_accumulation_steps": "gradient_accumulation grad_accum",
        "eval_strategy": "evaluation_strategy",
        "packing": "sample_packing",
        "early_stopping": "patience early_stopping_patience",
        "model": "model_name_or_path base_model",
        "quantization": "load_in_4bit load_in_8bit quantization_bit",
        "method": "finetuning_type use_dora use_rslora",
        "continue_from": "adapter_name_or_path lora_model_dir",
        "output_dir": "output",
        "seed": "random_state",
        "train_file": "train_data data_path",
        "eval_file": "eval_data eval_dataset validation_file",
        "dataset": "dataset_name datasets",
        "val_size": "val_set_size test_size",
        "max_train_rows": "max_samples max_train_samples",
        "max_length": "max_seq_length max_seq_len max_len cutoff_len sequence_len model_max_length",
        "chat_template": "template",
        "system": "system_prompt",
        "prompt_column": "prompt",
        "response_column": "response",
    }.items()
    for alias in aliases.split()
}
"""Other tools' names of our flags and fields: Axolotl's, LLaMA-Factory's, older transformers'."""


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first names, and the number of others: "a, b, c and 4 more"."""
    more = f" and {len(names) - most} more" if names[most:] else ""
    return ", ".join(names[:most]) + more


def shortened(value: object, most: int = 200) -> str:
    """Return the part of a row or value that a message shows: its first characters."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name closest to ``name``, else ``""``.

    Dotted names of one section are compared without it, and flags without their dashes, because
    these parts are always equal. The first letters must agree, unless little else differs. A name
    without a section is looked up in all of them.
    """

    def alike(left: str, right: str) -> float:
        ratio = difflib.SequenceMatcher(None, left.lower(), right.lower()).ratio()
        return ratio if left[:1].lower() == right[:1].lower() or ratio >= 0.8 else 0.0

    def likeness(other: str) -> float:
        bare, known_name = name.lstrip("-"), other.lstrip("-")
        (section, _, last), (others, _, end) = bare.rpartition("."), known_name.rpartition(".")
        if end == _MEANT.get(last, last) and section in ("", others):
            return 2.0
        if section == others:
            return alike(last, end)
        near = alike(last, end) if not section else 0.0
        return max(alike(bare, known_name), near if near >= 0.8 else 0.0)

    best = max(known, key=likeness, default="")
    return f" Did you mean {best!r}?" if best and likeness(best) >= 0.65 else ""


def unknown_names(
    names: Iterable[str], known: Sequence[str], kind: str, elsewhere: Sequence[str] = ()
) -> list[str]:
    """Return a sentence, with a suggestion, for each name that is not among ``known``.

    Args:
        names: the given names.
        known: the valid names.
        kind: the word for a name in the sentence: "field", "option".
        elsewhere: names that are suggested too, although they are not valid here.
    """
    return [
        f"there is no {kind} `{name}`.{did_you_mean(name, [*known, *elsewhere])}"
        for name in names
        if name not in known
    ]
