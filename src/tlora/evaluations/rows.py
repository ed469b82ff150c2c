"""Read an evaluation's rows from the user's folder or a dataset on the Hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlora.errors import DataError
from tlora.tasks import source

Raw = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Sources of one evaluation's rows."""

    files: tuple[str, ...]
    """Paths in the user's folder, tried in this order, each also with ".gz"."""
    origin: str
    """Publisher of these files, for users who need to download them."""
    hub: str | None = None
    """Name of the dataset on the Hub; None if it is not there in this form."""
    configs: tuple[str | None, ...] = (None,)
    """Configurations (subsets) of `hub`, whose rows are concatenated."""
    split: str = "test"
    """Split of `hub`."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Source:
        """Build the source from the `dataset_kwargs` of an evaluation's YAML."""
        configs = given.get("configs", (None,))
        return cls(tuple(given["files"]), given["origin"], given.get("hub"), configs)

    def rows(self, name: str, data_dir: str | None) -> tuple[str, list[Raw]]:
        """Return the location of the rows and all rows.

        Reads from ``data_dir`` if given, else from the Hub. The two are never mixed: a file missing
        in the folder is an error.

        Args:
            name: the evaluation's name, for error messages.
            data_dir: the user's folder.

        Raises:
            DataError: the rows are missing or unreadable.
        """
        file = self.check(name, data_dir)
        if file is not None:
            return str(file), read_json(file)
        hub = str(self.hub)
        parts = [source.read_hub(hub, config, self.split) for config in self.configs]
        return f"{hub}, {self.split}", [row for part in parts for row in part]

    def check(self, name: str, data_dir: str | None) -> Path | None:
        """Return the file that `rows` reads, None for the Hub, without reading it.

        Args:
            name: the evaluation's name, for error messages.
            data_dir: the user's folder.

        Raises:
            DataError: the folder has none of the files, or the rows are not on the Hub.
        """
        if data_dir is None:
            if self.hub is None:
                raise DataError(
                    f"{name}: its rows are not on the Hub; give the folder with"
                    f" {self.files[0]} ({self.origin}) as data_dir."
                )
            return None
        tried = [Path(data_dir, f"{path}{packed}") for path in self.files for packed in ("", ".gz")]
        found = next((path for path in tried if path.is_file()), None)
        if found is None:
            raise DataError(
                f"{name}: {data_dir} has none of {', '.join(self.files)} (nor one of them with"
                f" .gz); put the file there ({self.origin})."
            )
        return found


def read_json(path: Path) -> list[Raw]:
    """Read a JSON list or JSON lines of objects, unpacking ".gz".

    Reads plain JSON, not a table, because a column of tests has values of many types.

    Raises:
        DataError: the file is unreadable, invalid or empty.
    """
    rows: list[Any] = []
    text = "".join(source.decoded(path))
    try:
        # Not splitlines(): a string may contain other line breaks than "\n".
        for line in text.split("\n") if ".jsonl" in path.suffixes else [text]:
            rows += [json.loads(line)] if line.strip() else []
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not JSON after row {len(rows)} ({error}); download the file again."
        ) from error
    if len(rows) == 1 and isinstance(rows[0], list):
        rows = rows[0]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: there are no rows with named columns; download the file again.")
    return rows
