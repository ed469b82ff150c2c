"""What initializing an adapter costs: tlora, the released rule, the bare passes, PEFT's methods.

    python benchmarks/cost/init.py benchmarks/cost/cpu.yaml             measure what is missing
    python benchmarks/cost/init.py benchmarks/cost/cpu.yaml --table     print the committed results
    python benchmarks/cost/init.py benchmarks/cost/gpu.yaml --device cuda

Every measurement is a process of its own (`measure.py`); repeats are interleaved, so that what
else the machine does falls on all alike. What stands in ``NAME.json`` beside the YAML file is not
measured again; with --minutes no measurement starts after so many, and the command is given again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))

import tables
from subjects import SUBJECTS, Setting

from models import Shape
from tlora.files import read_json, write_json


@dataclass(frozen=True)
class Point:
    """One place to measure at, and what is measured there."""

    name: str
    shape: Shape
    setting: Setting
    subjects: tuple[str, ...]
    repeats: int
    axis: str | None = None
    """What grows, where the point belongs to a curve."""

    @property
    def keys(self) -> list[tuple[str, str, int]]:
        """(key, subject, repeat) of each measurement, repeats outermost."""
        return [
            (f"{self.name}/{subject}/{repeat}", subject, repeat)
            for repeat in range(self.repeats)
            for subject in self.subjects
        ]


def points(setup: dict[str, Any]) -> list[Point]:
    """Return the points of a YAML file: those named, and those of its curves."""
    found = []
    for name, fields in setup.get("points", {}).items():
        found.append(_point(name, setup, fields))
    for axis, values in setup.get("axes", {}).items():
        for value in values:
            fields = _along(axis, value, setup["base"])
            point = _point(f"{axis}={value}", setup, fields)
            found.append(replace(point, axis=axis))
    return found


def _point(name: str, setup: dict[str, Any], fields: dict[str, Any]) -> Point:
    merged = setup["base"] | fields
    shape = {key: merged[key] for key in Shape.__dataclass_fields__ if key in merged}
    setting = {key: merged[key] for key in Setting.__dataclass_fields__ if key in merged}
    subjects = tuple(merged["subjects"])
    return Point(name, Shape(**shape), Setting(**setting), subjects, merged["repeats"])


def _along(axis: str, value: int, base: dict[str, Any]) -> dict[str, Any]:
    if axis == "width":
        return {"hidden": value, "intermediate": base["intermediate"] * value // base["hidden"]}
    names = {"depth": "layers", "rank": "r", "samples": "samples"}
    return {names[axis]: value}


def parse_flags() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("setup", type=Path, help="YAML file of this folder")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--limit", type=float, default=600, help="seconds for one measurement")
    parser.add_argument("--output", type=Path, help="JSON file; default: beside the YAML file")
    parser.add_argument("--table", action="store_true", help="print the results only")
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, plot, print."""
    flags = parse_flags()
    setup = yaml.safe_load(flags.setup.read_text(encoding="utf-8"))
    path = flags.output or flags.setup.with_suffix(".json")
    if not flags.table:
        execute(setup, path, flags)
    result = read_json(path)
    print(tables.page(points(setup), result))
    if not flags.table:
        import plots

        plots.draw(points(setup), result, path)


def execute(setup: dict[str, Any], path: Path, flags: argparse.Namespace) -> None:
    """Run what the JSON file does not hold yet; it is written after every measurement."""
    result = read_json(path) if path.is_file() else {"setup": setup, "places": [], "runs": {}}
    result["setup"] = setup
    end = time.monotonic() + 60 * flags.minutes
    todo = [
        (repeat, point, key, subject)
        for point in points(setup)
        for key, subject, repeat in point.keys
        if key not in result["runs"]
    ]
    todo.sort(key=lambda each: each[0])
    if todo:
        _import_all()
    for number, (_, point, key, subject) in enumerate(todo, start=1):
        if time.monotonic() > end:
            print(f"{len(todo) - number + 1} measurements are left; give the command again")
            return
        run = one(point, subject, flags)
        place = run.pop("place", None)
        if place is not None:
            if place not in result["places"]:
                result["places"].append(place)
            run["place"] = result["places"].index(place)
        result["runs"][key] = run
        write_json(path, result)
        print(
            f"{number}/{len(todo)} {key}", *(f"{k} {v:.4g}" for k, v in _numbers(run)), flush=True
        )


def _numbers(run: dict[str, Any]) -> list[tuple[str, float]]:
    return [(key, value) for key, value in run.items() if isinstance(value, int | float)]


def one(point: Point, subject: str, flags: argparse.Namespace) -> dict[str, Any]:
    """Measure one subject at one point."""
    from measure import in_child

    return in_child(lambda: _measure(point, subject, flags), flags.limit)


def _measure(point: Point, subject: str, flags: argparse.Namespace) -> dict[str, Any]:
    import torch
    from measure import measured
    from subjects import quiet

    if flags.threads:
        torch.set_num_threads(flags.threads)
    run = SUBJECTS[subject]
    device = flags.device

    def prepare() -> tuple[Any, Any]:
        small = Shape(64, 128, 1, 64, samples=8, tokens=32, dtype=point.shape.dtype)
        setting = Setting(r=4, batch_size=4)
        run(small.build(device), small.batches(setting.batch_size, device), setting)
        model = point.shape.build(device)
        return model, point.shape.batches(point.setting.batch_size, device)

    with quiet():
        found = measured(prepare, lambda m, b: run(m, b, point.setting), device)
    return found | {"place": _place()}


def _place() -> dict[str, Any]:
    """Where a measurement was made: versions, hardware, threads, commit."""
    from tlora.training.runfolder import provenance

    place = provenance(None)
    del place["time"], place["seed"]
    return place


def _import_all() -> None:
    """Import before forking what a measurement would else import; nothing is computed."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import importlib

    for name in (
        "transformers.models.llama.modeling_llama",
        "peft.tuners.lora.corda",
        "peft.tuners.lora.eva",
        "peft.tuners.lora.loraga",
        "tlora.adapter.attach",
        "tlora_in_one_file",
    ):
        importlib.import_module(name)


if __name__ == "__main__":
    main()
