"""How often intervals of a paired difference hold the truth, and how often equal models "win".

    python benchmarks/quality/intervals.py

Two models answer the same items right or wrong; an item goes up with one chance and down with
another, drawn again and again. For each case: how often the 95 % interval holds the true
difference, by percentile and by BCa limits (Efron 1987), and how often a model is called better or
worse: by the interval alone, by McNemar's exact test alone, and by both, which is what
`tlora.report.paired` does. The table is printed and goes to intervals.json beside this file.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from scipy import stats
from tqdm import tqdm

from tlora.files import write_json
from tlora.report.paired import resampled_means, sign_flip

TRIALS = 2000
CASES = [  # items, chance up, chance down
    (50, 0.04, 0.04),
    (50, 0.10, 0.10),
    (200, 0.02, 0.02),
    (200, 0.10, 0.10),
    (1319, 0.05, 0.05),
    (50, 0.16, 0.02),
    (200, 0.10, 0.03),
    (1319, 0.06, 0.03),
]
NORMAL = stats.norm
Limits = tuple[float, float]


def limits(means: np.ndarray, shares: tuple[float, float]) -> Limits:
    low = np.quantile(means, shares[0], method="lower")
    return float(low), float(np.quantile(means, shares[1], method="higher"))


def bca(differences: np.ndarray, means: np.ndarray) -> Limits:
    """Return the bias-corrected and accelerated limits; ties count half to the bias."""
    mean = differences.mean().round(12)
    below = ((means < mean).mean() + (means <= mean).mean()) / 2
    bias = NORMAL.ppf(min(max(below, 1 / len(means)), 1 - 1 / len(means)))
    centered = differences - differences.mean()
    spread = (centered**2).sum() ** 1.5
    acceleration = (centered**3).sum() / (6 * spread) if spread else 0.0
    shares = []
    for z in NORMAL.ppf([0.025, 0.975]):
        moved = bias + z
        shares.append(float(NORMAL.cdf(bias + moved / (1 - acceleration * moved))))
    return limits(means, (shares[0], shares[1]))


def measure(items: int, up: float, down: float, seed: int) -> dict[str, float]:
    draw = np.random.default_rng(seed)
    counts = dict.fromkeys(
        ("held_percentile", "held_bca", "win_percentile", "win_bca", "win_exact", "win_both"), 0
    )
    for _ in range(TRIALS):
        ups, downs, same = draw.multinomial(items, [up, down, 1 - up - down])
        differences = np.repeat([1.0, -1.0, 0.0], [ups, downs, same])
        means = resampled_means(differences, np.ones(items)).round(12)
        exact = sign_flip(differences) < 0.05
        for name, (low, high) in (
            ("percentile", limits(means, (0.025, 0.975))),
            ("bca", bca(differences, means)),
        ):
            truth = round(up - down, 12)
            counts[f"held_{name}"] += low <= truth <= high
            counts[f"win_{name}"] += not low <= 0 <= high
            if name == "percentile":
                counts["win_exact"] += exact
                counts["win_both"] += exact and not low <= 0 <= high
    return {name: int(count) / TRIALS for name, count in counts.items()}


def main() -> None:
    lines = []
    for case in tqdm(CASES):
        found = measure(*case, seed=len(lines))
        lines.append(dict(zip(("items", "up", "down"), case, strict=True)) | found)
    header = list(lines[0])
    print(" ".join(f"{name:>15}" for name in header))
    for line in lines:
        print(" ".join(f"{line[name]:>15.4g}" for name in header))
    error = math.sqrt(0.05 * 0.95 / TRIALS)
    print(f"standard error of a share near 0.05 or 0.95: {error:.4f}")
    write_json(Path(__file__).with_suffix(".json"), {"trials": TRIALS, "cases": lines})


if __name__ == "__main__":
    main()
