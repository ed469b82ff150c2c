"""Read raw rows from a JSON, JSONL, CSV, TSV, Parquet or text file, or a Hub dataset.

Values keep their exact text: a reader that guesses types turns 007 into 7, a date into a timestamp
and, next to 2.5, 3 into 3.0. Table cells are therefore text, and JSON values other than text are
stored as JSON.
"""

from __future__ import annotations

import codecs
import functools
import gzip
import io
import itertools
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.errors import ConfigError, DataError, first_line, shortened
from tlora.models.pretrained import check_hub

if TYPE_CHECKING:
    from datasets import Dataset

# "NA", "null" and "None" are ordinary text here, not missing values.
_CSV = {"keep_default_na": False, "na_values": [""]}
_TSV = _CSV | {"sep": "\t", "quoting": 3}

_PACKED = (".gz", ".zst")
_SMALL = 2**22
"""Maximum number of bytes that `columns_of` reads."""
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""Start of a surrogate pair in JSON."""


def existing_file(path: str) -> Path:
    """Return ``path`` if it is a file.

    Raises:
        DataError: it is not a file.
    """
    if Path(path).is_dir():
        raise DataError(f"{path} is a folder; give the path of a file with rows.")
    if not Path(path).is_file():
        raise DataError(f"{path}: there is no such file; give the path of a file with rows.")
    return Path(path)


def decoded(path: Path) -> Iterator[str]:
    """Yield the text of a file, possibly .gz or .zst, in chunks; every line ends in a newline.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    line = 1
    try:
        with _opened(path) as file:
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
        raise DataError(
            f"{path}: cannot be read ({error}); download or copy the file again."
        ) from error


def _opened(path: Path) -> Any:
    if path.suffix == ".zst":
        import pyarrow

        return pyarrow.input_stream(str(path), compression="zstd")
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def read_file(path: str) -> Dataset:
    """Read a file of rows according to its suffix, unpacking `.gz` and `.zst`.

    Raises:
        DataError: the file is missing, of an unknown kind, damaged or without rows.
    """
    rows = reader_of(path)(path)
    if not (rows.column_names and len(rows)):
        raise _no_rows(path)
    return rows


def reader_of(path: str) -> Callable[[str], Dataset]:
    """Return the function that reads a file, without reading rows.

    Raises:
        DataError: the file is missing, of an unknown kind or empty.
    """
    file = existing_file(path)
    suffix = next((part for part in reversed(file.suffixes) if part not in _PACKED), "").lower()
    if suffix not in READERS:
        known = ", ".join(READERS)
        raise DataError(
            f"{path}: files of type {suffix or file.name!r} are not supported; use {known}."
        )
    if file.stat().st_size == 0:
        raise _no_rows(path)
    return READERS[suffix]


def columns_of(path: str) -> list[str] | None:
    """Return the columns of a small JSONL file; None if that needs reading the rows."""
    file = Path(path)
    if file.suffix != ".jsonl" or file.stat().st_size > _SMALL:
        return None
    try:
        return _columns(_json_rows(path)) or None
    except DataError:
        return None  # reading the rows reports the error


def _json(path: str) -> Dataset:
    import pyarrow
    from datasets import Dataset
    from datasets.fingerprint import generate_random_fingerprint

    held: dict[str, list[Any]] = {}
    for count, row in enumerate(_json_rows(path)):
        for column in row:
            if column not in held:
                if "\0" in column:
                    raise DataError(
                        f"{path}: row {count + 1} has the column {column!r}; remove the NUL"
                        " character from its name."
                    )
                held[column] = [None] * count
        for column, values in held.items():
            values.append(row.get(column))
    coded = []
    for column, values in held.items():
        if not all(value is None or isinstance(value, str) for value in values):
            held[column] = [None if value is None else json.dumps(value) for value in values]
            coded.append(column)
    columns = {name: pyarrow.array(held.pop(name), pyarrow.large_string()) for name in [*held]}
    # Without a fingerprint, `datasets` would pickle all rows to make one.
    texts = Dataset(pyarrow.table(columns), fingerprint=generate_random_fingerprint())
    return texts.with_transform(functools.partial(_uncoded, coded=coded)) if coded else texts


def _uncoded(batch: dict[str, list[Any]], coded: Sequence[str]) -> dict[str, list[Any]]:
    values = {name: batch[name] for name in coded if name in batch}
    return batch | {
        name: [None if text is None else json.loads(text) for text in texts]
        for name, texts in values.items()
    }


def _columns(rows: Iterable[dict[str, Any]]) -> list[str]:
    return [*dict.fromkeys(column for row in rows for column in row)]


