"""A vision transformer on MNIST: is a calibrated, frozen A of use where no text is read?

    python benchmarks/quality/vision.py DATA

DATA holds mnist-t10k-images-idx3-ubyte.gz and mnist-t10k-labels-idx1-ubyte.gz, 10,000 images. A
small ViT (three layers, width 48, patches of 7 x 7) is pretrained on 6,000 of them, and adapted to
digits turned by 90 degrees, on 2,000 others, with the head frozen. LoRA, LoRA-FA, and TLoRA by the
paper's rule and with equal ranks and scales train at r = 4, each at three learning rates with three
seeds; 500 turned digits choose the rate, 1,500 give the score. Every run is kept in vision.json
beside this file as it ends, and is not run again; `--table` prints what is there.
"""

from __future__ import annotations

import argparse
import gzip
import math
import random
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from adapting import train
from peft import LoraConfig, get_peft_model
from scipy.stats import t
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from tlora import TLoraConfig, freeze_a, get_tlora_model
from tlora.files import read_json, write_json
from tlora.training.runfolder import provenance

RESULTS = Path(__file__).with_suffix(".json")
RANK, STEPS, BATCH, SAMPLES = 4, 120, 32, 32
PRETRAINING = {"steps": 600, "batch": 64, "rate": 2e-3}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
RATES = {
    "lora": (3e-3, 1e-2, 3e-2),
    "lora-fa": (1e-2, 3e-2, 1e-1),
    "tlora, the paper's rule": (3e-3, 1e-2, 3e-2),
    "tlora, equal ranks and scales": (3e-3, 1e-2, 3e-2),
}
SEEDS = (0, 1, 2)
Images = tuple[Tensor, Tensor]
"""Pixels, n x 1 x 28 x 28 in [0, 1], and digits, n."""


def main() -> None:
    """Pretrain, run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--table", action="store_true", help="print the results only")
    flags = parser.parse_args()
    record = read_json(RESULTS) if RESULTS.is_file() else {"runs": {}}
    if not flags.table:
        torch.set_num_threads(1)
        experiment(flags.data, record)
    print(table(record))


def experiment(data: Path, record: dict[str, Any]) -> None:
    """Pretrain the base, and run each method that is not in the record."""
    images = read(data)
    upright, turned = part(images, 0, 6000), turn(part(images, 6000, 10000))
    training, validation, test = (
        part(turned, *ends) for ends in ((0, 2000), (2000, 2500), (2500, 4000))
    )
    base = pretrained(upright)
    weights = base.state_dict()
    record["base"] = {
        "upright": accuracy(base, part(images, 6000, 10000)),
        "turned": accuracy(base, test),
        "parameters": sum(p.numel() for p in base.parameters()),
    }
    print(record["base"], flush=True)
    for method, rates in RATES.items():
        for rate in rates:
            for seed in SEEDS:
                name = f"{method}/{rate}/{seed}"
                if name in record["runs"]:
                    continue
                model = made()
                model.load_state_dict(weights)
                adapted = attached(model, method, training, seed)
                train(adapted, drawn(training, STEPS, BATCH, seed), rate)
                record["runs"][name] = {
                    "parameters": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
                    "validation": accuracy(adapted, validation),
                    "test": accuracy(adapted, test),
                }
                record["provenance"] = provenance(None)
                write_json(RESULTS, record)
                print(name, record["runs"][name], flush=True)


def read(data: Path) -> Images:
    """Return the images of the IDX files, in their order."""
    arrays = []
    for file, header in (("images-idx3", 16), ("labels-idx1", 8)):
        with gzip.open(data / f"mnist-t10k-{file}-ubyte.gz") as opened:
            arrays.append(np.frombuffer(opened.read(), np.uint8, offset=header).copy())
    pixels, digits = map(torch.from_numpy, arrays)
    return pixels.view(-1, 1, 28, 28).float() / 255, digits.long()


def part(images: Images, start: int, stop: int) -> Images:
    """Return the images from ``start`` to ``stop``, exclusive."""
    return images[0][start:stop], images[1][start:stop]


def turn(images: Images) -> Images:
    """Return the images turned by 90 degrees, counterclockwise."""
    return images[0].rot90(1, (2, 3)).contiguous(), images[1]


def drawn(images: Images, count: int, size: int, seed: int) -> list[dict[str, Tensor]]:
    """Return ``count`` batches; every image is seen before one is seen again."""
    draw, places = random.Random(seed), list[int]()
    while len(places) < count * size:
        places += draw.sample(range(len(images[1])), len(images[1]))
    each = torch.tensor(places[: count * size]).view(count, size)
    return [{"pixel_values": images[0][row], "labels": images[1][row]} for row in each]


def made() -> Any:
    """Return the ViT, untrained."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}
    shape = {"intermediate_size": 96, "image_size": 28, "patch_size": 7, "num_channels": 1}
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**sizes, **shape, num_labels=10))


def pretrained(images: Images) -> Any:
    """Return the ViT, trained in full on upright digits."""
    model = made()
    batches = drawn(images, PRETRAINING["steps"], PRETRAINING["batch"], 0)
    train(model, batches, PRETRAINING["rate"], warmup=50)
    return model


def attached(model: Any, method: str, images: Images, seed: int) -> nn.Module:
    """Return the model with the method's adapter, the head frozen."""
    torch.manual_seed(seed)
    if method.startswith("tlora"):
        allocate = method.endswith("rule")
        config = TLoraConfig(
            r=RANK,
            lora_alpha=RANK,
            target_modules=LINEAR,
            allocate_rank=allocate,
            allocate_scale=allocate,
        )
        batches = drawn(images, 1, SAMPLES, seed + 1000)
        return get_tlora_model(model, config, batches, progress=False)
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEAR))
    if method == "lora-fa":
        freeze_a(adapted)
    return adapted


@torch.no_grad()
def accuracy(model: Any, images: Images) -> float:
    """Return the share of digits that are told right."""
    model.eval()
    told = torch.cat([model(pixel_values=some).logits.argmax(-1) for some in images[0].split(500)])
    return round(float((told == images[1]).float().mean()), 4)


def table(record: dict[str, Any]) -> str:
    """Return each method's test accuracy at its best rate, as Markdown, with the 95 % interval."""
    lines = ["| method | trained | rate | test accuracy |", "|---|---|---|---|"]
    for method, rates in RATES.items():
        runs = {rate: [record["runs"][f"{method}/{rate}/{s}"] for s in SEEDS] for rate in rates}
        best = max(rates, key=lambda rate: mean(run["validation"] for run in runs[rate]))
        scores = [run["test"] for run in runs[best]]
        error = np.std(scores, ddof=1) / math.sqrt(len(scores))
        half = float(t.ppf(0.975, len(scores) - 1) * error)
        trained = round(mean(run["parameters"] for run in runs[best]))
        lines.append(f"| {method} | {trained:,} | {best:g} | {mean(scores):.3f} ± {half:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
