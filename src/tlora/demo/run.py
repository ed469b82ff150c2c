"""`tlora demo`: the full workflow on the embedded base model, without network or data.

The base is adapted to word problems in a form it has not seen, by LoRA, by the paper's rule and by
the recommended setting, three seeds each. Steps, batch, rank and learning rates are those of
benchmarks/quality/base-ledger-seeds.yaml, which tuned each learning rate on validation rows.
Then PEFT alone loads an adapter of the recommended setting, in a process that cannot import tlora.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from tlora import presets
from tlora.errors import AdapterError, ConfigError
from tlora.files import read_json, replacing_file, write_json
from tlora.tasks.dataconfig import DataConfig
from tlora.training.runconfig import CalibrationConfig, RunConfig
from tlora.training.runfolder import RunFolder

BASE_MODEL = str(files("tlora.demo") / "base")
_MARK = "demo.json"
"""Marks the folder of a demonstration, and stores its results at the end."""
_STEPS = 120
_RATES = {"lora": 1.7e-2, "paper-rule": 3e-3, "recommended": 1.7e-2}
"""Learning rates of LoRA and of the tlora presets."""
_SEEDS = (2, 3, 4)
"""Offsets to the demo's seed; the learning rates were tuned on 0, 1, 7 and 8."""
_BATCH = 100
_DATA = DataConfig(format="raw", max_length=512)
_TOLERANCE = 1e-5
_ALONE = """
import sys
sys.modules["tlora"] = None  # any import of it now fails
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, out, *prompts = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
batch = tokenizer(prompts, padding=True, return_tensors="pt")
with torch.no_grad():
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
save_file({"logits": logits.contiguous()}, out)
"""


@dataclass(frozen=True)
class Score:
    """A line of the demo's table."""

    method: str
    trainable: int
    """Trainable parameters, mean over seeds."""
    exact_match: list[float]
    """Fraction of test rows answered exactly, in [0, 1], one value per seed."""
    loss: list[tuple[float, float]]
    """Training loss by step, mean over seeds."""

    @property
    def mean(self) -> float:
        """Mean exact match."""
        return statistics.fmean(self.exact_match)


@dataclass(frozen=True)
class DemoResult:
    """Results of the demo and their location."""

    scores: tuple[Score, ...]
    test_rows: int
    difference: float
    """Largest logit difference between the trained model and PEFT's reload."""
    adapter: Path
    example: dict[str, str]
    """One test row, with the answers of the base and the adapted model."""
    seconds: float


def check(output_dir: str, seed: int = 0, rows_only: bool = False) -> dict[str, Any]:
    """Check that a folder is free or has the same demonstration, without writing anything.

    Returns:
        The contents of `demo.json`, now or once started.

    Raises:
        ConfigError: the folder has other contents, or another demonstration.
    """
    file = Path(output_dir) / _MARK
    mine = {"kind": "tlora demo", "seed": seed, "rows_only": rows_only}
    if not file.is_file():
        RunFolder(output_dir).refuse_unless_free()
        return mine
    found = read_json(file)
    if not isinstance(found, dict) or found.get("kind") != mine["kind"]:
        raise ConfigError(
            f"{file} was not written by `tlora demo`; use another --output_dir.", "output_dir"
        )
    faults = [
        f"`{name}` is {value!r}, but {output_dir} was started with {found.get(name)!r}; use the"
        " same value, or another --output_dir."
        for name, value in mine.items()
        if found.get(name) != value
    ]
    if faults:
        raise ConfigError(faults, where="demo")
    return mine | found


def run(
    output_dir: str,
    seed: int = 0,
    tell: Callable[[str], None] = lambda text: None,
    steps: int = _STEPS,
) -> DemoResult:
    """Run the demonstration; a second call skips finished methods.

    Args:
        output_dir: folder for the results, free or with this demonstration.
        seed: seed of the rows, the adapters and the training order.
        tell: called with a line of text at the start of each part.
        steps: optimizer steps per training.

    Raises:
        ConfigError: the folder has other contents, or a demonstration of another seed.
        AdapterError: PEFT's reload has different logits.
    """
    folder = Path(output_dir)
    mark = check(output_dir, seed)
    write_json(folder / _MARK, mark)
    with _one_thread():
        result = _run(folder, seed, tell, steps)
    write_json(folder / _MARK, mark | {"scores": [vars(score) for score in result.scores]})
    return result


def write_rows(output_dir: str, seed: int = 0, test: int = 500) -> dict[str, Path]:
    """Write the rows of each task for the embedded base, without training.

    Args:
        output_dir: folder for the results, free or with these rows: train.jsonl and test.jsonl
            in one folder per task. Existing files stay unchanged.
        seed: seed of the rows.
        test: test rows per task.

    Returns:
        The folders by task name.

    Raises:
        ConfigError: the folder has other contents, or the rows of another seed.
    """
    from tlora.demo import corpus

    folder = Path(output_dir)
    write_json(folder / _MARK, check(output_dir, seed, rows_only=True))
    for form in corpus.SHIFTED:
        train_rows, test_rows = corpus.shifted_task(seed, test=test, form=form)
        _write_rows(folder / form / "train.jsonl", train_rows)
        _write_rows(folder / form / "test.jsonl", test_rows)
    return {form: folder / form for form in corpus.SHIFTED}


