"""Combine files into one source of rows: "a.jsonl,b.csv", globs, weights "a.jsonl,b.jsonl:0.3".

Each file keeps its own columns. A dataset of several files therefore has two columns: each row as
JSON and its location. `placed` yields rows and locations of either kind.
"""

from __future__ import annotations

import glob
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset

_PLACE, _ROW = "__place__", "__row__"


@dataclass(frozen=True)
class Part:
    """One file, and the fraction of its rows to draw."""

    path: str
    weight: float = 1.0


def written(files: Any, where: str) -> Any:
    """Convert a list of files to the text that `parts` reads; return other values unchanged.

    Args:
        files: items are paths, or {path, weight}.
        where: the field, for error messages.

    Raises:
        ConfigError: an item is something else.
    """
    if not isinstance(files, list):
        return files
    texts = []
    for item in files:
        known = isinstance(item, dict) and set(item) <= {"path", "weight"}
        if isinstance(item, str):
            texts.append(item)
        elif known and isinstance(item.get("path"), str):
            weight = item.get("weight", 1)
            texts.append(item["path"] if weight == 1 else f"{item['path']}:{weight}")
        else:
            raise ConfigError(
                f"`{where}` has {item!r}; give paths, or {{path: FILE, weight: 0.5}}.",
                where="run",
            )
    return ",".join(texts) or None


def parts(files: str) -> list[Part]:
    """Return the files named by "a.jsonl,b/*.csv:0.5", with globs in alphabetical order.

    Raises:
        DataError: a glob matches no file, a weight is not positive, or no file is named.
    """
    found = []
    for word in [files] if Path(files).exists() else filter(None, map(str.strip, files.split(","))):
        path, weight = _weighted(word)
        matches = [path]
        if glob.has_magic(path) and not Path(path).exists():
            matches = sorted(glob.glob(path, recursive=True))  # noqa: PTH207
            if not matches:
                raise DataError(f"{path}: no file matches this pattern.")
        found += [Part(each, weight) for each in matches]
    if not found:
        raise DataError(f"{files!r} contains no file name; give the path of a file with rows.")
    return found


def _weighted(word: str) -> tuple[str, float]:
    """Return path and weight of "a.jsonl:0.3"; a file name may contain colons."""
    path, _, said = word.rpartition(":")
    if not path or Path(word).exists():
        return word, 1.0
    try:
        weight = float(said)
    except ValueError:
        if not Path(path).is_file():
            return word, 1.0
        weight = math.nan
    if not 0 < weight < math.inf:
        raise DataError(f"{word}: the weight is {said}; use a positive number, or remove the file.")
    return path, weight


def read(files: str, read_file: Callable[[str], Dataset], seed: int | None) -> Dataset:
    """Read the rows of one file unchanged, or of several as JSON with their locations.

    Args:
        files: text for `parts`. A weight of 0.3 draws three tenths of a file's rows; a weight of 2
            repeats each row.
        read_file: reads one file.
        seed: of the random draw; None means 0.
    """
    from datasets import Dataset

    named = parts(files)
    if len(named) == 1 and named[0].weight == 1:
        return read_file(named[0].path)
    places: list[str] = []
    rows: list[str] = []
    for part in named:
        raw = read_file(part.path)
        for index in _drawn(len(raw), part.weight, seed or 0):
            places.append(f"{part.path}, row {index + 1}")
            rows.append(json.dumps(raw[index], default=str, ensure_ascii=False))
    if not rows:
        raise DataError(f"{files}: the weights select no rows; raise them.")
    return Dataset.from_dict({_PLACE: places, _ROW: rows})


def _drawn(count: int, weight: float, seed: int) -> list[int]:
    whole, rest = int(weight), weight - int(weight)
    some = random.Random(seed).sample(range(count), round(rest * count))
    return sorted([*range(count)] * whole + some)


def placed(raw: Dataset, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row with its location ("train.jsonl, row 3"), for error messages.

    Args:
        raw: rows, as `read` returned them.
        name: name of the rows of a single file.
    """
    number = 0
    for batch in raw.iter(batch_size=1000):  # single rows are slow to read
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            number += 1
            yield (
                (row[_PLACE], json.loads(row[_ROW]))
                if _ROW in row
                else (
                    f"{name}, row {number}",
                    row,
                )
            )


def heads(raw: Dataset, name: str) -> dict[str, tuple[Mapping[str, Any], int]]:
    """Return the first row and the number of rows of each file, by file name."""
    if _ROW not in raw.column_names:
        return {name: (raw[0], len(raw))}
    found: dict[str, tuple[Mapping[str, Any], int]] = {}
    for place, row in zip(raw[_PLACE], raw[_ROW], strict=True):
        file = place.rpartition(", row ")[0]
        first, count = found.get(file) or (json.loads(row), 0)
        found[file] = (first, count + 1)
    return found


def place(raw: Dataset, name: str, index: int) -> str:
    """Return the location of one row, in the form that `placed` yields."""
    row = raw[index]
    return row[_PLACE] if _PLACE in row else f"{name}, row {index + 1}"
