"""Measure trained updates as the papers of Tri-Matrix and AILoRA do.

    tlora demo --rows_only --output_dir rows
    python benchmarks/quality/analyses.py --rows rows --work WORK

trains the embedded base by the methods and on the tasks of `RUNS`, one `tlora train` each, in
WORK, and keeps what analyses_figures.py draws in analyses.json beside this file. A run that WORK
holds is not trained again. `--model SMOLLM2` adds the spectra of SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tlora import cli
from tlora.adapter.saved import WEIGHTS, Tensors, read_lora
from tlora.adapter.savedconfig import CONFIG
from tlora.demo.run import BASE_MODEL
from tlora.exporters.updates import cosine, effective_rank
from tlora.files import write_json
from tlora.report.parameters import Entries, norms_by_step, placed
from tlora.training.runfolder import RunFolder, provenance

RESULTS = Path(__file__).with_suffix(".json")
STEPS, BATCH, EVERY = 120, 16, 20
RANK = 4
PARTS = ("A", "B", "B.core")
POINTS = 33  # of a spectrum
BINS, WIDEST = 60, 6.0  # of a histogram, in standard deviations


@dataclass(frozen=True)
class Run:
    """One training of the embedded base."""

    method: str
    rate: float
    task: str = "ledger"
    flags: tuple[str, ...] = ()


_RANK_4 = ("--adapter.r", "4", "--adapter.target_modules", "all-linear")
_LORA = (*_RANK_4, "--adapter.lora_alpha", "4")
_RULE = ("--adapter.allocate_rank", "true", "--adapter.allocate_scale", "true")
_RANK_32 = ("--adapter.r", "32", "--adapter.target_modules", "all-linear")
RUNS = {
    "lora": Run("lora", 0.017, flags=_LORA),
    "lora, another seed": Run("lora", 0.017, flags=(*_LORA, "--seed", "1")),
    "tlora": Run("tlora", 0.017, flags=_LORA),
    "tlora, the paper's rule": Run("tlora", 0.0055, flags=(*_LORA, *_RULE)),
    "trimatrix": Run("trimatrix", 0.03, flags=_RANK_32),
    "full, ledger": Run("full", 0.0017),
    "full, program": Run("full", 0.003, "program"),
    "full, spelled": Run("full", 0.003, "spelled"),
}
"""Learning rates are those that base-ledger, base-program and base-spelled chose. Tri-Matrix has
the rank of its paper's code, and the better one of two rates, 0.01 and 0.03."""


def train(run: Run, rows: Path, folder: Path) -> None:
    """Train what `tlora compare benchmarks/quality/base-ledger.yaml` trains, and keep checkpoints.

    Raises:
        SystemExit: the run failed.
    """
    trainer = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": run.rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10,
        "weight_decay": 0.0,
        "eval_strategy": "no",
        "save_strategy": "steps",
        "save_steps": EVERY,
    }
    words = ["train", "--method", run.method, "--model", str(BASE_MODEL), "--data.format", "raw"]
    words += ["--train_file", str(rows / run.task / "train.jsonl"), "--output_dir", str(folder)]
    words += [word for name, value in trainer.items() for word in (f"--trainer.{name}", str(value))]
    if status := cli.main([*words, *run.flags]):
        raise SystemExit(status)


def dense(folder: Path) -> dict[str, Tensor]:
    """Return the update of each module of a run, float64: s B A, or W - W_0 of full fine-tuning."""
    adapter = RunFolder(folder).adapter
    if (adapter / CONFIG).is_file():
        lora = read_lora(adapter)
        factors = {name: lora.factors(name) for name in lora.keys}
        return {n: f.scale * f.b.double() @ f.a.double() for n, f in factors.items()}
    trained, base = weights(adapter), weights(Path(BASE_MODEL))
    return {name: trained[name] - base[name] for name in base}


