"""Values of vLLM's `--max-lora-rank`. Imports no torch."""

from __future__ import annotations

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def vllm_rank(rank: int) -> int | None:
    """Return vLLM's smallest `--max-lora-rank` for a rank; None if the rank is too large."""
    return next((each for each in VLLM_RANKS if each >= rank), None)
