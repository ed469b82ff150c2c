"""`native`: the trained rank and scale of each module; exact in readers that support PEFT's
patterns."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from tlora.exporters.base import Export, Source, in_dtype, write_lora


class Native:
    """Writes the LoRA unchanged, or in another dtype."""

    needs: ClassVar[str | None] = None

    def write(self, source: Source, folder: Path) -> Export:
        """Write the folder; see `Exporter`."""
        lora, dtype = source.lora, source.config.dtype
        tensors = {
            name: in_dtype(tensor, dtype) if tensor.is_floating_point() else tensor
            for name, tensor in lora.tensors.items()
        }
        write_lora(folder, lora.fields, tensors)
        return Export(largest_rank=max(lora.rank(name) for name in lora.keys))