def weights(folder: Path, names: str = r"layers\.\d+\..*_proj") -> dict[str, Tensor]:
    """Return the weights of the linear layers that ``names`` finds, float64, by module."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        keys = [key for key in file.keys() if re.search(names, key)]  # noqa: SIM118
        return {key.removesuffix(".weight"): file.get_tensor(key).double() for key in keys}


def shape(matrices: Iterable[Tensor]) -> dict[str, Any]:
    """Return the histogram of the entries of all matrices, each over its standard deviation, and
    the mean of their excess kurtosis."""
    every = list(matrices)
    scaled = torch.cat([(m - m.mean()).double().flatten() / m.double().std() for m in every])
    counts = torch.histc(scaled, BINS, -WIDEST, WIDEST)
    density = counts / counts.sum() * BINS / (2 * WIDEST)
    known = [found for m in every if (found := Entries.of(m).excess) is not None]
    return {"density": rounded(density.tolist()), "excess": rounded(mean(known))}


def distributions(work: Path, base: dict[str, Tensor]) -> dict[str, Any]:
    """Return the shape of what trains, of what is drawn, and of the base's weights."""
    parts = {
        "base weights": base.values(),
        "Tri-Matrix: P, fixed": _parts(work / "trimatrix", "B.left").values(),
        "Tri-Matrix: Q, trained": _parts(work / "trimatrix", "B.core").values(),
        "LoRA: A, trained": _parts(work / "lora", "A").values(),
        "LoRA: B, trained": _parts(work / "lora", "B").values(),
        "TLoRA: B, trained": _parts(work / "tlora", "B").values(),
    }
    return {name: shape(matrices) for name, matrices in parts.items()}


def _parts(folder: Path, part: str, step: int = STEPS) -> dict[str, Tensor]:
    """Return a part of an adapter by module, from a checkpoint."""
    tensors = Tensors(RunFolder(folder).checkpoints / f"checkpoint-{step}" / WEIGHTS)
    return {module: tensor for module, of, tensor in placed(tensors) if of == part}


def scales(work: Path) -> dict[str, Any]:
    """Return Tri-Matrix's learned scales by step, and their correlation with ||Q||_F at the end."""
    steps = range(EVERY, STEPS + 1, EVERY)
    learned = {
        step: {n: float(a) for n, a in _parts(work / "trimatrix", "B.scale", step).items()}
        for step in steps
    }
    last = learned[STEPS]
    cores = {name: float(q.norm()) for name, q in _parts(work / "trimatrix", "B.core").items()}
    pairs = torch.tensor([[last[name], cores[name]] for name in last])
    return {
        "by_step": {step: rounded(found) for step, found in learned.items()},
        "correlation_with_norm_of_q": rounded(float(torch.corrcoef(pairs.T)[0, 1])),
    }


def eigenvalues(updates: dict[str, dict[str, Tensor]], base: dict[str, Tensor]) -> dict[str, Any]:
    """Return the eigenvalues of the query projections: of the updates alone, in magnitude, and
    the real parts of those of W + D as the code of Tri-Matrix's paper takes them."""
    queries = [name for name in base if name.endswith("q_proj")]
    alone = {
        run: [rounded(_magnitudes(found[name])) for name in queries]
        for run, found in updates.items()
    }
    whole = {
        run: rounded(_real_parts(base[queries[0]] + u[queries[0]])) for run, u in updates.items()
    }
    whole["base"] = rounded(_real_parts(base[queries[0]]))
    return {"of_updates": alone, "of_weights_in_layer_0": whole}


def _magnitudes(matrix: Tensor) -> list[float]:
    values = torch.linalg.eigvals(matrix).abs().sort(descending=True).values
    return values[values > 1e-9 * values[0]].tolist()


def _real_parts(matrix: Tensor) -> list[float]:
    return torch.linalg.eigvals(matrix).real.sort().values.tolist()


def cosines(updates: dict[str, dict[str, Tensor]], base: dict[str, Tensor]) -> dict[str, Any]:
    """Return the cosine of each run's updates with LoRA's, and that of the adapted weights."""
    lora = updates["lora"]
    others = {run: found for run, found in updates.items() if run != "lora"}
    return {
        "by_chance": rounded(mean(w.numel() ** -0.5 for w in base.values())),
        "of_updates": {
            run: rounded({n: cosine(lora[n], found[n]) for n in base})
            for run, found in others.items()
        },
        "of_weights": {
            run: rounded({n: cosine(base[n] + lora[n], base[n] + found[n]) for n in base})
            for run, found in others.items()
        },
        "of_base_and_lora_weights": rounded({n: cosine(w, w + lora[n]) for n, w in base.items()}),
    }


