"""What a frozen A leaves out: the share of later gradients, and of a learned update, in its rows.

    python benchmarks/quality/kept.py base-ledger --learning_rate 0.01 --steps 0 15 30 60 120 \
        --model MODEL --train_file TRAIN --test_file TEST

trains plain LoRA as the comparison of that name does (`benchmarks/quality/base-ledger.yaml`) and
stops at `--steps` to take the mean gradient G of the test rows at the merged weights. For each
basis, computed before the first step from the calibration rows, the table has
``sum ||G A^T A||^2 / sum ||G||^2`` over the modules (A with orthonormal rows): the share of the
gradient's square that a step along B alone can follow. "best" is what G's own leading directions
would keep, "LoRA's A" what LoRA's trained A spans at that step; the next column is the share of
LoRA's whole update, ``||B A A_0^T A_0||^2 / ||B A||^2``. The last column says how even the features
``A x`` are over the calibration rows, ``tr(K)^2 / tr(K^2)`` with K their uncentered second moment:
r where all are of one size and none follows another, 1 where one has it all; the median of the
modules. Results are kept in kept.json, one record a comparison; `--table` prints them.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from tlora import calibrate
from tlora.compare.compareconfig import CompareConfig
from tlora.compare.onerun import split
from tlora.files import read_json, write_json
from tlora.training.arguments import training_arguments
from tlora.training.initialize import prepare
from tlora.training.runconfig import RunConfig
from tlora.training.runfolder import RunFolder, provenance
from tlora.training.setup import Setup, settle
from tlora.training.train import make_trainer
from tlora.yamlfiles import read_yaml

HERE = Path(__file__).parent
BASES = {
    "G": "gradient",
    "N": "gradient-moment",
    "W N": "weight-gradient-moment",
    "W C^1/2": "weight-half-covariance",
    "W C": "weight-covariance",
    "C": "covariance",
    "random": "random",
}
BEST, OWN = "best", "LoRA's A"


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comparison", nargs="?", help="name of a YAML file beside this one")
    for name in ("model", "train_file", "test_file"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--learning_rate", type=float, help="LoRA's")
    parser.add_argument("--steps", type=int, nargs="+", help="after which to measure; 0: before")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--rows", type=int, default=200, help="test rows of the gradients")
    parser.add_argument("--table", action="store_true", help="print the results only")
    flags = parser.parse_args()
    path = HERE / "kept.json"
    records = read_json(path) if path.is_file() else {}
    if not flags.table:
        records[flags.comparison] = measured(flags)
        write_json(path, records)
    for name, record in records.items():
        print(f"{name}\n\n{table(record)}\n")


def measured(flags: argparse.Namespace) -> dict[str, Any]:
    """Return the shares of one comparison by basis and step."""
    config = configured(flags)
    bases = {label: basis_of(config, basis, flags.seed) for label, basis in BASES.items()}
    inputs = moments_of(config, flags.seed)
    lora = next(entry for entry in config.entries() if entry.name == "lora")
    setup = settled(config, config.run_config(lora, flags.learning_rate, flags.seed))
    with tempfile.TemporaryDirectory() as folder:
        watch = trained(setup, Path(folder), bases, flags)
    return {
        "title": config.title,
        "rate": flags.learning_rate,
        "seed": flags.seed,
        "rows": min(flags.rows, len(setup.held_out)),
        "gradient": watch.gradient,
        "update": watch.update(),
        "features": {label: round(evenness(basis, inputs), 2) for label, basis in bases.items()},
        "provenance": provenance(flags.seed),
    }


def configured(flags: argparse.Namespace) -> CompareConfig:
    """Return the comparison that the flags name, with their model and files."""
    comparison = read_yaml(HERE / f"{flags.comparison}.yaml")
    files = {name: getattr(flags, name) for name in ("model", "train_file", "test_file")}
    return CompareConfig.from_dict(comparison | files | {"output_dir": "unused"})


def settled(config: CompareConfig, run: RunConfig) -> Setup:
    """Return a run's setup with the validation rows left out of the training rows, as compared."""
    setup = settle(run)
    train, _ = split(setup, config.validation, config.validation_seed)
    return dataclasses.replace(setup, train=train)


def task_aware(config: CompareConfig, basis: str, seed: int) -> Setup:
    """Return the setup of TLoRA with a basis, equal ranks and scales."""
    entry = next(entry for entry in config.entries() if entry.name == "tlora")
    options = entry.adapter | {"basis": basis, "allocate_rank": False, "allocate_scale": False}
    run = config.run_config(dataclasses.replace(entry, adapter=options), 1e-3, seed)
    return settled(config, run)


def moments_of(config: CompareConfig, seed: int) -> dict[str, Tensor]:
    """Return the calibration rows' uncentered moment of every module, d x d float64, by name."""
    setup = task_aware(config, "covariance", seed)
    found = calibrate(setup.load_model("cpu"), setup.calibration_batches(), setup.options)
    return {name: module.uncentered().double() for name, module in found.modules.items()}


