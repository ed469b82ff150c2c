"""Who serves an adapter, from which formats, and the command that does it. Imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tlora.integrations.vllm import VLLM_RANKS, vllm_rank


@dataclass(frozen=True)
class Artifact:
    """What was exported."""

    folder: str
    """Where it lies, absolute."""
    name: str
    """What the server may call it."""
    base: str
    """Folder or Hub name of the base model."""
    rank: int
    """The largest rank."""
    merged: bool


@dataclass(frozen=True)
class ServerInfo:
    """One server."""

    title: str
    formats: tuple[str, ...]
    """Formats that every version of it reads right, the one that `--for` picks first."""
    command: Callable[[Artifact], str]
    """Returns the line that serves an artifact."""
    padded: Callable[[int], int] = int
    """Returns the rank to pad to, by the largest one."""


def stacked_rank(rank: int) -> int:
    """Return the rank that TGI and LoRAX pad to on one device: 8, or the next multiple of 16."""
    return 8 if rank <= 8 else -(-rank // 16) * 16


def _vllm(artifact: Artifact) -> str:
    if artifact.merged:
        return _line("vllm", "serve", artifact.folder)
    rank = vllm_rank(artifact.rank)
    if rank is None:
        return (
            f"vLLM serves ranks up to {VLLM_RANKS[-1]}; export with --max_rank {VLLM_RANKS[-1]}, or"
            " merge."
        )
    flags = ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules"]
    return _line("vllm", "serve", artifact.base, *flags, f"{artifact.name}={artifact.folder}")


def _sglang(artifact: Artifact) -> str:
    start = ["python", "-m", "sglang.launch_server", "--model-path"]
    if artifact.merged:
        return _line(*start, artifact.folder)
    lora = ["--enable-lora", "--lora-paths", f"{artifact.name}={artifact.folder}"]
    return _line(*start, artifact.base, *lora)


def _tgi(artifact: Artifact) -> str:
    start = ["text-generation-launcher", "--model-id"]
    if artifact.merged:
        return _line(*start, artifact.folder)
    return _line(*start, artifact.base, "--lora-adapters", f"{artifact.name}={artifact.folder}")


def _lorax(artifact: Artifact) -> str:
    start = ["lorax-launcher", "--model-id"]
    if artifact.merged:
        return _line(*start, artifact.folder)
    return _line(
        *start, artifact.base, "--adapter-id", artifact.folder, "--adapter-source", "local"
    )


def _lmdeploy(artifact: Artifact) -> str:
    start = ["lmdeploy", "serve", "api_server"]
    if artifact.merged:
        return _line(*start, artifact.folder)
    return _line(*start, artifact.base, "--adapters", f"{artifact.name}={artifact.folder}")


def _tensorrt(artifact: Artifact) -> str:
    if artifact.merged:
        return _line("trtllm-serve", artifact.folder)
    config = f"LoraConfig(lora_dir=[{artifact.folder!r}], max_lora_rank={artifact.rank})"
    return f"tensorrt_llm.LLM(model={artifact.base!r}, lora_config={config})"


def _llama_cpp(artifact: Artifact) -> str:
    base, adapter = (f"{artifact.folder}/{name}.gguf" for name in ("base", "adapter"))
    return _line("llama-server", "-m", base, "--lora", adapter)


def _ollama(artifact: Artifact) -> str:
    return _line("ollama", "create", artifact.name, "-f", f"{artifact.folder}/Modelfile")


def _line(*words: str) -> str:
    return shlex.join(words)


SERVERS: Mapping[str, ServerInfo] = MappingProxyType(
    {
        "vllm": ServerInfo("vLLM", ("uniform", "compact", "merged"), _vllm),
        "sglang": ServerInfo("SGLang", ("uniform", "merged"), _sglang),
        "tgi": ServerInfo("TGI", ("uniform", "merged"), _tgi, stacked_rank),
        "lorax": ServerInfo("LoRAX", ("uniform", "merged"), _lorax, stacked_rank),
        "lmdeploy": ServerInfo("LMDeploy", ("uniform", "merged"), _lmdeploy),
        "tensorrt-llm": ServerInfo("TensorRT-LLM", ("uniform", "merged"), _tensorrt),
        "llama.cpp": ServerInfo("llama.cpp", ("gguf",), _llama_cpp),
        "ollama": ServerInfo("Ollama", ("gguf",), _ollama),
    }
)
