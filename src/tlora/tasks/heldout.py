"""Hold out training rows for evaluation: `data.val_size`."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Sequence

from tlora.errors import DataError
from tlora.tasks.base import Row
from tlora.tasks.contamination import prompt_of
from tlora.tasks.dataconfig import DataConfig
from tlora.tasks.normalize import normalize


def held_out(rows: Sequence[Row], data: DataConfig, name: str) -> list[int]:
    """Return the indices of the rows to hold out, in order.

    Rows with the same prompt stay on the same side, so the number may differ slightly.

    Args:
        rows: all training rows, as converted by a task.
        data: `val_size` sets how many rows, `subset_seed` (default 0) which ones.
        name: name of the rows in messages.

    Raises:
        DataError: one side of the split is empty.
    """
    size = float(data.val_size or 0)
    wanted = round(len(rows) * size) if size < 1 else int(size)
    numbers: dict[bytes, int] = {}
    sizes: list[int] = []
    group_of = array("q")
    for row in rows:
        number = numbers.setdefault(_digest(row), len(sizes))
        if number == len(sizes):
            sizes.append(0)
        sizes[number] += 1
        group_of.append(number)
    left, groups = wanted, set()
    for number in random.Random(data.subset_seed or 0).sample(range(len(sizes)), len(sizes)):
        if sizes[number] <= left:
            groups.add(number)
            left -= sizes[number]
    chosen = [index for index, number in enumerate(group_of) if number in groups]
    if not 0 < len(chosen) < len(rows):
        raise DataError(
            f"{name}: `data.val_size` {data.val_size!r} holds out {len(chosen)} of {len(rows)} rows"
            f" ({len(sizes)} distinct prompts); choose a value that leaves rows on both sides."
        )
    return chosen


def _digest(row: Row) -> bytes:
    """Return a digest of a row's normalized prompt; the prompts themselves take too much memory."""
    prompt = prompt_of(row)
    texts = (prompt,) if isinstance(prompt, str) else prompt
    whole = "\0".join(" ".join(normalize(text)) for text in texts)
    return hashlib.blake2b(whole.encode(), digest_size=16).digest()
