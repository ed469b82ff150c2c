"""The records of `tlora export` and `tlora merge`. Nothing here imports torch."""

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
    """Merge an adapter into its base model: a whole model that any server loads.

    Raises:
        ConfigError: values are missing or out of range; all faults are collected into one error.
    """

    where: ClassVar[str] = "merge"

    path: str = field(metadata={"positional": True})
    """Folder of `tlora train`, or of any LoRA that PEFT has saved."""
    output_dir: Annotated[str, FOLDER]
    """Folder to write, which must not exist yet."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Precision of the result; "auto" keeps the adapter's, in a merged model the base's."""
    max_rank: Annotated[int, at_least(1)] | None = None
    """Truncate each module's update to this rank by SVD, and print the energy lost; of an adapter
    that DyLoRA trained, keep the first ranks."""
    model: str | None = None
    """Base model, if not the one that the adapter names."""
    dequantize: bool = False
    """Merge into a quantized base: dequantize it, and print how much that changes the outputs."""
    trust_remote_code: bool = False
    """Run Python code that comes with the base model."""

    def export(self) -> ExportConfig:
        """Return the export that this stands for."""
        return ExportConfig(**vars(self), format="merged")


@dataclass(kw_only=True)
class ExportConfig(MergeConfig):
    """Write an adapter in a format that your server reads correctly.

    Raises:
        ConfigError: values are missing or out of range; all faults are collected into one error.
    """

    where: ClassVar[str] = "export"

    format: str | None = None
    """Format of the result; `tlora list formats` lists them."""
    server: Server | None = None
    """The server that will read it: picks the format, and prints the command that serves it."""
    base_gguf: bool = False
    """Beside the adapter's GGUF, write the base model as one (float16)."""

    def relations(self) -> Iterator[str]:
        """Yield what is wrong between fields."""
        yield from super().relations()
        if self.format is None and self.server is None:
            yield "`format` and `server` are missing; give --format, or --for with the reader."
        if self.format and self.server and self.format not in SERVERS[self.server].formats:
            right = SERVERS[self.server]
            yield (
                f"`format` is {self.format!r}, which not every version of {right.title} reads"
                f" correctly; choose from {', '.join(right.formats)}, or leave it out."
            )
        if self.base_gguf and self.chosen != "gguf":
            yield "`base_gguf` goes with --format gguf; leave it out."

    @property
    def chosen(self) -> str:
        """The format by name."""
        return self.format or (SERVERS[self.server].formats[0] if self.server else "")
