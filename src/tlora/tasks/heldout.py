"""Hold out training rows for evaluation: `data.val_size`."""

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
            f" ({len(groups)} distinct prompts); choose a value that leaves rows on both sides."
        )
    return sorted(chosen)
