"""One run of a comparison in its own process: train, score, write one JSON file."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.compare.compareconfig import EXACT_MATCH
from tlora.compare.comparefolder import tail
from tlora.errors import DataError, DivergenceError
from tlora.files import write_state
from tlora.training.runconfig import RunConfig, SharedConfig
from tlora.training.runfolder import RunFolder, provenance
from tlora.training.setup import Setup, settle_checked

if TYPE_CHECKING:
    import torch
    from datasets import Dataset


def run(payload: dict[str, Any]) -> None:
    """Run ``payload``, and write its record to `payload["file"]`.

    Tuning runs are scored only on the validation rows and final runs only on the test rows. A
    diverged run is finished too: its record has the step of divergence and no scores.

    Args:
        payload: "record" (the part known before the run starts), "config" (a `RunConfig`),
            "validation", "validation_seed", "left_out" (indices of training rows that repeat
            evaluation prompts), "exact_match" (whether to also score by it), "threads", "file",
            "work" (a temporary folder) and "adapter" (where to keep the adapter, or None).
    """
    import datasets
    import torch
    import transformers

    torch.set_num_threads(payload["threads"])
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    work = Path(payload["work"])
    shutil.rmtree(work, ignore_errors=True)
    try:
        measured = _train(payload, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    write_state(payload["file"], payload["record"] | {"status": "finished"} | measured)


def portable(config: SharedConfig) -> dict[str, Any]:
    """Return a configuration as plain values without this machine's folders.

    Keeps the last two parts of a path; the comparison's digests identify the rows and weights.
    """
    values = config.to_dict()
    for name in ("model", "train_file", "eval_file", "test_file", "validation"):
        value = values.get(name)
        if isinstance(value, str) and Path(value).exists():
            values[name] = tail(value)
    if "first_try" in values:
        values["first_try"] = [tail(path) for path in values["first_try"]]
    # Keep the guarded evaluations, but not the location of their files.
    values["data"]["guard_dir"] = None
    own = ("output_dir", "resume", "continue_from")
    return {name: value for name, value in values.items() if name not in own}


def split(setup: Setup, validation: float | str, seed: int) -> tuple[Dataset, Dataset]:
    """Return the training and the validation rows, as tokens.

    Args:
        setup: its `train` has all training rows, its `validation` those of a file.
        validation: a file, or a fraction below 1 or number of training rows to hold out.
        seed: seed for choosing the held-out rows; both parts keep the order of the file.

    Raises:
        DataError: one side of the split is empty.
    """
    if setup.validation is not None:
        return setup.train, setup.validation
    count = len(setup.train)
    share = float(validation)
    held = round(count * share) if share < 1 else int(share)
    if not 0 < held < count:
        raise DataError(
            f"`validation` {validation!r} holds out {held} of {count} training rows, but both sides"
            " need rows; use another fraction or number, or a file."
        )
    chosen = set(random.Random(seed).sample(range(count), held))
    kept = [index for index in range(count) if index not in chosen]
    return setup.train.select(kept), setup.train.select(sorted(chosen))


class OrderDigest:
    """Wraps a collator; while `on`, hashes the rows it sees, in order."""

    def __init__(self, collate: Callable[..., Any]) -> None:
        self.collate = collate
        self.on = False
        self._digest = hashlib.sha256()
        self._rows = 0

    def __call__(self, features: Sequence[dict[str, Any]]) -> Any:
        """Collate ``features``."""
        if self.on:
            for row in features:
                self._digest.update(f"{list(row['input_ids'])};".encode())
            self._rows += len(features)
        return self.collate(features)

    def value(self) -> str | None:
        """Return the digest; None if loader processes collated the rows."""
        return self._digest.hexdigest()[:16] if self._rows else None


def _train(payload: dict[str, Any], work: Path) -> dict[str, Any]:
    from tlora.adapter.plan import AdapterPlan
    from tlora.training.arguments import training_arguments
    from tlora.training.initialize import prepare, save_adapter
    from tlora.training.peak_memory import PeakMemory
    from tlora.training.train import make_trainer, timed

    config = RunConfig.from_dict(payload["config"])
    setup, scored, order = _rows(config, payload)
    folder = RunFolder(work)
    work.mkdir(parents=True)
    arguments = training_arguments(setup, folder.checkpoints)
    memory = PeakMemory(arguments.device)
    seconds: dict[str, float] = {}
    with timed(seconds, "load"):
        model = setup.load_model(arguments.device)
    base = {_base_name(name) for name, _ in model.named_parameters()}
    with timed(seconds, "initialise"):
        prepared = prepare(setup, model)
    memory.stage("initialise")
    parameters = count_parameters(prepared.model, base)
    trainer = make_trainer(setup, prepared, arguments, folder)
    with timed(seconds, "train"):
        diverged = _diverged_at(trainer, order)
    memory.stage("train")
    losses = [(line["step"], line["loss"]) for line in trainer.state.log_history if "loss" in line]
    with timed(seconds, "evaluate"):
        written, rated = payload["exact_match"], scored if diverged is None else {}
        found = {name: _scores(trainer, rows, setup, written) for name, rows in rated.items()}
    if payload["adapter"] and diverged is None:
        save_adapter(prepared, setup, Path(payload["adapter"]))
    modules = prepared.plan.modules if isinstance(prepared.plan, AdapterPlan) else {}
    return {
        "scores": _finite(found),
        "rows": {"train": len(setup.train)} | {name: len(rows) for name, rows in scored.items()},
        "steps": trainer.state.max_steps,
        "diverged": diverged,
        "batch": arguments.train_batch_size * arguments.gradient_accumulation_steps,
        "data_order": order.value() if diverged is None else None,
        "autocast": next((name for name in ("bf16", "fp16") if getattr(arguments, name)), None),
        "curves": _finite({"loss": losses}),
        "parameters": parameters,
        "memory": memory.to_dict() | {"device": str(arguments.device)},
        "seconds": seconds,
        "plan": {n: {"rank": m.rank, "scale": m.scale} for n, m in modules.items()} or None,
        "provenance": provenance(config.seed, output=Path(payload["file"]).parent.parent),
        "threads": payload["threads"],
    }


def _diverged_at(trainer: Any, order: OrderDigest) -> int | None:
    """Train, and return the step of divergence, if any."""
    order.on = True
    try:
        trainer.train()
    except DivergenceError as stop:
        return stop.step
    finally:
        order.on = False
    return None


def _scores(trainer: Any, rows: Dataset, setup: Setup, written: bool) -> dict[str, Any]:
    """Return the trainer's scores on ``rows`` and, if ``written``, the exact match."""
    from tlora.compare.exactmatch import exact_match
    from tlora.training.train import scores

    found = scores(trainer, rows)
    if written:
        size = trainer.args.per_device_eval_batch_size
        found[EXACT_MATCH] = exact_match(trainer.model, setup.tokenizer, rows, size)
    return found


