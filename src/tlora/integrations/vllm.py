"""What vLLM's `--max-lora-rank` takes. Imports no torch."""

from __future__ import annotations

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def vllm_rank(rank: int) -> int | None:
    """Return the smallest `--max-lora-rank` of vLLM that holds a rank; None where it has none."""
    return next((each for each in VLLM_RANKS if each >= rank), None)
