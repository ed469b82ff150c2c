"""Whether plans are those of the definition in float64: ranks, and energy kept of W C.

    python benchmarks/cost/energy.py src/tlora/demo/base MORE_MODELS --text stories.json
    python benchmarks/cost/energy.py SMOLLM2 --text stories.json --ranks 32 --samples 8 --tokens 96
    python benchmarks/cost/energy.py ... --device cuda [--dtype bfloat16]
    python benchmarks/cost/energy.py --table

Measured for each model, at each rank (`definition.py` has S, C and the ranks by definition):

- ranks that sensitivities share out, against those of the definition; "tied" counts the modules
  whose share lies within 1e-4 of where rounding turns, which may differ;
- the least share of the optimal energy of W C over the modules, for each way to solve;
- whether the plan within a memory budget is the one without, to the bit;
- whether the same seed gives the same plan again, to the bit.

In float32 the definition is that of the same weights in float64. In bfloat16 it takes in the
activations and gradients of the bfloat16 model itself, one sample at a time.

Exits with 1 where ranks differ, less than 0.9999 (streamed: 0.995) is kept, or bits differ.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from definition import Measured, differing, measure, share_ranks
from subjects import one_by_one, quiet
from torch import Tensor

from tlora import AdapterPlan, TLoraConfig
from tlora.adapter.attach import made_plan
from tlora.calibration.targets import find_targets
from tlora.files import read_json, write_json
from tlora.linalg.matrices import full_precision
from tlora.training.runfolder import provenance

WAYS: dict[str, dict[str, Any]] = {
    "auto": {"covariance": "exact", "memory_budget": None},
    "randomized": {"covariance": "exact", "memory_budget": None, "subspace": "randomized"},
    "streamed": {"covariance": "streamed"},
}
TARGETS: dict[str, Any] = {"target_modules": "all-linear"}
LEAST = {"auto": 0.9999, "randomized": 0.9999, "streamed": 0.995}

Batches = list[dict[str, Tensor]]
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model, its samples, and their statistics by the definition.

    Attributes:
        names: modules whose W C is not zero (a pooler reads one token a sample: C = 0).
        products: W C in float64 of these.
        best: the squared singular values of each W C, in descending order.
    """

    title: str
    model: Any
    batches: Batches
    defined: Measured
    names: list[str]
    products: dict[str, Tensor]
    best: dict[str, Tensor]


def main() -> None:
    """Measure, write, print; exit with 1 where a row breaks a threshold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--text", type=Path, help="JSON list of strings")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="of a sample, at the most")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("energy.json"))
    parser.add_argument("--table", action="store_true", help="print the results only")
    flags = parser.parse_args()
    result = {"places": [], "rows": []}
    if flags.output.is_file():
        result = read_json(flags.output)
    if not flags.table:
        place = {**provenance(None), "text": flags.text.name}
        result["places"].append(place)
        for path in flags.models:
            with quiet():
                rows = rows_of(load(path, flags), flags.ranks)
            fixed = {"device": flags.device, "dtype": flags.dtype}
            rows = [row | fixed | {"place": len(result["places"]) - 1} for row in rows]
            merge(result, rows)
            write_json(flags.output, result)
            print(table(rows), flush=True)
    print(table(result["rows"]))
    broken = [fault for row in result["rows"] for fault in faults(row)]
    if broken:
        raise SystemExit("\n".join(broken))


def merge(result: dict[str, Any], rows: Sequence[Row]) -> None:
    """Let rows take the place of those of the same model, rank, device and dtype."""
    keys = ("model", "rank", "device", "dtype")
    new = {tuple(row[k] for k in keys): row for row in rows}
    held = {tuple(row[k] for k in keys): row for row in result["rows"]}
    result["rows"] = list((held | new).values())
    used = sorted({row["place"] for row in result["rows"]})
    result["places"] = [result["places"][index] for index in used]
    for row in result["rows"]:
        row["place"] = used.index(row["place"])


def load(path: Path, flags: argparse.Namespace) -> Case:
    """Load a model and its samples, and measure them by definition."""
    config = transformers.AutoConfig.from_pretrained(path)
    causal = any("CausalLM" in name for name in config.architectures or ())
    kind = transformers.AutoModelForCausalLM if causal else _Classifier
    torch.manual_seed(0)  # of a classifier's new head
    model = kind.from_pretrained(path, dtype=getattr(torch, flags.dtype)).to(flags.device).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    texts = load_texts(flags.text, flags.samples)
    batches = make_batches(tokenizer, texts, flags.tokens, causal, flags.device)
    return case(title_of(path), model, batches)


_Classifier = transformers.AutoModelForSequenceClassification


def case(title: str, model: Any, batches: Batches) -> Case:
    """Measure a model by definition; of a 16-bit one each sample is a batch of its own."""
    names = [target.name for target in find_targets(model, TLoraConfig(**TARGETS))]
    samples = unpadded(batches)
    if next(model.parameters()).dtype == torch.float32:
        defined = measure(copy.deepcopy(model).double(), samples, names)
    else:
        batches = samples
        defined = measure(model, samples, names)
    kept = [name for name in names if defined.moments[name].any()]
    products = {
        name: model.get_submodule(name).weight.detach().double() @ defined.moments.pop(name)
        for name in kept
    }
    best = {name: _energies(product) for name, product in products.items()}
    return Case(title, model, batches, defined, kept, products, best)


def _energies(product: Tensor) -> Tensor:
    wide = product if product.shape[0] <= product.shape[1] else product.T
    return torch.linalg.eigvalsh(wide @ wide.T).flip(0).clamp_min(0)


def planned(case: Case, equal: bool, **fields: Any) -> AdapterPlan:
    """Calibrate and plan, with equal ranks and scales or allocated ones."""
    config = TLoraConfig(allocate_rank=not equal, allocate_scale=not equal, **TARGETS, **fields)
    return made_plan(case.model, case.batches, config, progress=False)


def rows_of(case: Case, ranks: Sequence[int]) -> list[Row]:
    """Return a row a rank of one model; ranks that its narrowest layer cannot take are left out."""
    most = min(min(product.shape) for product in case.products.values())
    return [row_of(case, rank) for rank in ranks if rank <= most]


def row_of(case: Case, rank: int) -> Row:
    """Compare one model's plans at one rank with the definition."""
    row: Row = {"model": case.title, "modules": len(case.names), "rank": rank}
    plans = {way: planned(case, equal=True, r=rank, **more) for way, more in WAYS.items()}
    for way, found in plans.items():
        shares = [
            _kept(case.products[name], found.modules[name].lora_A) / case.best[name][:rank].sum()
            for name in case.names
        ]
        least = torch.stack(shares).min(dim=0)
        row[way], row[f"{way} least at"] = least.values.item(), case.names[int(least.indices)]
        row[f"{way} solvers"] = sorted({found.modules[name].solver for name in case.names})
    budget = sum(4 * product.shape[1] ** 2 for product in case.products.values()) // 4
    lean = planned(case, equal=True, r=rank, covariance="exact", memory_budget=budget)
    row["in blocks"] = _same_bits(lean, plans["auto"])
    row["passes"] = lean.info["passes"]
    shared, again = (planned(case, equal=False, r=rank) for _ in range(2))
    row["same seed"] = _same_bits(shared, again)
    bounds = {n: (1, min(case.model.get_submodule(n).weight.shape)) for n in shared}
    defined, tied = share_ranks(case.defined.sensitivities, rank, bounds)
    row["tied"] = tied
    row["ranks differ"] = differing({n: m.rank for n, m in shared.modules.items()}, defined, tied)
    row["sensitivities"] = max(
        abs((module.sensitivity or 0.0) / case.defined.sensitivities[name] - 1)
        for name, module in shared.modules.items()
    )
    return row


