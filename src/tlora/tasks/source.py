"""Reading raw rows: a JSON, JSONL, CSV, TSV, Parquet or text file, or a dataset on the Hub."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import logging
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.errors import ConfigError, DataError
from tlora.models.pretrained import check_hub

if TYPE_CHECKING:
    from datasets import Dataset

# "NA", "null" and "None" are words of a sentence here, not missing values.
_CSV = {"keep_default_na": False, "na_values": [""]}
_TSV = _CSV | {"sep": "\t", "quoting": 3}

_SMALL = 2**22
"""Bytes that `columns_of` reads at most."""
_NULL_FIRST = re.compile(r"\s*(\[\s*)?null\b")

READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", _CSV),
    ".tsv": ("csv", _TSV),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}


def existing_file(path: str) -> Path:
    """Return ``path`` if it is a file.

    Raises:
        DataError: it is not.
    """
    if Path(path).is_dir():
        raise DataError(f"{path} is a folder; give the path of a file with rows.")
    if not Path(path).is_file():
        raise DataError(f"{path}: there is no such file; give the path of a file with rows.")
    return Path(path)


def decoded(path: Path) -> Iterator[str]:
    """Yield the text of a file, be it packed by gzip, in pieces; every line ends in a newline.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    line = 1
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            while piece := file.read(1 << 20):
                yield decoder.decode(piece)
                line += piece.count(b"\n")
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        line += error.object.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}: line {line} is not UTF-8 (byte {error.object[error.start]:#x}); save the"
            " file as UTF-8."
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); get the file anew.") from error


def read_file(path: str) -> Dataset:
    """Read a file of rows by its suffix (a further `.gz` is unpacked).

    Raises:
        DataError: the file is missing, of an unknown kind, damaged or without rows.
    """
    builder, options = reader_of(path)
    if builder != "parquet":
        # The reader of JSON lines takes other bytes, whose rows fail later.
        begins, *_ = [piece[:64] for piece in decoded(Path(path))] or [""]
        if builder == "json" and _NULL_FIRST.match(begins):  # pyarrow crashes the process
            raise DataError(f"{path}: row 1 is null; give named columns, or drop the row.")
    rows = _load(path, builder, data_files=path, split="train", **options)
    if builder == "text":
        rows = rows.filter(lambda line: line.strip(), input_columns="text")
    if len(rows) == 0:
        raise _no_rows(path)
    return rows


def reader_of(path: str) -> tuple[str, dict[str, Any]]:
    """Return the builder of `datasets` that reads a file, and its options; nothing is imported.

    Raises:
        DataError: the file is missing, of an unknown kind or empty.
    """
    file = existing_file(path)
    suffix = next((part for part in reversed(file.suffixes) if part != ".gz"), "")
    if suffix not in READERS:
        known = ", ".join(READERS)
        raise DataError(f"{path}: files of kind {suffix or file.name!r} are not read; use {known}.")
    if file.stat().st_size == 0:
        raise _no_rows(path)
    return READERS[suffix]


def columns_of(path: str) -> list[str] | None:
    """Return the columns of a small JSONL file; None where only reading the rows shows them."""
    file = Path(path)
    if file.suffix != ".jsonl" or file.stat().st_size > _SMALL:
        return None
    columns: dict[str, None] = {}
    try:
        for line in filter(str.strip, file.read_text(encoding="utf-8").split("\n")):
            columns |= dict.fromkeys(dict(json.loads(line)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None  # reading the rows says what is wrong
    return list(columns) or None


def _no_rows(path: str) -> DataError:
    return DataError(f"{path}: there are no rows.")


def read_hub(name: str, config: str | None, split: str) -> Dataset:
    """Read one split of a dataset on the Hub.

    Raises:
        DataError: it does not exist, cannot be reached, or has no such split.
    """
    if not Path(name).exists():
        try:
            check_hub(name, "README.md", kind="dataset")
        except ConfigError as error:
            raise DataError(" ".join(error.faults)) from error
    return _load(name, name, name=config, split=split)


def _load(where: str, builder: str, **options: Any) -> Dataset:
    import datasets

    unreadable = (OSError, ValueError, StopIteration, RecursionError)
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    log = logging.getLogger("datasets")
    level = log.level
    log.setLevel(logging.CRITICAL)  # what it says of a broken file, our sentence says
    try:
        return datasets.load_dataset(builder, **options)
    except (*unreadable, datasets.exceptions.DatasetsError) as error:
        # StopIteration: what the reader of JSON makes of an empty file.
        if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
            raise _no_rows(where) from error
        cause = _first_bad_line(where) or _innermost(error)
        raise DataError(f"{where}: cannot be read as rows ({cause}).") from error
    finally:
        log.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def _innermost(error: BaseException) -> str:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return " ".join(str(error).split())


def _first_bad_line(path: str) -> str | None:
    """Return which line of a JSONL file is not JSON, which the reader's own message leaves out."""
    if not path.endswith(".jsonl") or not Path(path).is_file():
        return None
    with Path(path).open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                if line.strip():
                    json.loads(line)
            except json.JSONDecodeError as error:
                return f"line {number}: {error.msg} at character {error.pos + 1}"
            except RecursionError:
                return f"line {number}: nested too deeply"
    return None