def evenness(basis: dict[str, Tensor], moments: dict[str, Tensor]) -> float:
    """Return the median over modules of how many features of one size ``A x`` amounts to."""
    sizes = [a @ moments[name] @ a.T for name, a in basis.items()]
    return median(float(k.trace() ** 2 / k.square().sum()) for k in sizes)


def basis_of(config: CompareConfig, basis: str, seed: int) -> dict[str, Tensor]:
    """Return an orthonormal A of every module, r x d float64, by the module's name."""
    setup = task_aware(config, basis, seed)
    found = prepare(setup, setup.load_model("cpu")).plan
    return {name: _orthonormal(module.lora_A) for name, module in found.modules.items()}


def trained(setup: Setup, folder: Path, bases: Any, flags: argparse.Namespace) -> Watch:
    """Train by the setup, measuring at the steps that are asked for."""
    arguments = training_arguments(setup, folder / "checkpoints")
    model = setup.load_model("cpu")
    prepared = prepare(setup, model)
    rows = setup.held_out.select(range(min(flags.rows, len(setup.held_out))))
    loader = DataLoader(rows, batch_size=25, collate_fn=setup.collator)
    watch = Watch(prepared.model, loader, bases, flags.steps)
    trainer = make_trainer(setup, prepared, arguments, RunFolder(folder))
    trainer.add_callback(watch)
    trainer.train()
    return watch


class Watch(TrainerCallback):
    """Takes the shares of the gradient at some steps of a LoRA run."""

    def __init__(self, model: nn.Module, loader: Any, bases: Any, steps: Sequence[int]) -> None:
        self.model, self.loader, self.bases, self.steps = model, loader, bases, steps
        names = next(iter(bases.values()))
        self.layers = {n: model.get_submodule(f"base_model.model.{n}") for n in names}
        self.gradient: dict[str, dict[int, float]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure before the first step."""
        self._measure(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure after a step that is asked for."""
        self._measure(state.global_step)

    def update(self) -> dict[str, float]:
        """Return the share of what LoRA has learned, B A, in each basis."""
        deltas = {
            name: _double(layer.lora_B) @ _double(layer.lora_A)
            for name, layer in self.layers.items()
        }
        shares = {label: _share(deltas, basis) for label, basis in self.bases.items()}
        return {label: round(share, 4) for label, share in shares.items()}

    def _measure(self, step: int) -> None:
        if step not in self.steps:
            return
        gradients = self._gradients()
        shares = {label: _share(gradients, basis) for label, basis in self.bases.items()}
        rank = len(next(iter(self.bases["random"].values())))
        squares = {n: torch.linalg.svdvals(g).square() for n, g in gradients.items()}
        total = sum(s.sum() for s in squares.values())
        shares[BEST] = float(sum(s[:rank].sum() for s in squares.values()) / total)
        own = {n: _orthonormal(_double(layer.lora_A)) for n, layer in self.layers.items()}
        shares[OWN] = _share(gradients, own)
        for label, share in shares.items():
            self.gradient.setdefault(label, {})[step] = round(share, 4)

    def _gradients(self) -> dict[str, Tensor]:
        weights = [layer.get_base_layer().weight for layer in self.layers.values()]
        sums = [torch.zeros_like(weight, dtype=torch.float64) for weight in weights]
        with _evaluating(self.model, weights):
            for batch in self.loader:
                size = len(batch["labels"])
                loss = self.model(**batch).loss
                found = torch.autograd.grad(loss, weights)
                sums = [old + size * new for old, new in zip(sums, found, strict=True)]
        return dict(zip(self.layers, sums, strict=True))


@contextmanager
def _evaluating(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let the weights alone take gradients, without dropout; and put all back."""
    training, flags = model.training, {p: p.requires_grad for p in model.parameters()}
    model.eval().requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        model.train(training)


def _double(part: Any) -> Tensor:
    return part["default"].weight.detach().double()


def _orthonormal(basis: Tensor) -> Tensor:
    return torch.linalg.qr(basis.double().T).Q.T


def _share(matrices: dict[str, Tensor], basis: dict[str, Tensor]) -> float:
    kept = sum((matrix @ basis[name].T).square().sum() for name, matrix in matrices.items())
    return float(kept / sum(matrix.square().sum() for matrix in matrices.values()))


def table(record: dict[str, Any]) -> str:
    """Return one comparison's shares as Markdown."""
    steps = list(next(iter(record["gradient"].values())))
    heads = [f"gradient, step {step}" for step in steps]
    lines = [
        f"| A | {' | '.join(heads)} | LoRA's update | features |",
        "|---" * (len(steps) + 3) + "|",
    ]
    for label in (BEST, OWN, *BASES):
        shares = [f"{record['gradient'][label][step]:.3f}" for step in steps]
        update, features = record["update"].get(label), record["features"].get(label)
        cells = [f"{update:.3f}", f"{features:.1f}"] if update is not None else ["", ""]
        lines.append(f"| {' | '.join([label, *shares, *cells])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
