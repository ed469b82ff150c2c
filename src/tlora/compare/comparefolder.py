"""The folder of a comparison: one JSON file per run; copy files together to merge comparisons.

::

    compare.json       the comparison as last started, and its runs' shared settings
    runs/NAME.json     one finished or failed run
    logs/NAME.log      the output of a failed run
    work/NAME/         the files of a run while it trains
    adapters/NAME/     the adapter of a final run, if kept
    report.html, report.md, report.csv
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tlora.errors import ArtifactError, ConfigError
from tlora.files import clear_leftovers, locked, read_state, refuse_unless_free, write_state

_KIND = "tlora comparison"
_FILES = ("compare.json", "report.html", "report.md", "report.csv")
RUN_HEADER = {"kind": "tlora comparison run", "version": 1}


def tail(path: str) -> str:
    """Return the last two parts of a path, which name no folder of the machine."""
    return "/".join(Path(path).parts[-2:])


class CompareFolder:
    """The files of one comparison; creating this object touches no file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.runs = self.path / "runs"
        self.logs = self.path / "logs"
        self.adapters = self.path / "adapters"
        self.work = self.path / "work"
        self._comparison = self.path / "compare.json"

    @property
    def exists(self) -> bool:
        """Whether a comparison was started here."""
        return self._comparison.is_file()

    def start(self, comparison: dict[str, Any]) -> None:
        """Record the comparison about to run."""
        write_state(self._comparison, {"kind": _KIND, "version": 1} | comparison)

    def read(self) -> dict[str, Any]:
        """Return the data written by `start`.

        Raises:
            ArtifactError: there is no comparison in the folder, or the file is damaged.
        """
        if not self.exists:
            raise ArtifactError(
                f"{self.path}: there is no compare.json; give the folder of a comparison."
            )
        found = read_state(self._comparison)
        if not isinstance(found, dict) or found.get("kind") != _KIND:
            raise ArtifactError(
                f"{self._comparison}: not written by `tlora compare`; give another folder."
            )
        return found

    def record_file(self, name: str) -> Path:
        """Return the path of the record of the run ``name``."""
        return self.runs / f"{name}.json"

    def record(self, name: str) -> dict[str, Any] | None:
        """Return the record of the run ``name``, or None if it has not run.

        Raises:
            ArtifactError: the file is damaged, belongs to another run or has other contents.
        """
        file = self.record_file(name)
        if not file.is_file():
            return None
        record = read_state(file, "remove it to repeat its run")
        if not isinstance(record, dict) or record.get("kind") != RUN_HEADER["kind"]:
            raise ArtifactError(f"{file}: not a run of `tlora compare`; remove it.")
        if record.get("name") != name:
            raise ArtifactError(
                f"{file}: this is the record of the run {record.get('name')!r}; remove it to repeat"
                " the run that belongs here."
            )
        return record

    def write_record(self, name: str, record: dict[str, Any]) -> None:
        """Write the record of a run, atomically."""
        write_state(self.record_file(name), RUN_HEADER | record | {"name": name})

    def names(self) -> list[str]:
        """Return the names of all records."""
        return sorted(file.stem for file in self.runs.glob("*.json"))

    def refuse_unless_free(self) -> None:
        """Check that a comparison may use this folder, without writing anything.

        Raises:
            ConfigError: the path is a file, not writable, or has other contents.
        """
        refuse_unless_free(self.path, own=self.exists)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder against other processes while this one runs.

        Raises:
            ConfigError: another process holds the lock, or the folder has other contents or is not
                writable; nothing is changed.
        """
        self.refuse_unless_free()
        refusal = ConfigError(
            f"{self.path}: another process is running this comparison; wait for it, or use another"
            " --output_dir.",
            where="output_dir",
        )
        with locked(self.path / ".lock", refusal):
            clear_leftovers(self.path, _FILES)
            for folder in (self.runs, self.adapters):
                clear_leftovers(folder)
            yield
