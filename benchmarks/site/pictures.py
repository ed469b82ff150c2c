"""The pictures of docs/how-it-works.md.

    python benchmarks/site/pictures.py docs     # writes how-*.png there; about a minute

The first two show the base model that comes with the package, on rows of its `ledger` task; the
third is arithmetic on the sizes of Llama-3.1-8B.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from memory import dry

from tlora import AdapterPlan, Calibration, TLoraConfig, calibrate, calibration_batches, plan
from tlora.demo.run import BASE_MODEL, write_rows

mpl.use("agg")
from matplotlib import pyplot as plt

BLUE, ORANGE, GREY = "#3b5b8c", "#c8501e", "#8a8f98"


def calibrated() -> tuple[Any, Calibration]:
    """Return the shipped base, and its statistics on 32 rows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    with tempfile.TemporaryDirectory() as folder:
        file = write_rows(folder, 0)["ledger"] / "train.jsonl"
        rows = [json.loads(row) for row in file.read_text("utf-8").splitlines()[:200]]
    batches = calibration_batches(tokenizer, rows)
    return model, calibrate(model, batches, TLoraConfig(r=8))


def captured(model: Any, stats: Calibration, ranks: list[int]) -> dict[str, np.ndarray]:
    """Return the share of ||W C||_F^2 that three kinds of A keep: modules x ranks each."""
    torch.manual_seed(0)
    found: dict[str, list[list[float]]] = {"of W C (TLoRA)": [], "of W alone": [], "random": []}
    for name, module in stats.modules.items():
        weight = model.get_submodule(name).weight.detach()
        product = weight @ module.covariance()
        bases = (
            torch.linalg.svd(product, full_matrices=False)[2],
            torch.linalg.svd(weight, full_matrices=False)[2],
            torch.linalg.qr(torch.randn(module.d_in, module.d_in))[0],
        )
        total = product.square().sum()
        for kind, basis in zip(found, bases, strict=True):
            kept = (product @ basis.T).square().sum(dim=0).cumsum(0) / total
            found[kind].append([kept[min(r, len(kept)) - 1].item() for r in ranks])
    return {kind: np.array(values) for kind, values in found.items()}


def draw_captured(model: Any, stats: Calibration, file: Path) -> None:
    """Energy against rank: the mean over modules, and the band from the worst to the best."""
    ranks = [1, 2, 4, 8, 16, 32, 64]
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    colors = (ORANGE, BLUE, GREY)
    for (kind, values), color in zip(captured(model, stats, ranks).items(), colors, strict=True):
        axes.plot(ranks, values.mean(axis=0), color=color, marker="o", label=f"A {kind}")
        axes.fill_between(ranks, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(r) for r in ranks])
    axes.set_xlabel("rank r")
    axes.set_ylabel(r"share of $\|W C\|_F^2$ kept")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=3, frameon=False)
    save(figure, file)


def draw_ranks(model: Any, stats: Calibration, file: Path) -> None:
    """Ranks by layer and projection under the paper's rule, at a base rank of 8."""
    shared: AdapterPlan = plan(model, stats, TLoraConfig(r=8))
    cells = {}
    for name, module in shared.modules.items():
        layer = re.search(r"\.(\d+)\.", name)
        cells[int(layer[1]) if layer else 0, name.rpartition(".")[2]] = module.rank
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    layers = sorted({layer for layer, _ in cells})
    values = np.array([[cells[layer, kind] for layer in layers] for kind in kinds])
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    axes.imshow(values, cmap="Oranges", vmin=0, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        dark = value > 0.6 * values.max()
        axes.text(column, row, value, ha="center", va="center", color="w" if dark else "k")
    axes.set_xticks(range(len(layers)), [f"layer {layer}" for layer in layers])
    axes.set_yticks(range(len(kinds)), kinds)
    save(figure, file)


def draw_memory(file: Path) -> None:
    """What training holds beside the base, with A frozen and as LoRA."""
    ways = dry("Llama-3.1-8B").training[:2]
    parts = {
        "gradients": [way.gradients for way in ways],
        "AdamW": [way.optimizer for way in ways],
        "activations": [way.activations for way in ways],
    }
    figure, axes = plt.subplots(figsize=(6.4, 2.2))
    left = np.zeros(2)
    for (name, sizes), color in zip(parts.items(), (BLUE, GREY, ORANGE), strict=True):
        width = np.array(sizes) / 2**30
        axes.barh(["A frozen", "LoRA"], width, left=left, color=color, label=name)
        left += width
    for place, total in enumerate(left):
        axes.text(total, place, f" {total:.1f} GiB", va="center")
    axes.set_xlim(0, left.max() * 1.15)
    axes.invert_yaxis()
    axes.set_xlabel("GiB beside the weights, 4 rows of 1,024 tokens, r = 16")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.3), ncols=3, frameon=False)
    save(figure, file)


def save(figure: Any, file: Path) -> None:
    """Write a picture without a frame above and on the right."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=130, metadata={"Software": None})


def main(folder: str) -> None:
    """Draw all of them."""
    model, stats = calibrated()
    draw_captured(model, stats, Path(folder) / "how-captured.png")
    draw_ranks(model, stats, Path(folder) / "how-ranks.png")
    draw_memory(Path(folder) / "how-memory.png")


if __name__ == "__main__":
    main(sys.argv[1])
