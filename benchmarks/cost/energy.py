"""What the cheap solvers keep of W C, on real activations, next to the exact subspace.

    python benchmarks/cost/energy.py src/tlora/demo/base MORE_MODELS --text stories.json

For each module ||W C A^T||_F^2 as a share of what the leading singular vectors keep, in float64
from the second moment itself, never from what the plan reports; the table has the least over the
modules. "in blocks" says whether the plan within a memory budget is the one without, to the bit.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from subjects import quiet
from torch import Tensor

from tlora import TLoraConfig, calibrate, plan
from tlora.adapter.blocks import plan_in_blocks
from tlora.calibration.targets import find_targets
from tlora.calibration.weights import dense_weight
from tlora.files import read_json, write_json
from tlora.training.runfolder import provenance

WAYS: dict[str, dict[str, Any]] = {
    "auto": {},
    "randomized": {"subspace": "randomized"},
    "streamed": {"covariance": "streamed"},
}


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--text", type=Path, help="JSON list of strings")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--table", action="store_true", help="print the results only")
    flags = parser.parse_args()
    path = Path(__file__).with_name("energy.json")
    if not flags.table:
        texts = json.loads(flags.text.read_text(encoding="utf-8"))[: flags.samples]
        with quiet():
            rows = [row for model in flags.models for row in rows_of(model, texts, flags.ranks)]
        write_json(path, {"place": provenance(None), "text": flags.text.name, "rows": rows})
    print(table(read_json(path)["rows"]))


def rows_of(path: Path, texts: list[str], ranks: list[int]) -> list[dict[str, Any]]:
    """Return a row a rank of one model."""
    config = transformers.AutoConfig.from_pretrained(path)
    causal = any("CausalLM" in name for name in config.architectures or ())
    kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    model = kind.from_pretrained(path).float().eval()
    batches = _batches(transformers.AutoTokenizer.from_pretrained(path), texts)
    fields = {"allocate_rank": False, "allocate_scale": False, "target_modules": "all-linear"}
    stats = calibrate(model, batches, TLoraConfig(**fields), progress=False)
    names = {}
    for target in find_targets(model, TLoraConfig(**fields)):
        if stats.modules[target.name].covariance().any():
            moment = stats.modules[target.name].covariance().double()
            names[target.name] = dense_weight(target).double() @ moment
    best = {name: torch.linalg.svdvals(matrix).square() for name, matrix in names.items()}
    return [
        _row(path, model, batches, names, best, fields | {"r": rank})
        for rank in ranks
        if rank <= min(min(matrix.shape) for matrix in names.values())
    ]


def _row(path: Path, *rest: Any) -> dict[str, Any]:
    model, batches, names, best, fields = rest
    title = path.parent.name if path.name == "model" else path.name
    row: dict[str, Any] = {"model": title, "rank": fields["r"], "modules": len(names)}
    for way, more in WAYS.items():
        found = plan_in_blocks(model, batches, TLoraConfig(**fields, **more), progress=False)
        row[way] = min(
            _kept(names[n], found.modules[n].lora_A) / best[n][: fields["r"]].sum() for n in names
        ).item()
        row[f"{way} solvers"] = sorted({found.modules[n].solver for n in names})
    whole = plan(
        model,
        calibrate(model, batches, TLoraConfig(**fields), progress=False),
        TLoraConfig(**fields),
        progress=False,
    )
    lean = TLoraConfig(**fields, memory_budget=1, covariance="exact")
    cut = plan_in_blocks(model, batches, lean, progress=False)
    row["in blocks"] = all(
        torch.equal(cut.modules[n].lora_A, whole.modules[n].lora_A) for n in whole
    )
    row["passes"] = cut.info["passes"]
    return row


def _kept(matrix: Tensor, basis: Tensor) -> Tensor:
    return (matrix @ torch.linalg.qr(basis.double().T).Q).square().sum()


def _batches(tokenizer: Any, texts: list[str]) -> list[dict[str, Tensor]]:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or "</s>"
    options = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
    parts = [tokenizer(texts[i : i + 4], **options) for i in range(0, len(texts), 4)]
    return [{name: p[name] for name in ("input_ids", "attention_mask")} for p in parts]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| model | modules | r | auto | randomized | streamed | in blocks, same bits | passes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shares = [f"{row[way]:.6f} ({', '.join(row[f'{way} solvers'])})" for way in WAYS]
        same = "yes" if row["in blocks"] else "NO"
        cells = [row["model"], row["modules"], row["rank"], *shares, same, row["passes"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
