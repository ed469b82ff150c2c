"""The commands that faults hit, on a tiny model, and the result that each should leave.

A result is a digest of every file that decides what a later command does: bit for bit the same, or
not the result. Times, versions and pages are no part of it.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from faultlib.children import Ended, Launch, import_modules, in_children, run
from faultlib.events import Counter, watch
from tlora.compare.compare import PRELOAD
from tlora.integrity import file_digest, json_digest

Result = dict[str, str]
LIMIT = 600.0
"""Seconds after which a command hangs: it takes one or two on a machine at rest."""
OUT = "{out}"
"""Stands for the folder of the result in a command's words."""


@dataclass(frozen=True)
class Command:
    """A command of `tlora`, and how its result is read."""

    name: str
    words: tuple[str, ...]
    result: Callable[[Path, Ended], Result]
    processes: int = 1
    start: str = ""
    """The folder of the world that its own folder begins as; "": it begins as none."""
    needs: str = ""
    """The command whose result it reads where that is not its own folder."""
    reads: tuple[str, ...] = ()
    """The files in its own folder that it reads."""

    def argv(self, out: Path) -> list[str]:
        """Return its words for a folder."""
        return [word.replace(OUT, str(out)) for word in self.words]


@dataclass(frozen=True)
class Reference:
    """What a command does when nothing is in its way."""

    result: Result
    events: int
    seconds: float
    bytes: int