def _same_bits(one: AdapterPlan, other: AdapterPlan) -> bool:
    return all(
        torch.equal(module.lora_A, other.modules[name].lora_A)
        and module.scale == other.modules[name].scale
        and module.sensitivity == other.modules[name].sensitivity
        for name, module in one.modules.items()
    )


@full_precision
def _kept(product: Tensor, basis: Tensor) -> Tensor:
    return (product @ torch.linalg.qr(basis.to(product).T).Q).square().sum()


def load_texts(path: Path, samples: int) -> list[str]:
    """Return the first texts of a JSON list."""
    texts: list[str] = json.loads(path.read_text(encoding="utf-8"))
    return texts[:samples]


def title_of(path: Path) -> str:
    """Return a model's name in the tables."""
    return path.parent.name if path.name == "model" else path.name


def make_batches(
    tokenizer: Any, texts: Sequence[str], tokens: int, causal: bool, device: str
) -> Batches:
    """Return the texts in batches of four, padded on the right; labels are the text or 0 and 1."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or "</s>"
    tokenizer.padding_side = "right"
    options = {"padding": True, "truncation": True, "max_length": tokens, "return_tensors": "pt"}
    batches = []
    for start in range(0, len(texts), 4):
        read = tokenizer(texts[start : start + 4], **options)
        batch = {name: read[name].to(device) for name in ("input_ids", "attention_mask")}
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batches.append(
            batch
            | {
                "labels": labels
                if causal
                else labels[:, 0].new_tensor([(start + i) % 2 for i in range(len(labels))])
            }
        )
    return batches


def unpadded(batches: Batches) -> Batches:
    """Return the samples one by one, padding cut off."""
    samples = []
    for sample in one_by_one(batches):
        real = int(sample["attention_mask"].sum())
        samples.append({n: v[:, :real] if v.dim() == 2 else v for n, v in sample.items()})
    return samples


def faults(row: Row) -> list[str]:
    """Return what of a row breaks a threshold, in words."""
    place = f"{row['model']}, r = {row['rank']}, {row['dtype']} on {row['device']}"
    found = [
        f"{place}: {way} keeps {row[way]:.6f} of the optimal energy at {row[f'{way} least at']},"
        f" less than {least}"
        for way, least in LEAST.items()
        if not row[way] >= least
    ]
    if row["ranks differ"]:
        found.append(f"{place}: ranks differ at {', '.join(row['ranks differ'])}")
    if not row["in blocks"]:
        found.append(f"{place}: the plan in blocks has other bits")
    if not row["same seed"]:
        found.append(f"{place}: the same seed gave another plan")
    return found


def table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| model | device, dtype | modules | r | auto | randomized | streamed | ranks | tied |"
        " sensitivities | in blocks, same bits | passes | same seed, same bits |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        where = f"{row['device']}, {row['dtype']}"
        shares = [f"{row[way]:.6f} ({', '.join(row[f'{way} solvers'])})" for way in WAYS]
        differ = len(row["ranks differ"])
        cells = [row["model"], where, row["modules"], row["rank"], *shares]
        cells += [f"{differ} DIFFER" if differ else "equal", len(row["tied"])]
        cells += [f"{row['sensitivities']:.0e}", "yes" if row["in blocks"] else "NO"]
        cells += [row["passes"], "yes" if row["same seed"] else "NO"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
