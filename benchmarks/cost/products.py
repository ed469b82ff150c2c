"""How far second moments and W C by 16-bit products are from float64.

    python benchmarks/cost/products.py MODEL... --text stories.json [--device cuda]
    python benchmarks/cost/products.py --table

Inputs of the Linear layers of a model in bfloat16, each sample centered over its own tokens: as
they are; with one token of 1e4 planted in one feature; with one feature of mean 1e4 and standard
deviation 100; with one feature of 1e4, but for one token that is the next number of bfloat16 (they
lie 64 apart there). For each way of forming C the worst of three errors against float64, over the
layers of the first, middle and last block:

- Frobenius: ||E||_F / ||C||_F, which a massive feature dominates;
- diagonal: the largest |E_jj| / C_jj, a feature's own variance;
- entries: the largest |E_jk| / sqrt(C_jj C_kk), which no feature dominates.

"energy" is the least share of the optimal energy of W C that its leading r = 32 right singular
vectors keep where C comes that way.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from energy import load_texts, title_of
from subjects import quiet
from torch import Tensor, nn

from tlora.files import read_json, write_json
from tlora.linalg.matrices import full_precision
from tlora.linalg.products import product, product_of_terms, terms
from tlora.training.runfolder import provenance

RANK = 32
PLANTED = 1e4


# --- ways to form the sum over samples (tokens x d) of the products of their centered rows


def centered(samples: list[Tensor]) -> Tensor:
    """Return the rows of all samples in float32, each sample's mean subtracted."""
    return torch.cat([each.float() - each.float().mean(dim=0) for each in samples])


def float32(samples: list[Tensor]) -> Tensor:
    """Center in float32, multiply in float32."""
    rows = centered(samples)
    return rows.T @ rows


def rank_one(samples: list[Tensor]) -> Tensor:
    """Multiply uncentered 16-bit rows, and subtract the product of the float32 means."""
    rows = torch.cat(samples)
    means = torch.stack([len(each) ** 0.5 * each.float().mean(dim=0) for each in samples])
    return product(rows.T, rows) - means.T @ means


def two_terms(samples: list[Tensor]) -> Tensor:
    """Center in float32, multiply two bfloat16 terms."""
    rows = terms(centered(samples), 2)
    return product_of_terms([term.T for term in rows], rows)


def two_terms_all_pairs(samples: list[Tensor]) -> Tensor:
    """The same with the product of the second term by itself, which is never negative."""
    first, second = terms(centered(samples), 2)
    mixed = product(first.T, second)
    return product(second.T, second) + mixed + mixed.T + product(first.T, first)


def one_term(samples: list[Tensor]) -> Tensor:
    """Center in float32, round to bfloat16, multiply."""
    (rows,) = terms(centered(samples), 1)
    return product(rows.T, rows)


WAYS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "float32": float32,
    "rank-one correction": rank_one,
    "two bfloat16 terms": two_terms,
    "two terms, all pairs": two_terms_all_pairs,
    "one bfloat16 term": one_term,
}


# --- inputs


def as_they_are(samples: list[Tensor]) -> list[Tensor]:
    """Change nothing."""
    return samples


def outlier(samples: list[Tensor]) -> list[Tensor]:
    """Set one feature of one token to 1e4."""
    first = samples[0].clone()
    first[1, 3] = PLANTED
    return [first, *samples[1:]]


def offset(samples: list[Tensor]) -> list[Tensor]:
    """Replace a feature by 1e4 plus noise of standard deviation 100."""
    generator = torch.Generator().manual_seed(0)
    changed = []
    for sample in samples:
        noise = torch.randn(len(sample), generator=generator)
        changed.append(with_feature(sample, (PLANTED + 100 * noise).to(sample)))
    return changed


def constant(samples: list[Tensor]) -> list[Tensor]:
    """Replace a feature by about 1e4, one token of each sample bfloat16's next number."""
    changed = []
    for sample in samples:
        values = torch.full_like(sample[:, 3], PLANTED)
        values[0] += 64
        changed.append(with_feature(sample, values))
    return changed


def with_feature(sample: Tensor, values: Tensor) -> Tensor:
    """Return a sample with feature 3 replaced."""
    changed = sample.clone()
    changed[:, 3] = values
    return changed


INPUTS = {
    "real": as_they_are,
    f"one token of {PLANTED:g}": outlier,
    f"mean of {PLANTED:g}": offset,
    f"{PLANTED:g}, all but constant": constant,
}


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--text", type=Path, help="JSON list of strings")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="of a sample, at the most")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("products.json"))
    parser.add_argument("--table", action="store_true", help="print the results only")
    flags = parser.parse_args()
    if not flags.table:
        texts = load_texts(flags.text, flags.samples)
        with quiet():
            rows = [row for path in flags.models for row in rows_of(path, texts, flags)]
        write_json(flags.output, {"place": provenance(None), "text": flags.text.name, "rows": rows})
    print(table(read_json(flags.output)["rows"]))


