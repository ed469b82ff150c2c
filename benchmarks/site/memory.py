"""What fits on one card: the table of docs/memory.md, by the arithmetic of `tlora init --dry_run`.

    python benchmarks/site/memory.py            # every model; about a minute
    python benchmarks/site/memory.py Llama-3.2-1B

No weight is read: a model is its config.json, whose sizes are written down here.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tlora.training.dryrun import DryRun
from tlora.training.dryrun import run as dry_run
from tlora.training.runconfig import RunConfig

SHARED = {"torch_dtype": "bfloat16", "max_position_embeddings": 131072}
LLAMA = SHARED | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
QWEN = SHARED | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}


def _sizes(hidden: int, inner: int, layers: int, heads: int, vocabulary: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": vocabulary,
    }


MODELS = {
    "Llama-3.2-1B": LLAMA | _sizes(2048, 8192, 16, 32, 128256) | {"tie_word_embeddings": True},
    "Llama-3.1-8B": LLAMA | _sizes(4096, 14336, 32, 32, 128256),
    "Qwen2.5-14B": QWEN | _sizes(5120, 13824, 48, 40, 152064) | {"tie_word_embeddings": False},
    "Qwen2.5-32B": QWEN | _sizes(5120, 27648, 64, 40, 152064) | {"tie_word_embeddings": False},
    "Llama-3.1-70B": LLAMA | _sizes(8192, 28672, 80, 64, 128256),
}
CARDS = (24, 48, 80)


def dry(model: str, quantization: str = "none") -> DryRun:
    """Predict a run at r = 16 on every linear layer, 4 rows of 1,024 tokens a step."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS[model]), encoding="utf-8")
        given = {
            "model": folder,
            "dtype": "bfloat16",
            "quantization": quantization,
            "adapter": {"r": 16, "allocate_rank": False, "allocate_scale": False}
            | {"memory_budget": "1GiB"},
            "calibration": {"batch_size": 1},
            "data": {"max_length": 1024},
            "trainer": {"per_device_train_batch_size": 4},
        }
        return dry_run(RunConfig.from_dict(given))


def line(model: str, quantization: str) -> str:
    """Return a row of the table, peaks in GiB."""
    found = dry(model, quantization)
    tlora, lora = found.training[:2]
    peaks = [found.calibration.peak()]
    peaks += [way.peak(again) for again in (True, False) for way in (tlora, lora)]
    needed = max(peaks[0], peaks[1])
    fits = next((f"{card} GB" for card in CARDS if needed < card * 1e9), "several cards")
    stored = "bfloat16" if quantization == "none" else quantization
    shown = " | ".join(f"{peak / 2**30:.1f}" for peak in peaks)
    return f"| {model} | {stored} | {shown} | {fits} |"


def main(models: list[str]) -> None:
    """Print the rows of the models, by default of all."""
    for model in models or MODELS:
        for quantization in ("none", "nf4"):
            print(line(model, quantization), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
