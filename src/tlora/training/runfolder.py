"""The folder of a run on disk, and how a later process reads it.

::

    run.json           the resolved configuration, digests of the rows and of the base model,
                       whether the run is finished, what it took; the memory budget and the way of
                       its calibration, the digest of its plan, an id that its checkpoints carry,
                       and its own digest
    provenance.json    versions, seed, git commit and machine, one record for each start
    plan.safetensors   the plan of the adapter, if the method makes one; or
    initial.safetensors  A and B before training, if the method decides them
    log.jsonl          every line that the trainer logs
    checkpoints/       the trainer's checkpoint-N folders, each with a manifest.json
    adapter/           the final plain PEFT adapter (of `full`: the model), with the tokenizer and a
                       model card
    metrics.json       the scores, where there are rows to evaluate on
    .lock              while a process is at the run

Small files and the adapter are written to a temporary name and renamed; the next command removes a
killed run's temporary files. Tensors carry a digest in their header. Checkpoints:
`tlora.training.checkpoints`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.errors import ArtifactError, ConfigError
from tlora.files import (
    clear_leftovers,
    is_leftover,
    locked,
    read_json,
    read_state,
    refuse_unusable,
    replacing_file,
    write_json,
    write_state,
)
from tlora.integrity import file_digest
from tlora.training.checkpoints import last_whole
from tlora.training.digests import field_at

if TYPE_CHECKING:
    from tlora.methods.base import Plan

logger = logging.getLogger(__name__)

_KIND = "tlora run"
_PACKAGES = ("tlora", "torch", "transformers", "peft", "trl", "accelerate", "datasets")


class RunFolder:
    """The folder of one run; constructing this object touches nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.plan = self.path / "plan.safetensors"
        self.initial = self.path / "initial.safetensors"
        self.log = self.path / "log.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.metrics = self.path / "metrics.json"
        self._run = self.path / "run.json"
        self._provenance = self.path / "provenance.json"
        self._lock = self.path / ".lock"

    @property
    def exists(self) -> bool:
        """Whether a run was started here."""
        return self._run.is_file()

    @property
    def finished(self) -> bool:
        """Whether the run here is finished."""
        return self.exists and self._read().get("status") == "finished"

    @property
    def verb(self) -> str:
        """The verb that started the run here: "train" or "init"."""
        return str(self._read().get("verb"))

    def inputs(self) -> dict[str, str]:
        """Return the digests of the run's inputs at its start, by field."""
        return self._read().get("inputs", {})

    def run_id(self) -> str | None:
        """Return the id that marks this run's checkpoints; None without a run."""
        return self._read().get("id") if self.exists else None

    def settled(self) -> list[str]:
        """Return the dotted names of fields that were not given and got a value for this run."""
        return self._read().get("settled", []) if self.exists else []

    def calibration(self) -> dict[str, Any]:
        """Return the memory budget and the method of the run's calibration; {} without one."""
        return self._read().get("calibration", {}) if self.exists else {}

    def processes(self) -> int:
        """Return the number of processes of the run's last start."""
        return self._read().get("processes", 1)

    def config(self) -> dict[str, Any]:
        """Return the resolved configuration of the run's start."""
        return self._read()["config"]

    def _read(self) -> dict[str, Any]:
        run = read_state(self._run, "restore it, or start a new run in another --output_dir")
        if not isinstance(run, dict) or run.get("kind") != _KIND or "config" not in run:
            raise ArtifactError(f"{self._run}: not written by `tlora`; choose another folder.")
        return run

    def refuse_unless_free(self) -> None:
        """Check that a new run may start here, without writing anything.

        Raises:
            ConfigError: the folder is not empty.
        """
        refuse_unusable(self.path)
        if any(path.is_file() and not self._passing(path) for path in self.path.rglob("*")):
            fault = f"{self.path} is not empty and holds no run; choose another --output_dir."
            raise ConfigError(fault, where="output_dir")

    def _passing(self, path: Path) -> bool:
        """Whether a file belongs to no run: the lock, or a killed process's temporary file."""
        return path == self._lock or any(map(is_leftover, path.relative_to(self.path).parts))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second process from running here, for as long as this one lives.

        In a launch the first process holds the lock for all. Everything made for the lock is
        removed
        with it: an otherwise empty folder does not stay behind.

        Raises:
            ConfigError: another process is using it, or the folder cannot be written to.
        """
        if os.environ.get("RANK", "0") != "0":
            yield
            return
        refuse_unusable(self.path)
        path = self.path.absolute()
        new = [folder for folder in (path, *path.parents) if not folder.exists()]
        refusal = ConfigError(
            f"{self.path}: another process is using this run; wait for it, or choose another"
            " --output_dir.",
            where="output_dir",
        )
        with locked(self._lock, refusal):
            plans, logs = (self.plan, self.initial), (self.log, self._provenance)
            written = (self._run, *plans, *logs, self.adapter, self.metrics)
            clear_leftovers(self.path, {path.name for path in written})
            try:
                yield
            finally:
                self._lock.unlink(missing_ok=True)
                # The trainer creates a folder for checkpoints before any check.
                for folder in (self.checkpoints, *new):
                    with contextlib.suppress(OSError):  # not empty, or missing
                        folder.rmdir()

    @contextlib.contextmanager
    def undone_unless(self, underway: Callable[[], bool]) -> Iterator[None]:
        """Remove a new run's files if the body raises before the run is ``underway``.

        So a failed start leaves a folder that accepts the corrected command. After a kill or an
        interrupt the files stay, and the run can be resumed.
        """
        new = os.environ.get("RANK", "0") == "0" and not self.exists
        try:
            yield
        except Exception:
            if new and not underway():
                self.clear()
                self._run.unlink(missing_ok=True)
            raise

    def refuse_changed(self, inputs: dict[str, str]) -> None:
        """Check that the inputs of a resumed run are unchanged.

        Args:
            inputs: current digests, from `digests.inputs_of`.

        Raises:
            ConfigError: rows or model have changed or are missing; each is named.
        """
        config = self.config()
        faults = [
            f"`{name}`, {field_at(config, name)}, has changed since the run was "
            "started; restore it, or start a new run in another --output_dir."
            if name in inputs
            else f"`{name}`, {field_at(config, name)}, is missing; restore it, or give its "
            f"new path by --{name}."
            for name, before in self.inputs().items()
            if inputs.get(name) != before
        ]
        if faults:
            raise ConfigError(faults, where="run")

    def start(
        self,
        config: dict[str, Any],
        verb: str,
        plan: Plan | None = None,
        inputs: dict[str, str] | None = None,
        settled: Sequence[str] = (),
    ) -> None:
        """Record the start of a run; a resumed run adds its provenance.

        From the first file on, the folder can be resumed.

        Args:
            config: the resolved configuration.
            verb: "train" or "init".
            plan: the decisions before training.
            inputs: digests of the inputs, which a resumed run must match.
            settled: dotted names of fields of ``config`` that were not given; a resumed run keeps
                their original values.
        """
        run = {"kind": _KIND, "version": 1, "verb": verb, "status": "started", "config": config}
        run |= {"inputs": inputs or {}, "id": self.run_id() or uuid.uuid4().hex}
        run |= {"settled": [*settled] or self.settled(), "processes": process_count()}
        run |= {"calibration": getattr(plan, "info", {}).get("calibration", {})}
        write_state(self._run, run)
        start = provenance(seed=config.get("seed"), output=self.path)
        write_json(self._provenance, {"starts": [*self._starts(), start]})
        if plan is not None and self._saved() is None:
            plan.save(self.path)
        if (saved := self._saved()) is not None:
            write_state(self._run, run | {"plan": file_digest(saved)})

    def _starts(self) -> list[dict[str, Any]]:
        """Return the provenance of earlier starts, as far as it is readable."""
        if not self._provenance.is_file():
            return []
        try:
            return list(read_json(self._provenance)["starts"])
        except (ArtifactError, KeyError, TypeError):
            logger.warning("%s is damaged; it is started over with this start.", self._provenance)
            return []

    def holds_weights(self) -> bool:
        """Whether anything trained is here: a complete checkpoint, or an adapter."""
        return self.adapter.is_dir() or self.last_checkpoint() is not None

    def clear(self) -> None:
        """Remove an unfinished run's files, except `run.json`, which `start` replaces."""
        for file in (self.plan, self.initial, self.log, self.metrics, self._provenance):
            file.unlink(missing_ok=True)
        for path in (self.checkpoints, self.adapter):
            shutil.rmtree(path, ignore_errors=True)

    def saved_plan(self) -> Plan | None:
        """Return the decisions made at the run's start; None if none are saved.

        Raises:
            ArtifactError: the file is damaged, or another run's.
        """
        from tlora.adapter.initial import InitialAdapter
        from tlora.adapter.plan import AdapterPlan

        file = self._saved()
        if file is None:
            return None
        plan = InitialAdapter.load(file) if file == self.initial else AdapterPlan.load(file)
        # A process that was killed just after it wrote the plan recorded no digest of it.
        if self._read().get("plan", digest := file_digest(file)) != digest:
            raise ArtifactError(
                f"{file}: it is not the plan that this run was started with; restore "
                "that, or remove the file, and the run plans again."
            )
        return plan

    def _saved(self) -> Path | None:
        return next((file for file in (self.initial, self.plan) if file.is_file()), None)

    def finish(self, measured: dict[str, Any] | None = None) -> None:
        """Mark the run as finished, with its measurements ``measured`` (plain JSON values)."""
        write_state(self._run, self._read() | {"status": "finished", "measured": measured or {}})

    def measured(self) -> dict[str, Any]:
        """Return a finished run's measurements: trainable parameters, seconds of each stage."""
        return self._read().get("measured", {})

    def last_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint; skips partial and damaged ones."""
        return last_whole(self.checkpoints, self.run_id())

    def append_log(self, line: dict[str, Any]) -> None:
        """Add one line to the log."""
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def rewind_log(self, step: int) -> None:
        """Drop the lines after ``step``, which a run resumed from there writes again."""
        if not self.log.is_file():
            return
        kept, damaged = [], []
        for number, line in enumerate(self.log.read_bytes().splitlines(), 1):
            try:
                if json.loads(line).get("step", 0) <= step:
                    kept.append(line + b"\n")
            except (ValueError, TypeError, AttributeError, RecursionError):
                damaged.append(number)
        if damaged:
            logger.warning("%s: lines %s are damaged and were skipped.", self.log, damaged)
        with replacing_file(self.log) as part:
            part.write_bytes(b"".join(kept))


def process_count() -> int:
    """Return the number of processes of this launch; a ConfigError if it is not a number."""
    given = os.environ.get("WORLD_SIZE", "1")
    if not given.isdecimal():
        raise ConfigError(f"WORLD_SIZE is {given!r}; give a number, or unset it.", where="launch")
    return int(given)


def provenance(seed: int | None, output: str | Path | None = None) -> dict[str, Any]:
    """Return what is needed to tell where a result came from, as plain JSON values.

    Args:
        seed: of the run, if it has one.
        output: the folder that results go to. It may lie in the repository whose state is told;
            its own files do not make that dirty.
    """
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seed": seed,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git": git_state(Path.cwd(), output),
        "hardware": _hardware(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state(folder: Path, output: str | Path | None = None) -> dict[str, Any] | None:
    """Return {"commit", "dirty"} of the repository that ``folder`` is in, or None.

    Files under ``output`` do not count.
    """

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", *command], cwd=folder, check=True, capture_output=True, text=True, timeout=10
        ).stdout.strip()

    try:
        commit, top = git("rev-parse", "HEAD", "--show-toplevel").splitlines()
        paths = [":/"]
        if output is not None and Path(top) in (own := Path(output).resolve()).parents:
            paths.append(f":(top,exclude,literal){own.relative_to(top).as_posix()}")
        changed = git("status", "--porcelain", "--untracked-files=all", "--", *paths)
        return {"commit": commit, "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return None


def _hardware() -> dict[str, Any]:
    import psutil  # accelerate brings it
    import torch

    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
        "torch_threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor())