def _json_rows(path: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON file: the items of a list, or one per line.

    Raises:
        DataError: the file is not JSON, or a row is not an object.
    """
    for number, (value, text) in enumerate(_json_values(path), start=1):
        row = {"text": value} if isinstance(value, str) else value
        if not isinstance(row, dict):
            said = shortened(json.dumps(row))
            raise DataError(
                f"{path}: row {number} is {said}; make it an object with named columns, or drop it."
            )
        if _HALF.search(text):
            check_whole(row, f"{path}: row {number}")
        yield row


def check_whole(row: Mapping[str, Any], where: str) -> None:
    """Check that a row's text is valid Unicode, which tokenizers require.

    Raises:
        DataError: it has half of a surrogate pair.
    """
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise DataError(
            f"{where} has {half}, half of a surrogate pair; fix or drop the row."
        ) from None


def _json_values(path: str) -> Iterator[tuple[Any, str]]:
    """Yield the values of a file, one per line, or those of its list, with text that holds each.

    One line at a time is in memory if the first one is JSON by itself.
    """
    lines = enumerate(_lines(decoded(Path(path))), start=1)
    number, line = next((each for each in lines if each[1].strip()), (0, ""))
    if not line:
        return
    try:
        first = _loads(line)
    except (ValueError, RecursionError):
        text = "\n" * (number - 1) + "\n".join([line, *(more for _, more in lines)])
        yield from _items(_whole(path, text, line, number), text)
        return
    others = ((place, text) for place, text in lines if text.strip())
    second = next(others, None)
    if second is None:
        yield from _items(first, line)
        return
    yield first, line
    for place, text in itertools.chain([second], others):
        yield _parsed(path, text, place), text


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a text that comes in pieces."""
    begun: list[str] = []
    for piece in pieces:
        end, *others = piece.split("\n")
        begun.append(end)
        for other in others:
            yield "".join(begun)
            begun = [other]
    yield "".join(begun)


def _items(value: Any, text: str) -> Iterator[tuple[Any, str]]:
    half = _HALF.search(text)  # found once for all items
    for item in value if isinstance(value, list) else [value]:
        yield item, half[0] if half else ""


def _whole(path: str, text: str, line: str, number: int) -> Any:
    """Parse a file as one value; if several values follow each other, report the first line."""
    try:
        return _loads(text)
    except json.JSONDecodeError as error:
        several = error.msg == "Extra data"
        return _parsed(path, line if several else text, number if several else 1)
    except (ValueError, RecursionError):
        return _parsed(path, text, None)


def _parsed(path: str, text: str, line: int | None) -> Any:
    """Parse a text that begins at a line of the file.

    Raises:
        DataError: it is not JSON.
    """
    try:
        return _loads(text)
    except json.JSONDecodeError as error:
        said = f"{error.msg} at character {error.colno}"
        line = (line or 1) + error.lineno - 1
    except (ValueError, RecursionError) as error:
        said = "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
    at = f"line {line}: " if line else ""
    raise DataError(f"{path}: cannot be read as rows ({at}{said}).")


def _loads(text: str) -> Any:
    """Parse JSON; NaN and the infinities, which are not JSON, become missing values."""
    return json.loads(text, object_pairs_hook=_object, parse_constant=lambda _: None)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"{twice!r} appears twice in one object")
    return found


def _csv(path: str) -> Dataset:
    return _table(path, _CSV)


def _tsv(path: str) -> Dataset:
    return _table(path, _TSV)


def _table(path: str, options: dict[str, Any]) -> Dataset:
    import pandas
    from datasets import Dataset

    text = "".join(decoded(Path(path)))
    if not text.strip():
        raise _no_rows(path)
    try:
        cells = pandas.read_csv(io.StringIO(text), dtype=str, **options)
    except ValueError as error:
        said = first_line(error).removeprefix("Error tokenizing data. C error: ")
        raise DataError(f"{path}: cannot be read as rows ({said}).") from error
    if "\0" in "".join(cells.columns):
        raise DataError(f"{path}: is not UTF-8 (it looks like UTF-16); save the file as UTF-8.")
    if not isinstance(cells.index, pandas.RangeIndex):  # pandas reads extra fields as an index
        raise DataError(
            f"{path}: rows have more fields than the header ({', '.join(cells.columns)});"
            " name every field, or quote texts that contain the separator."
        )
    return Dataset.from_pandas(cells, preserve_index=False)


def _parquet(path: str) -> Dataset:
    return _load(path, "parquet", data_files=path, split="train")


def _text(path: str) -> Dataset:
    from datasets import Dataset

    lines = "".join(decoded(Path(path))).split("\n")
    return Dataset.from_dict({"text": [line for line in lines if line.strip()]})


READERS: dict[str, Callable[[str], Dataset]] = {
    ".json": _json,
    ".jsonl": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".txt": _text,
}


def _no_rows(path: str) -> DataError:
    return DataError(f"{path}: there are no rows; give a file with rows.")


def read_hub(name: str, config: str | None, split: str) -> Dataset:
    """Read one split of a dataset on the Hub.

    Raises:
        DataError: the dataset or split does not exist, or cannot be reached.
    """
    if not Path(name).exists():
        try:
            check_hub(name, "README.md", kind="dataset")
        except ConfigError as error:
            raise DataError(" ".join(error.faults)) from error
    return _load(name, name, name=config, split=split)


def _load(where: str, builder: str, **options: Any) -> Dataset:
    import datasets

    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    log = logging.getLogger("datasets")
    level = log.level
    log.setLevel(logging.CRITICAL)  # our own message reports a broken file
    try:
        return datasets.load_dataset(builder, **options)
    except MemoryError:
        raise
    except Exception as error:  # damaged metadata can raise anything
        if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
            raise _no_rows(where) from error
        raise DataError(f"{where}: cannot be read as rows ({_innermost(error)}).") from error
    finally:
        log.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def _innermost(error: BaseException) -> str:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return " ".join(str(error).split())