def _rows(
    config: RunConfig, payload: dict[str, Any]
) -> tuple[Setup, dict[str, Dataset], OrderDigest]:
    """Return the setup of a run, the rows to score by name, and its row digest."""
    validation = payload["validation"]
    file = validation if isinstance(validation, str) else None
    setup = settle_checked(config, file, payload["left_out"])
    train, held_out = split(setup, validation, payload["validation_seed"])
    final = payload["record"]["phase"] == "final"
    scored = {"test": setup.held_out} if final else {"validation": held_out}
    order = OrderDigest(setup.collator)
    setup = dataclasses.replace(setup, train=train, held_out=held_out, collator=order)
    return setup, scored, order


def count_parameters(model: torch.nn.Module, base: set[str]) -> dict[str, int]:
    """Count trainable parameters of the adapter, and of the base model (head, biases and others).

    Args:
        model: the prepared model.
        base: parameter names of the base model, as returned by `_base_name`.
    """
    counts = {"adapter": 0, "others": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts["others" if _base_name(name) in base else "adapter"] += parameter.numel()
    return counts


def _base_name(name: str) -> str:
    """Return the base model's name for a parameter of a wrapped model.

    PEFT wraps the model, adapted layers, and fully trained modules.
    """
    parts = name.removeprefix("base_model.model.").split(".")
    if "modules_to_save" in parts:
        place = parts.index("modules_to_save")
        del parts[place : place + 2]  # with the adapter's name
    return ".".join(part for part in parts if part not in ("base_layer", "original_module"))


def _finite(value: Any) -> Any:
    """Return plain values with None for NaN and infinities, which JSON lacks."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
