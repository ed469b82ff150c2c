"""Memory under load: long use, many adapters, many rows. Each part runs under a memory limit.

    python benchmarks/load.py long --minutes 30     # calibrates, plans, attaches, trains, in turn
    python benchmarks/load.py attach --adapters 200 # attaches adapters to one model, in turn
    python benchmarks/load.py rows --rows 1000000   # `tlora train` on a JSONL of that many rows
    python benchmarks/load.py table                 # the table of docs/reliability.md

Each of the first three writes its figures to --output (load.json), beside those of the others, and
exits with 1 if memory grew beyond the bound or passed the limit. All use the base model that comes
with the package, in one process and one thread. The limit holds for the process: the system refuses
private memory beyond it (RLIMIT_DATA), and a watch ends the process if its resident memory, mapped
files included, passes it. Arrow takes its memory from the system here: its own pool reserves 1 GiB
of addresses, which that limit would count.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
MIB = 2**20
SETTLED = 0.2
"""Share of the samples after which memory may not grow: caches fill before."""
KEPT = 120
"""Samples of resident memory that a record keeps."""


class Watch:
    """Records resident memory, and ends the process if it passes a limit (bytes)."""

    def __init__(self, limit: int) -> None:
        import psutil

        self.limit, self.rss = limit, psutil.Process().memory_info
        self.start = time.monotonic()
        self.samples: list[tuple[float, int]] = []
        self.highest = 0
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            used = self.rss().rss
            self.highest = max(self.highest, used)
            if used > self.limit:
                print(f"resident memory passed the limit: {used / MIB:.0f} MiB", file=sys.stderr)
                os._exit(1)
            time.sleep(0.02)

    def sample(self) -> int:
        """Record the resident memory now; return it."""
        used = self.rss().rss
        self.samples.append((round(time.monotonic() - self.start, 1), used))
        return used

    def record(self, **figures: Any) -> dict[str, Any]:
        """Return the figures with time, limit, peak and samples."""
        every = max(1, len(self.samples) // KEPT)
        return figures | {
            "seconds": round(time.monotonic() - self.start, 1),
            "limit_mib": self.limit // MIB,
            "peak_mib": round(max(self.highest, self.peak()) / MIB, 1),
            "rss_mib": [[at, round(used / MIB, 1)] for at, used in self.samples[::every]],
        }

    @staticmethod
    def peak() -> int:
        """Return the largest resident memory of the process so far, by the system, in bytes."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def growth(used: list[int]) -> int:
    """Return how far the last tenth of the samples lies above as many after `SETTLED`, in bytes.

    Each tenth counts by its median.
    """
    some = max(1, len(used) // 10)
    first = int(len(used) * SETTLED)
    return int(statistics.median(used[-some:]) - statistics.median(used[first : first + some]))


class Subject:
    """The packaged base model, with calibration batches and rows of its `ledger` task."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from tlora import TLoraConfig, calibration_batches
        from tlora.demo.run import BASE_MODEL, write_rows

        self.path = str(BASE_MODEL)
        self.train_file = str(write_rows(folder, 0)["ledger"] / "train.jsonl")
        self.model = AutoModelForCausalLM.from_pretrained(BASE_MODEL)
        rows = [json.loads(row) for row in Path(self.train_file).read_text("utf-8").splitlines()]
        tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
        self.batches = calibration_batches(tokenizer, rows[:200], n=16)
        self.config = TLoraConfig(r=8)

    def attached(self) -> Any:
        """Calibrate, plan and attach."""
        from tlora import attach, calibrate, plan

        found = calibrate(self.model, self.batches, self.config)
        return attach(self.model, plan(self.model, found, self.config))

    def use(self, adapted: Any) -> None:
        """Take one step of training without an optimizer: forward and backward."""
        adapted(**self.batches[0]).loss.backward()


# --- long


def long(args: argparse.Namespace, watch: Watch) -> dict[str, Any]:
    """Alternate calibration and runs of `tlora train` in one process."""
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(folder)
        rounds, started = 0, time.monotonic()
        while (lasted := time.monotonic() - started) < 60 * args.minutes:
            adapted = subject.attached()
            subject.use(adapted)
            subject.model = adapted.unload()
            _train(subject.path, subject.train_file, f"{folder}/run-{rounds}", 8, max_train_rows=64)
            rounds += 1
            watch.sample()
            if rounds % 20 == 0:
                print(json.dumps([rounds, *watch.samples[-1]]), file=sys.stderr, flush=True)
    return _bounded(watch, args.bound, minutes=round(lasted / 60, 1), rounds=rounds)


def _train(model: str, train_file: str, output_dir: str, steps: int, **data: Any) -> None:
    """Run `tlora train` in this process, and remove its folder.

    Raises:
        SystemExit: it failed.
    """
    import shutil

    from tlora import cli

    flags = {
        "model": model,
        "train_file": train_file,
        "output_dir": output_dir,
        "adapter.r": 8,
        "calibration.samples": 16,
        "batch_size": 4,
        "max_steps": steps,
        "trainer.save_steps": max(1, steps // 2),
        "trainer.use_cpu": True,
        "trainer.disable_tqdm": True,
        **{f"data.{name}": value for name, value in data.items()},
    }
    given = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    if code := cli.main(["train", *given]):
        raise SystemExit(code)
    shutil.rmtree(output_dir)


def _bounded(watch: Watch, bound: float, **figures: Any) -> dict[str, Any]:
    grown = growth([used for _, used in watch.samples]) / MIB
    found = {"growth_mib": round(grown, 1), "bound_mib": bound, "holds": grown <= bound}
    return watch.record(**figures, **found)


# --- attach


def attach(args: argparse.Namespace, watch: Watch) -> dict[str, Any]:
    """Attach adapters to one model in turn, by each way that users have, and count the remains."""
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(folder)
        adapted = subject.attached()
        adapted.save_pretrained(f"{folder}/adapter")
        subject.model = adapted.unload()
        ways = {
            way.__name__.strip("_"): way(subject, f"{folder}/adapter")
            for way in (_attach_and_unload, _load_and_unload, _load_and_delete)
        }
        found: dict[str, Any] = {}
        for name, turns in ways.items():
            next(turns)
            before = None
            for number in range(args.adapters):
                next(turns)
                watch.sample()
                if number == 0:
                    before = remains(subject.model)
            found[name] = {"first": before, "last": remains(subject.model)}
            turns.close()
    kept = all(each["first"] == each["last"] for each in found.values())
    record = _bounded(watch, args.bound, adapters=args.adapters, ways=found)
    return record | {"holds": record["holds"] and kept}


def _attach_and_unload(subject: Subject, path: str) -> Generator[None, None, None]:
    """`tlora.attach` to the base, then PEFT's `unload`."""
    from tlora import attach, calibrate, plan

    found = plan(
        subject.model, calibrate(subject.model, subject.batches, subject.config), subject.config
    )
    while True:
        yield
        adapted = attach(subject.model, found)
        subject.use(adapted)
        subject.model = adapted.unload()
        del adapted


def _load_and_unload(subject: Subject, path: str) -> Generator[None, None, None]:
    """`tlora.load_adapter` onto the base, then PEFT's `unload`."""
    from tlora import load_adapter

    while True:
        yield
        adapted = load_adapter(subject.model, path, is_trainable=True)
        subject.use(adapted)
        subject.model = adapted.unload()
        del adapted


def _load_and_delete(subject: Subject, path: str) -> Generator[None, None, None]:
    """PEFT's `load_adapter` under another name each time, then `delete_adapter`."""
    from tlora import freeze_a, load_adapter

    adapted = load_adapter(subject.model, path, adapter_name="first")
    number = 0
    try:
        while True:
            yield
            name = f"adapter{number}"
            adapted.load_adapter(path, name, is_trainable=True)
            adapted.set_adapter(name)
            freeze_a(adapted, name)
            subject.use(adapted)
            adapted.set_adapter("first")
            adapted.delete_adapter(name)
            number += 1
    finally:
        subject.model = adapted.unload()


def remains(model: Any) -> dict[str, int]:
    """Return what is alive after a turn: tensors, their bytes, modules, the model's hooks."""
    import torch

    gc.collect()
    # `isinstance` would ask every object for its `__class__`, which deprecated ones warn of.
    alive: list[Any] = gc.get_objects()
    tensors = [each for each in alive if issubclass(type(each), torch.Tensor)]
    modules = [each for each in alive if issubclass(type(each), torch.nn.Module)]
    return {
        "tensors": len(tensors),
        "tensor_bytes": sum(each.nbytes for each in tensors),
        "modules": len(modules),
        "hooks": sum(map(_hooks, model.modules())),
    }


def _hooks(module: Any) -> int:
    return sum(len(held) for name, held in vars(module).items() if name.endswith("_hooks"))


# --- rows


def rows(args: argparse.Namespace, watch: Watch) -> dict[str, Any]:
    """Write a JSONL of prompts and completions, and train one step on it."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        size = write_jsonl(Path(folder, "rows.jsonl"), args.rows)
        stop = threading.Event()
        threading.Thread(target=_sampling, args=(watch, stop, args.rows / 1e6), daemon=True).start()
        from tlora.demo.run import BASE_MODEL

        started = time.monotonic()
        _train(str(BASE_MODEL), f"{folder}/rows.jsonl", f"{folder}/run", steps=1, val_size=1000)
        trained = round(time.monotonic() - started, 1)
        stop.set()
    figures = {"rows": args.rows, "file_mib": round(size / MIB, 1), "train_seconds": trained}
    return watch.record(**figures, holds=watch.peak() <= watch.limit)


def _sampling(watch: Watch, stop: threading.Event, seconds: float) -> None:
    while not stop.wait(max(0.1, seconds)):
        watch.sample()


def write_jsonl(file: Path, count: int) -> int:
    """Write rows of about 130 bytes, all different; return the size of the file in bytes."""
    with file.open("w", encoding="utf-8") as out:
        for number in range(count):
            prompt = f"Question {number}: what is {number} + {number % 977}, in figures?"
            answer = f"{number} + {number % 977} = {number + number % 977}"
            out.write(json.dumps({"prompt": prompt, "completion": answer}) + "\n")
    return file.stat().st_size


# --- the record and the table


def table(record: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    lines = ["| load | limit | peak | growth (bound) | time |", "|---|---|---|---|---|"]
    for name, say in _SAYS.items():
        if not (found := record.get(name)):
            continue
        grew = (
            f"{found['growth_mib']:.1f} MiB ({found['bound_mib']:.0f} MiB)"
            if "growth_mib" in found
            else "-"
        )
        limit, peak = f"{found['limit_mib']:,} MiB", f"{found['peak_mib']:,.0f} MiB"
        lines.append(f"| {say(found)} | {limit} | {peak} | {grew} | {found['seconds']:,.0f} s |")
    return "\n".join(lines)


_SAYS: dict[str, Callable[[dict[str, Any]], str]] = {
    "long": lambda found: (
        f"{found['rounds']:,} rounds of calibrate, plan, attach, and `tlora train`"
    ),
    "attach": lambda found: (
        f"{found['adapters']:,} adapters in turn, {len(found['ways'])} ways, on one model"
    ),
    "rows": lambda found: f"`tlora train` on {found['rows']:,} rows, {found['file_mib']:,.0f} MiB",
}
_LOADS = {"long": long, "attach": attach, "rows": rows}


def main() -> int:
    """Run one load, and add it to the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("load", choices=[*_LOADS, "table"])
    parser.add_argument("--minutes", type=float, default=30, help="of `long`")
    parser.add_argument("--adapters", type=int, default=200, help="of `attach`")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of `rows`")
    parser.add_argument("--limit", type=int, default=2048, help="MiB of memory")
    parser.add_argument("--bound", type=float, default=32, help="MiB that memory may grow")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("load.json"))
    args = parser.parse_args()
    if args.load == "table":
        print(table(json.loads(args.output.read_text("utf-8"))))
        return 0
    import torch

    from tlora.training.runfolder import provenance

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    found = _LOADS[args.load](args, Watch(args.limit * MIB))
    from tlora.files import write_json

    known = json.loads(args.output.read_text("utf-8")) if args.output.is_file() else {}
    write_json(args.output, known | {args.load: found | {"provenance": provenance(0)}})
    print(json.dumps({name: value for name, value in found.items() if name != "rss_mib"}))
    return 0 if found["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