def movement(updates: dict[str, dict[str, Tensor]], base: dict[str, Tensor]) -> dict[str, Any]:
    """Return how far and where full fine-tuning moves each weight, on each task.

    "moved" is ||D|| / ||W||; "principal" and "minor" are the shares of ||D||^2 in the first and
    the last r right singular vectors of W; "between_tasks" is the mean cosine of two tasks' D.
    """
    full = {run.removeprefix("full, "): d for run, d in updates.items() if run.startswith("full")}
    rows = {name: torch.linalg.svd(w, full_matrices=False)[2] for name, w in base.items()}
    found = {
        task: {
            "moved": rounded({n: float(d[n].norm() / w.norm()) for n, w in base.items()}),
            "principal": rounded({n: _share(d[n], v[:RANK]) for n, v in rows.items()}),
            "minor": rounded({n: _share(d[n], v[-RANK:]) for n, v in rows.items()}),
        }
        for task, d in full.items()
    }
    pairs = [*combinations(full.values(), 2)]
    between = {n: mean(cosine(one[n], two[n]) or 0.0 for one, two in pairs) for n in base}
    chance = {name: RANK / w.shape[1] for name, w in base.items()}
    return {"tasks": found, "between_tasks": rounded(between), "share_by_chance": rounded(chance)}


def _share(update: Tensor, directions: Tensor) -> float:
    return float((update @ directions.T).square().sum() / update.square().sum())


def spectra(base: dict[str, Tensor]) -> dict[str, Any]:
    """Return, of W^Q, W^V, and W^K, which has the shape of W^V, singular values over the largest
    at even distances from first to last, and the effective rank over their number."""
    chosen = {n: w for n, w in base.items() if n.endswith(("q_proj", "k_proj", "v_proj"))}
    values = {name: torch.linalg.svdvals(weight) for name, weight in chosen.items()}
    return {
        name: rounded(
            {
                "values": (v / v[0])[torch.linspace(0, len(v) - 1, POINTS).long()].tolist(),
                "effective_rank": effective_rank(v) / len(v),
            }
        )
        for name, v in values.items()
    }


def _norms(checkpoints: Path) -> dict[str, Any]:
    """Return the norms of what trains, by part and module, at every `EVERY` steps."""
    found = norms_by_step(checkpoints)
    return rounded(
        {
            part: {module: [norm for _, norm in line] for module, line in found[part].items()}
            for part in PARTS
            if part in found
        }
    )


def rounded(value: Any) -> Any:
    """Return numbers in lists and dictionaries with four digits."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def measure(work: Path, model: Path | None) -> dict[str, Any]:
    """Return all analyses of the runs in ``work``."""
    base = weights(Path(BASE_MODEL))
    updates = {name: dense(work / name) for name in RUNS}
    on_ledger = {name: found for name, found in updates.items() if RUNS[name].task == "ledger"}
    trained = {name: RunFolder(work / name).checkpoints for name, r in RUNS.items() if r.flags}
    named = {"embedded base": base}
    if model:
        named[model.name] = weights(model, r"[qkv]_proj")
    return {
        "distributions": distributions(work, base),
        "norms": {name: _norms(folder) for name, folder in trained.items()},
        "scales": scales(work),
        "eigenvalues": eigenvalues(on_ledger, base),
        "cosines": cosines(on_ledger, base),
        "movement": movement(updates, base),
        "spectra": {name: spectra(found) for name, found in named.items()},
        "provenance": provenance(None),
    }


def main() -> None:
    """Train what is missing; measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="also show the spectra of this one's weights")
    flags = parser.parse_args()
    for name, run in RUNS.items():
        if not RunFolder(flags.work / name).finished:
            train(run, flags.rows, flags.work / name)
    write_json(RESULTS, measure(flags.work, flags.model))


if __name__ == "__main__":
    main()