def _run(folder: Path, seed: int, tell: Callable[[str], None], steps: int) -> DemoResult:
    from tlora import load_adapter
    from tlora.compare.exactmatch import exact_match
    from tlora.demo import corpus

    start = time.perf_counter()
    train_rows, test_rows = corpus.shifted_task(seed)
    train_file = _write_rows(folder / "train.jsonl", train_rows)
    _write_rows(folder / "test.jsonl", test_rows)

    tell(f"the base model answers {len(test_rows)} problems in a form it has not seen")
    base, tokenizer = _load_base()
    example = dict(test_rows[0])

    rows = _tokens(tokenizer, test_rows)
    scores = [Score("base", 0, [exact_match(base, tokenizer, rows, _BATCH)], [])]
    example["base"] = _answer(base, tokenizer, example["prompt"])
    for name in _RATES:
        found, matches = [], []
        for added in _SEEDS:
            tell(f"{name}, seed {seed + added}: {steps} steps on {len(train_rows)} problems")
            last = _train(name, folder / f"{name}-{seed + added}", train_file, seed + added, steps)
            model = load_adapter(_load_base()[0], last.adapter).eval()
            found.append(last)
            matches.append(exact_match(model, tokenizer, rows, _BATCH))
        scores.append(_score(name, found, matches))
    example["adapted"] = _answer(model, tokenizer, example["prompt"])
    tell("PEFT alone loads the adapter, in a process that cannot import tlora")
    prompts = [row["prompt"] for row in test_rows[:8]]
    return DemoResult(
        scores=tuple(scores),
        test_rows=len(test_rows),
        difference=_reload_alone(model, tokenizer, last, prompts),
        adapter=last.adapter,
        example=example,
        seconds=time.perf_counter() - start,
    )


def _score(name: str, runs: Sequence[RunFolder], exact_match: list[float]) -> Score:
    """Return the line of a method from its runs, one per seed."""
    losses: dict[int, list[float]] = {}
    for run in runs:
        for line in map(json.loads, run.log.read_text(encoding="utf-8").splitlines()):
            if "loss" in line:
                losses.setdefault(line["step"], []).append(line["loss"])
    return Score(
        method=name,
        trainable=round(statistics.fmean(run.measured()["trainable_parameters"] for run in runs)),
        exact_match=exact_match,
        loss=[(step, statistics.fmean(values)) for step, values in losses.items()],
    )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread, because more only add overhead for such a small model."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _tokens(tokenizer: Any, rows: Sequence[dict[str, str]]) -> Any:
    from datasets import Dataset

    from tlora.tasks.tokens import causal

    return Dataset.from_list([causal(tokenizer, row, _DATA) for row in rows])


def _answer(model: Any, tokenizer: Any, prompt: str) -> str:
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    written = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()


def _train(name: str, folder: Path, train_file: Path, seed: int, steps: int) -> RunFolder:
    from tlora.training import train

    known = {entry.name for entry in presets.entries()}
    setting: dict[str, Any] = {"method": name, "adapter": {}}
    if name in known:
        setting = presets.layers(name)[-1]
    return train.run(
        RunConfig(
            model=BASE_MODEL,
            task="jsonl",
            train_file=str(train_file),
            output_dir=str(folder),
            method=setting["method"],
            seed=seed,
            data=dataclasses.replace(_DATA),
            adapter={"r": 4, "lora_alpha": 4, "target_modules": "all-linear"} | setting["adapter"],
            calibration=CalibrationConfig(samples=32, batch_size=32),
            trainer={
                "learning_rate": _RATES[name],
                "max_steps": steps,
                "per_device_train_batch_size": 16,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 10,
                "weight_decay": 0.0,
                "logging_steps": 10,
                "save_strategy": "no",
            },
        )
    )


def _load_base() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL)
    return model.eval(), AutoTokenizer.from_pretrained(BASE_MODEL)


def _write_rows(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    """Write rows to a file unless it exists."""
    if not path.is_file():
        with replacing_file(path) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _reload_alone(model: Any, tokenizer: Any, run: RunFolder, prompts: list[str]) -> float:
    """Return the largest logit difference when PEFT loads the adapter without tlora."""
    import torch
    from safetensors.torch import load_file

    out = run.path / "logits.safetensors"
    command = [sys.executable, "-c", _ALONE, BASE_MODEL, str(run.adapter), str(out), *prompts]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AdapterError(f"{run.adapter}: PEFT alone cannot load it:\n{done.stderr.strip()}")
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        here = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    difference = (here - load_file(out)["logits"]).abs().max().item()
    out.unlink()
    if difference > _TOLERANCE:
        raise AdapterError(
            f"{run.adapter}: loaded by PEFT alone, its logits differ by {difference:.2g}."
        )
    return difference
