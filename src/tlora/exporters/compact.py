"""`compact`: each module's scale folded into B, with its own rank; alpha equals the rank.

Any reader that scales by each module's alpha / rank multiplies by one.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from tlora.adapter.saved import VARIANTS, SavedLora
from tlora.exporters.base import Export, Source, in_dtype, refuse, scaled, write_lora

_NOT_BAKED = ("target_parameters", *VARIANTS)


class Compact:
    """Folds scales into B; keeps ranks and patterns for PEFT."""

    needs: ClassVar[str | None] = None

    def write(self, source: Source, folder: Path) -> Export:
        """Write the folder; see `Exporter`."""
        lora = source.lora
        refuse(lora, "`compact`", _beyond_matrices(lora), "use --format native")
        ranks = {name: lora.rank(name) for name in lora.keys}
        usual = Counter(ranks.values()).most_common(1)[0][0]
        pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != usual}
        fields = lora.fields | {
            "r": usual,
            "lora_alpha": usual,
            "use_rslora": False,
            "rank_pattern": pattern,
            "alpha_pattern": dict(pattern),
            "init_lora_weights": True,
        }
        write_lora(folder, fields, baked(lora, source.config.dtype))
        return Export(largest_rank=max(ranks.values()))


def baked(lora: SavedLora, dtype: str) -> dict[str, Tensor]:
    """Return all tensors of a LoRA, with each B times its scale, in a named dtype."""
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in lora.keys.items():
        factors = lora.factors(name)
        tensors[a] = in_dtype(factors.a, dtype)
        tensors[b] = scaled(factors.b, factors.scale, dtype)
    biases = lora.biases
    for key in lora.others:
        tensor: Any = lora.tensors[key]
        if key in biases:
            tensors[key] = scaled(tensor, lora.scale(biases[key]), dtype)
        else:
            tensors[key] = in_dtype(tensor, dtype) if tensor.is_floating_point() else tensor
    return tensors


def _beyond_matrices(lora: SavedLora) -> list[str]:
    return [f"`{name}`" for name in _NOT_BAKED if lora.fields.get(name)]
