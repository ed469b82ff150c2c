"""What whitening the frozen A gains or costs, by how even the features were without it.

    python benchmarks/quality/whitening.py
    python benchmarks/quality/whitening.py base-spelled \
        --model MODEL --train_file TRAIN --test_file TEST

The first prints the table of docs/findings.md, from the committed comparisons. The second measures
how even the features ``A x`` of W C are over a comparison's calibration rows,
``tr(K)^2 / (r tr(K^2))`` with K their uncentered second moment (1: all r of one size, 1/r: one has
it all; the median of the modules), and keeps it in whitening.json beside this file.
"""

from __future__ import annotations

import argparse

from kept import HERE, basis_of, configured, evenness, moments_of

from tlora.compare.comparefolder import CompareFolder
from tlora.files import read_json, write_json
from tlora.report.comparison import Results, read

KEPT = HERE / "whitening.json"
PLAIN, WHITENED = "tlora, equal ranks and scales", "tlora, equal ranks and scales, whitened"
TABLES = {
    "smollm2-sst2": "SmolLM2-135M-Instruct, SST-2, loss",
    "smollm2-equations": "SmolLM2-135M-Instruct, equations, loss",
    "base-spelled": "embedded base, `spelled`, loss",
    "minilm-stsb": "MiniLM-L6, STS-B, Pearson",
    "minilm-sst2": "MiniLM-L6, SST-2, accuracy",
    "base-program": "embedded base, `program`, exact match",
    "text30m-code": "base of 30 million, code as text, loss",
    "tinystories-code": "tinystories-656k, code as text, loss",
    "tinystories-gsm8k": "tinystories-656k, GSM8K's text, loss",
    "base-ledger-seeds": "embedded base, `ledger`, exact match",
}
SEED = 2


def main() -> None:
    """Measure one comparison, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comparison", nargs="?", help="name of a YAML file beside this one")
    for name in ("model", "train_file", "test_file"):
        parser.add_argument(f"--{name}")
    flags = parser.parse_args()
    shares = read_json(KEPT) if KEPT.is_file() else {}
    if flags.comparison:
        shares[flags.comparison] = measured(flags)
        write_json(KEPT, shares)
    print(table(shares))


def measured(flags: argparse.Namespace) -> float:
    """Return how even W C's features are, as a share of r."""
    config = configured(flags)
    basis = basis_of(config, "weight-covariance", SEED)
    rank = len(next(iter(basis.values())))
    return round(evenness(basis, moments_of(config, SEED)) / rank, 2)


def table(shares: dict[str, float]) -> str:
    """Return a line per comparison, the most uneven features first."""
    lines = [
        "| | evenness | LoRA | W C | W C whitened | whitened minus W C | whitened minus LoRA |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in sorted(TABLES, key=lambda name: shares.get(name, 1.1)):
        results = read(CompareFolder(HERE / name))
        score = {method.label: method.score.mean for method in results.methods}
        cells = [
            TABLES[name],
            f"{shares[name]:.2f}" if name in shares else "",
            *(f"{score[label]:.3f}" for label in ("lora", PLAIN, WHITENED)),
            *(_difference(results, label) for label in (PLAIN, "lora")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _difference(results: Results, label: str) -> str:
    """Return the whitened setting minus another, in bold beyond the noise."""
    found = results.find(WHITENED, label)
    text = f"{found.interval.mean:+.3f} ± {found.interval.half:.3f}"
    return f"**{text}**" if found.better else text


if __name__ == "__main__":
    main()
