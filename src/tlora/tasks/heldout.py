"""Rows held out of the training rows, to evaluate on: `data.val_size`."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

from tlora.errors import DataError
from tlora.tasks.base import Row
from tlora.tasks.contamination import prompt_of
from tlora.tasks.dataconfig import DataConfig
from tlora.tasks.normalize import normalize


def held_out(rows: Sequence[Row], data: DataConfig, name: str) -> list[int]:
    """Return the indices of the rows to hold out, in their order.

    Rows that ask the same go to the same side, so a few more or less than asked may be held out.

    Args:
        rows: all training rows, as a task makes them.
        data: `val_size` says how many, `subset_seed` (0, if not given) which.
        name: what messages call the rows.

    Raises:
        DataError: no row is left on a side.
    """
    size = float(data.val_size or 0)
    wanted = round(len(rows) * size) if size < 1 else int(size)
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        prompt = prompt_of(row)
        texts = (prompt,) if isinstance(prompt, str) else prompt
        groups[tuple(" ".join(normalize(text)) for text in texts)].append(index)
    chosen: list[int] = []
    together = [*groups.values()]
    for group in random.Random(data.subset_seed or 0).sample(together, len(together)):
        if len(chosen) + len(group) <= wanted:
            chosen += group
    if not 0 < len(chosen) < len(rows):
        raise DataError(
            f"{name}: `data.val_size` {data.val_size!r} holds out {len(chosen)} of {len(rows)} rows"
            f" ({len(groups)} questions); both sides need rows."
        )
    return sorted(chosen)
