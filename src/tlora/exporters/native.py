"""`native`: a rank and a scale per module, as training left them; exact where PEFT's patterns are
read."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from tlora.exporters.base import Export, Source, in_dtype, write_lora


class Native:
    """The LoRA as it is, in another dtype if asked for."""

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
