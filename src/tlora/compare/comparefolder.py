"""The folder of a comparison: one JSON file a run, merged by putting the files into one folder.

::

    compare.json       the comparison as it was last started, and what its runs have in common
    runs/NAME.json     one finished or failed run
    logs/NAME.log      what a failed run wrote to its standard streams
    work/NAME/         the files of a run, for as long as it trains
    adapters/NAME/     the adapter of a final run, if they are kept
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


class CompareFolder:
    """The files of one comparison; making this object touches nothing."""

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
        """Write down what is about to run."""
        write_state(self._comparison, {"kind": _KIND, "version": 1} | comparison)

    def read(self) -> dict[str, Any]:
        """Return what `start` wrote.

        Raises:
            ArtifactError: there is no comparison in the folder, or the file is damaged.
        """
        if not self.exists:
            raise ArtifactError(f"{self.path}: there is no compare.json; no comparison is here.")
        found = read_state(self._comparison)
        if not isinstance(found, dict) or found.get("kind") != _KIND:
            raise ArtifactError(f"{self._comparison}: not written by `tlora compare`.")
        return found

    def record_file(self, name: str) -> Path:
        """Return where the record of the run ``name`` is, or will be."""
        return self.runs / f"{name}.json"

    def record(self, name: str) -> dict[str, Any] | None:
        """Return the record of the run ``name``, or None if it has not run.

        Raises:
            ArtifactError: the file is damaged, another run's or something else.
        """
        file = self.record_file(name)
        if not file.is_file():
            return None
        record = read_state(file, "remove it, and its run is done again")
        if not isinstance(record, dict) or record.get("kind") != RUN_HEADER["kind"]:
            raise ArtifactError(f"{file}: not a run of `tlora compare`; remove it.")
        if record.get("name") != name:
            raise ArtifactError(
                f"{file}: this is the record of the run {record.get('name')!r}; remove it, and the"
                " file's own run is done again."
            )
        return record

    def write_record(self, name: str, record: dict[str, Any]) -> None:
        """Write the record of a run, atomically."""
        write_state(self.record_file(name), RUN_HEADER | record | {"name": name})

    def names(self) -> list[str]:
        """Return the names of all records."""
        return sorted(file.stem for file in self.runs.glob("*.json"))

    def refuse_unless_free(self) -> None:
        """Check that a comparison may be written here, without writing anything.

        Raises:
            ConfigError: the folder is a file, cannot be written to, or holds something else.
        """
        refuse_unless_free(self.path, own=self.exists)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second process from working here, for as long as this one lives.

        Raises:
            ConfigError: one is at it; or the folder holds something else or cannot be written to,
                of which nothing is changed.
        """
        self.refuse_unless_free()
        refusal = ConfigError(
            f"{self.path}: another process is working on this comparison; wait for it, or choose"
            " another --output_dir.",
            where="output_dir",
        )
        with locked(self.path / ".lock", refusal):
            clear_leftovers(self.path, _FILES)
            for folder in (self.runs, self.adapters):
                clear_leftovers(folder)
            yield
