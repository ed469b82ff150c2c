"""Servers, the formats they read, and their commands. Imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tlora.integrations.vllm import VLLM_RANKS, vllm_rank


@dataclass(frozen=True)
class Artifact:
    """An exported adapter or model."""

    folder: str
    """Absolute path of its folder."""
    name: str
    """Name to serve it under."""
    base: str
    """Folder or Hub name of the base model."""
    rank: int
    """The largest rank."""
    merged: bool


def stacked_rank(rank: int) -> int:
    """Return the rank that TGI and LoRAX pad to on one device: 8, or the next multiple of 16."""
    return 8 if rank <= 8 else -(-rank // 16) * 16


@dataclass(frozen=True)
class ServerInfo:
    """One server."""

    title: str
    formats: tuple[str, ...]
    """Formats that every version reads correctly; `--for` picks the first."""
    adapter: str
    """Command that serves an adapter; `raw` is the `Artifact`, other fields are quoted."""
    whole: str = ""
    """Command that serves a merged model."""
    padded: Callable[[int], int] = int
    """Returns the padded rank for the largest rank."""

    def command(self, artifact: Artifact) -> str:
        """Return the command that serves an artifact."""
        line = self.whole if artifact.merged else self.adapter
        most, rank = VLLM_RANKS[-1], vllm_rank(artifact.rank)
        if rank is None and "{vllm_rank}" in line:
            return f"vLLM serves ranks up to {most}; export with --max_rank {most}, or merge."
        quoted = {name: shlex.quote(getattr(artifact, name)) for name in ("folder", "name", "base")}
        return line.format(raw=artifact, vllm_rank=rank, **quoted)


_SERVED = ("uniform", "merged")

SERVERS: Mapping[str, ServerInfo] = MappingProxyType(
    {
        "vllm": ServerInfo(
            "vLLM",
            ("uniform", "compact", "merged"),
            "vllm serve {base} --enable-lora --max-lora-rank {vllm_rank}"
            " --lora-modules {name}={folder}",
            "vllm serve {folder}",
        ),
        "sglang": ServerInfo(
            "SGLang",
            _SERVED,
            "python -m sglang.launch_server --model-path {base} --enable-lora"
            " --lora-paths {name}={folder}",
            "python -m sglang.launch_server --model-path {folder}",
        ),
        "tgi": ServerInfo(
            "TGI",
            _SERVED,
            "text-generation-launcher --model-id {base} --lora-adapters {name}={folder}",
            "text-generation-launcher --model-id {folder}",
            stacked_rank,
        ),
        "lorax": ServerInfo(
            "LoRAX",
            _SERVED,
            "lorax-launcher --model-id {base} --adapter-id {folder} --adapter-source local",
            "lorax-launcher --model-id {folder}",
            stacked_rank,
        ),
        "lmdeploy": ServerInfo(
            "LMDeploy",
            _SERVED,
            "lmdeploy serve api_server {base} --adapters {name}={folder}",
            "lmdeploy serve api_server {folder}",
        ),
        "tensorrt-llm": ServerInfo(
            "TensorRT-LLM",
            _SERVED,
            "tensorrt_llm.LLM(model={raw.base!r}, lora_config=LoraConfig("
            "lora_dir=[{raw.folder!r}], max_lora_rank={raw.rank}))",
            "trtllm-serve {folder}",
        ),
        "llama.cpp": ServerInfo(
            "llama.cpp",
            ("gguf",),
            "llama-server -m {folder}/base.gguf --lora {folder}/adapter.gguf",
        ),
        "ollama": ServerInfo("Ollama", ("gguf",), "ollama create {name} -f {folder}/Modelfile"),
    }
)