def rows_of(path: Path, texts: list[str], flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each kind of input and each way of one model, and one for W C."""
    import transformers

    kind = transformers.AutoModelForCausalLM
    model = kind.from_pretrained(path, dtype=torch.bfloat16).to(flags.device).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    ids = [tokenizer(text, return_tensors="pt").input_ids[:, : flags.tokens] for text in texts]
    layers, inputs = recorded(model, [each.to(flags.device) for each in ids])
    return [
        {"model": title_of(path), "inputs": name, "way": way} | worst
        for name, plant in INPUTS.items()
        for way, worst in errors(layers, inputs, plant).items()
    ]


@torch.no_grad()
def recorded(
    model: nn.Module, samples: list[Tensor]
) -> tuple[dict[str, nn.Linear], dict[str, list[Tensor]]]:
    """Return Linear layers of three blocks that read different tensors, and each one's inputs."""
    inputs: dict[str, list[Tensor]] = {}
    names = {m: n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    blocks = sorted({block_of(name) for name in names.values()} - {None})
    chosen = {blocks[0], blocks[len(blocks) // 2], blocks[-1]}
    names = {module: name for module, name in names.items() if block_of(name) in chosen}
    seen: set[int] = set()
    held: list[Tensor] = []  # so that no tensor of a sample takes the address of another

    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if id(args[0]) not in seen:
            seen.add(id(args[0]))
            held.append(args[0])
            inputs.setdefault(names[module], []).append(args[0][0].detach())

    hooks = [module.register_forward_pre_hook(record) for module in names]
    for ids in samples:
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return {name: model.get_submodule(name) for name in inputs}, inputs


@full_precision
@torch.no_grad()
def errors(
    layers: dict[str, nn.Linear],
    inputs: dict[str, list[Tensor]],
    plant: Callable[[list[Tensor]], list[Tensor]],
) -> dict[str, dict[str, float]]:
    """Return the worst errors over all layers of each way to form C, and of W C."""
    fresh = {"frobenius": 0.0, "diagonal": 0.0, "entries": 0.0, "W C": 0.0, "energy": 1.0}
    worst = {way: dict(fresh) for way in WAYS}
    for name, layer in layers.items():
        samples = plant(inputs[name])
        exact = reference(samples)
        if not exact.any():
            continue
        spread = exact.diagonal().sqrt()
        apart = torch.outer(spread, spread).clamp_min(torch.finfo(torch.float64).tiny)
        matrix = layer.weight.double() @ exact
        best = (matrix @ leading(matrix)).norm()
        by_terms = three_terms(layer.weight, exact)
        for way, product_of in WAYS.items():
            found = product_of(samples).double() / len(samples)
            error = (found - exact).abs()
            kept = (matrix @ leading(layer.weight.double() @ found)).norm() / best
            new = {
                "frobenius": error.norm() / exact.norm(),
                "diagonal": (error.diagonal() / apart.diagonal()).max(),
                "entries": error.div_(apart).max(),
                "W C": by_terms,
                "energy": kept.square(),
            }
            for key, value in new.items():
                worst[way][key] = (min if key == "energy" else max)(worst[way][key], float(value))
    return worst


def block_of(name: str) -> int | None:
    """Return the number of a layer's block: "model.layers.3.mlp.up_proj" -> 3; None for a head."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def reference(samples: list[Tensor]) -> Tensor:
    """Return C of all samples in float64."""
    centered = [each.double() - each.double().mean(dim=0) for each in samples]
    rows = torch.cat(centered)
    return rows.T @ rows / len(samples)


def three_terms(weight: Tensor, exact: Tensor) -> Tensor:
    """Return the relative error of W C by W's terms and three of C in float32."""
    moment = exact.float()
    found = product_of_terms(terms(weight, 3), terms(moment, 3))
    product = weight.double() @ moment.double()
    return (found - product).norm() / product.norm()


def leading(product: Tensor) -> Tensor:
    """Return the leading right singular vectors of W C in float64, d x r."""
    wide = product if product.shape[0] <= product.shape[1] else product.T
    vectors = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -RANK:]
    return torch.linalg.qr(product.T @ vectors).Q if wide is product else vectors


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown row for each model and kind of input: Frobenius, diagonal of each way."""
    lines = [
        f"| model | inputs | {' | '.join(WAYS)} | W C by three terms |",
        "|---|---|" + "---|" * (len(WAYS) + 1),
    ]
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["model"], row["inputs"]), {})[row["way"]] = row
    for place, ways in found.items():
        cells = [f"{ways[way]['frobenius']:.1e}, {ways[way]['diagonal']:.1e}" for way in WAYS]
        product = max(row["W C"] for row in ways.values())
        lines.append(f"| {' | '.join([*place, *cells])} | {product:.1e} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
