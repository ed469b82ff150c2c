"""Configuration of `tlora export` and `tlora merge`. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from tlora.checks import FOLDER, Record, at_least
from tlora.exporters.servers import SERVERS

Server = Literal[
    "vllm", "sglang", "tgi", "lorax", "lmdeploy", "tensorrt-llm", "llama.cpp", "ollama"
]


@dataclass(kw_only=True)
class MergeConfig(Record):
    """Merge an adapter into its base model, for use in any server.

    Raises:
        ConfigError: values are missing or out of range; one error lists all faults.
    """

    where: ClassVar[str] = "merge"

    path: str = field(metadata={"positional": True})
    """Folder of a `tlora train` run, or of any LoRA saved by PEFT."""
    output_dir: Annotated[str, FOLDER]
    """Output folder, which must not exist yet."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Precision of the result; "auto" keeps the adapter's, or the base's when merging."""
    max_rank: Annotated[int, at_least(1)] | None = None
    """Truncate each module's update to this rank by SVD, and print the lost energy; for a DyLoRA
    adapter, keep the first ranks."""
    model: str | None = None
    """Base model, if different from the one named by the adapter."""
    dequantize: bool = False
    """Merge into a quantized base by dequantizing it, and print how much the outputs change."""
    trust_remote_code: bool = False
    """Run Python code that comes with the base model."""

    def export(self) -> ExportConfig:
        """Return the equivalent export."""
        return ExportConfig(**vars(self), format="merged")


@dataclass(kw_only=True)
class ExportConfig(MergeConfig):
    """Write an adapter in a format that your server reads correctly.

    Raises:
        ConfigError: values are missing or out of range; one error lists all faults.
    """

    where: ClassVar[str] = "export"

    format: str | None = None
    """Format of the result; `tlora list formats` lists them."""
    server: Server | None = field(default=None, metadata={"typed": "--for"})
    """Target server: selects the format and prints the serving command."""
    base_gguf: bool = False
    """Also write the base model as a GGUF file (float16)."""

    def relations(self) -> Iterator[str]:
        """Yield errors in combinations of fields."""
        yield from super().relations()
        if self.format is None and self.server is None:
            yield "`format` is missing; give --format, or --for with the target server."
        if self.format and self.server and self.format not in SERVERS[self.server].formats:
            right = SERVERS[self.server]
            yield (
                f"`format` is {self.format!r}, which some versions of {right.title} read"
                f" incorrectly; choose from {', '.join(right.formats)}, or remove it."
            )
        if self.base_gguf and self.chosen != "gguf":
            yield "`base_gguf` requires --format gguf; add that, or remove it."

    @property
    def chosen(self) -> str:
        """The format by name."""
        return self.format or (SERVERS[self.server].formats[0] if self.server else "")