class World:
    """A model, rows and finished results, below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.case = root / "case"
        """Where cases are done, one after the other; each process has its own."""
        self.commands: dict[str, Command] = {}
        self._references: dict[str, Reference] = {}
        root.mkdir(parents=True, exist_ok=True)
        import_modules(PRELOAD)
        # Training a tokenizer starts threads, and a process with threads cannot be forked.
        in_children([lambda: _write_inputs(root)])
        for command in _commands(root):
            self.commands[command.name] = command

    def launch(self, command: Command, kill_after: float | None = None) -> Launch:
        """Return how to start a command."""
        return Launch(self.case.with_suffix(".log"), LIMIT, command.processes, kill_after)

    def reference(self, name: str) -> Reference:
        """Run a command undisturbed, once; its folder stays under its name."""
        if name not in self._references:
            command, out = self.commands[name], self.root / name / "out"
            if command.needs:
                self.reference(command.needs)
            before = len(sys.modules)
            ended, counter = self._undisturbed(command, out)
            if len(sys.modules) > before + 20:  # the first time it imports what it needs
                ended, counter = self._undisturbed(command, out)
            result = command.result(out, ended)
            files = (path for path in out.parent.rglob("*") if path.is_file())
            size = sum(path.stat().st_size for path in files)
            self._references[name] = Reference(result, counter.value, ended.seconds, size)
        return self._references[name]

    def _undisturbed(self, command: Command, out: Path) -> tuple[Ended, Counter]:
        self.begin(command, out)
        counter, modules = Counter(), self.root / "modules"
        launch = replace(self.launch(command), modules=modules)
        ended = run(command.argv(out), launch, lambda: watch(out.parent, counter))
        if ended.code != 0:
            raise SystemExit(f"{command.name} fails undisturbed:\n{ended.text}")
        import_modules(modules.read_text().split())
        return ended, counter

    def begin(self, command: Command, out: Path) -> None:
        """Make the folder that a command starts with."""
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        if command.start:
            shutil.copytree(self.folder(command.start), out)

    def folder(self, name: str) -> Path:
        """Return the folder of a finished command, or of a run that was killed half way."""
        if not name.startswith("half "):
            self.reference(name)
            return self.root / name / "out"
        out, command = self.root / name / "out", self.commands[name.removeprefix("half ")]
        if not out.exists():
            from faultlib.events import kill_at

            events = self.reference(command.name).events
            self.begin(command, out)
            counter = Counter()
            act = kill_at(int(0.8 * events), "before")
            run(command.argv(out), self.launch(command), lambda: watch(out.parent, counter, act))
        return out


def _write_inputs(root: Path) -> None:
    import support
    from families import FAMILIES

    FAMILIES["llama"].build().save_pretrained(root / "model")
    support.byte_tokenizer().save_pretrained(root / "model")
    for name, numbers in (("train", range(16)), ("test", range(16, 20))):
        rows = [{"prompt": f"{n}+{n}?", "response": f" {'so ' * (n % 3)}{n + n}"} for n in numbers]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = {"logging_steps": 1, "use_cpu": True, "disable_tqdm": True}
    shared: dict[str, Any] = {
        "model": str(root / "model"),
        "train_file": str(root / "train.jsonl"),
        "calibration": {"samples": 4, "batch_size": 2},
        "data": {"format": "raw"},
    }
    run = {
        "adapter": {"r": 4, "lora_dropout": 0.1, "memory_budget": "1GiB"},
        "eval_file": str(root / "test.jsonl"),
    }
    steps = {"max_steps": 4, "save_steps": 1, "save_total_limit": 2, "learning_rate": 1e-2}
    run["trainer"] = trainer | steps | {"per_device_train_batch_size": 2}
    compared = {
        "validation": 4,
        "test_file": str(root / "test.jsonl"),
        "methods": ["lora", "tlora"],
    }
    compared |= {"learning_rates": [1e-2], "tuning_seeds": [0], "final_seeds": [1], "threads": 1}
    compared |= {"adapter": {"r": 2}, "keep_adapters": True}
    compared["trainer"] = trainer | {"max_steps": 2, "per_device_train_batch_size": 2}
    parts = dict(run["trainer"], per_device_train_batch_size=1)
    parts["optim"] = "adamw_torch"
    for name, fields in (("run", run), ("compare", compared), ("parts", run | {"trainer": parts})):
        # JSON is YAML.
        (root / f"{name}.yaml").write_text(json.dumps(shared | fields))


def _commands(root: Path) -> list[Command]:
    at = {name: str(root / f"{name}.yaml") for name in ("run", "compare", "parts")}
    rows, out = str(root / "test.jsonl"), ("--output_dir", OUT)
    run, preset = str(root / "train" / "out"), ("--preset", "paper-rule")
    chat = ("--prompt", "3+3?", "--max_new_tokens", "8")
    scored = ("--test_file", rows, "--tasks", "jsonl", "--data.format", "raw")
    of_run = _reads("train", "run.json", *(f"adapter/{each}" for each in _MODEL))
    run_files = ("*.json", "*.jsonl", "*.safetensors", "*.pt", "*.pth")
    return [
        Command("train", ("train", at["run"], *preset, *out), _run_result),
        Command("train, 2 parts", ("train", at["parts"], *preset, *out), _run_result, 2),
        Command("init", ("init", at["run"], *preset, *out), _run_result),
        Command("compare", ("compare", at["compare"], *out), _comparison),
        Command("eval", ("eval", run, "--with_base", *scored, *out), _evaluation, needs="train"),
        Command("export", ("export", run, "--format", "uniform", *out), _files, needs="train"),
        Command("merge", ("merge", run, *out), _files, needs="train"),
        # What reads the results of others: the folder is theirs.
        Command(
            "resume",
            ("train", at["run"], *preset, *out),
            _run_result,
            **_reads("half train", *run_files),
        ),
        Command(
            "inspect plan",
            ("inspect", f"{OUT}/plan.safetensors"),
            _said,
            **_reads("train", "plan.safetensors"),
        ),
        Command(
            "export of a run",
            ("export", OUT, "--format", "native", *_BESIDE),
            _beside_files,
            **of_run,
        ),
        Command("merge of a run", ("merge", OUT, *_BESIDE), _beside_files, **of_run),
        Command("eval of a run", ("eval", f"m={OUT}", *scored, *_BESIDE), _beside_scores, **of_run),
        Command("chat with a run", ("chat", OUT, *chat), _said, **of_run),
        Command(
            "train further",
            ("train", "--continue_from", OUT, *_further(root), *_BESIDE),
            _beside_run,
            **of_run,
        ),
        Command("chat with an export", ("chat", OUT, *chat), _said, **_reads("export", *_MODEL)),
        Command(
            "chat with a merged model", ("chat", OUT, *chat), _said, **_reads("merge", *_MODEL)
        ),
        Command(
            "compare again",
            ("compare", at["compare"], *out),
            _comparison,
            **_reads("compare", "compare.json", "runs/*.json"),
        ),
        Command(
            "inspect comparison",
            ("inspect", OUT),
            _said,
            **_reads("compare", "compare.json", "runs/*.json"),
        ),
        Command(
            "eval again",
            ("eval", run, "--with_base", *scored, *out),
            _evaluation,
            **_reads("eval", "*.json", "*.jsonl"),
        ),
        Command(
            "inspect evaluation", ("inspect", OUT), _said, **_reads("eval", "*.json", "*.jsonl")
        ),
    ]


_BESIDE = ("--output_dir", f"{OUT}-result")
_MODEL = ("*.safetensors", "*.json", "*.jinja")


def _reads(start: str, *patterns: str) -> dict[str, Any]:
    return {"start": start, "reads": patterns}


def _further(root: Path) -> tuple[str, ...]:
    fields = {"max_steps": 2, "batch_size": 2, "trainer.use_cpu": "true"}
    fields |= {"trainer.disable_tqdm": "true", "train_file": root / "train.jsonl"}
    fields |= {"data.format": "raw"}
    return tuple(str(word) for name, value in fields.items() for word in (f"--{name}", value))


def beside(out: Path) -> Path:
    """Return where a command that reads ``out`` writes."""
    return out.with_name(f"{out.name}-result")


def _digests(folder: Path, *patterns: str) -> Result:
    files = sorted(path for each in patterns for path in folder.rglob(each) if path.is_file())
    return {str(path.relative_to(folder)): file_digest(path) for path in files}


def _files(out: Path, ended: Ended) -> Result:
    return _digests(out, "*.safetensors", "*.json", "*.jinja")


def _run_result(out: Path, ended: Ended) -> Result:
    """Return the adapter, the plan, the scores and the logged losses of a run."""
    found = _digests(out / "adapter", "*.safetensors", "*.json", "*.jinja")
    found |= _digests(out, "plan.safetensors", "metrics.json")
    log = out / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    status = json.loads((out / "run.json").read_text())["status"]
    return found | {"losses": json_digest(losses), "status": status}


def _comparison(out: Path, ended: Ended) -> Result:
    """Return the scores, curves and plans of every run, and the adapters that are kept."""
    found = _digests(out / "adapters", "*.safetensors")
    for file in sorted((out / "runs").glob("*.json")):
        record = json.loads(file.read_text())
        told = ("status", "scores", "curves", "plan", "data_order", "parameters", "rows", "steps")
        found[file.stem] = json_digest({name: record.get(name) for name in told})
    return found


def _evaluation(out: Path, ended: Ended) -> Result:
    """Return the scores and the samples of every pair of model and task."""
    tasks = json.loads((out / "eval.json").read_text())["tasks"]
    told = [{name: task[name] for name in ("name", "scores", "samples", "items")} for task in tasks]
    return _digests(out / "samples", "*.jsonl") | {"scores": json_digest(told)}


def _said(out: Path, ended: Ended) -> Result:
    lines = [line for line in ended.text.splitlines() if str(out) not in line]
    return {"said": json_digest(lines)}


def _beside_files(out: Path, ended: Ended) -> Result:
    return _files(beside(out), ended)


def _beside_scores(out: Path, ended: Ended) -> Result:
    return _evaluation(beside(out), ended)


def _beside_run(out: Path, ended: Ended) -> Result:
    return _run_result(beside(out), ended)
