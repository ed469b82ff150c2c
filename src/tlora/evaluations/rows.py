"""Where an evaluation's rows are: a file under the user's folder, or a dataset on the Hub."""

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
    """Where one evaluation's rows can be had."""

    files: tuple[str, ...]
    """Paths under the user's folder, tried in this order, each also with ".gz"."""
    origin: str
    """Who publishes these files, for whoever has to get them."""
    hub: str | None = None
    """Name of the dataset on the Hub; None: it is not there in this form."""
    configs: tuple[str | None, ...] = (None,)
    """Configurations (subsets) of `hub`, whose rows follow one another."""
    split: str = "test"
    """Split of `hub`."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Source:
        """Return what the `dataset_kwargs` of an evaluation's YAML say."""
        configs = given.get("configs", (None,))
        return cls(tuple(given["files"]), given["origin"], given.get("hub"), configs)

    def rows(self, name: str, data_dir: str | None) -> tuple[str, list[Raw]]:
        """Return where the rows are and all of them.

        They are under ``data_dir`` if one is given, else on the Hub. A folder is never mixed with
        the Hub: what is missing in it is an error.

        Args:
            name: the evaluation's, for the message of an error.
            data_dir: the user's folder.

        Raises:
            DataError: there are none, or they cannot be read.
        """
        file = self.check(name, data_dir)
        if file is not None:
            return str(file), read_json(file)
        hub = str(self.hub)
        parts = [source.read_hub(hub, config, self.split) for config in self.configs]
        return f"{hub}, {self.split}", [row for part in parts for row in part]

    def check(self, name: str, data_dir: str | None) -> Path | None:
        """Return the file that `rows` reads, None for the Hub; nothing is read.

        Args:
            name: the evaluation's, for the message of an error.
            data_dir: the user's folder.

        Raises:
            DataError: the folder has none of the files, or the rows are not on the Hub.
        """
        if data_dir is None:
            if self.hub is None:
                raise DataError(
                    f"{name}: its rows are not on the Hub; give the folder that holds"
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
    """Read a JSON list, or JSON lines, of objects; a further ".gz" is unpacked.

    Plain JSON and not a table, since a column of tests holds values of many types.

    Raises:
        DataError: it cannot be read, is not that, or is empty.
    """
    rows: list[Any] = []
    text = "".join(source.decoded(path))
    try:
        # Not splitlines(): a string may hold other line breaks than "\n".
        for line in text.split("\n") if ".jsonl" in path.suffixes else [text]:
            rows += [json.loads(line)] if line.strip() else []
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON after row {len(rows)} ({error}).") from error
    if len(rows) == 1 and isinstance(rows[0], list):
        rows = rows[0]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: there are no rows with named columns; get the file again.")
    return rows
