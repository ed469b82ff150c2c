"""Where the time of an initialization goes: seconds of each stage, and its share of the peak.

    python benchmarks/cost/stages.py benchmarks/cost/cpu.yaml
    python benchmarks/cost/stages.py benchmarks/cost/gpu.yaml --device cuda --points "32 layers"
    python benchmarks/cost/stages.py --table

Timers stand around the functions in `STAGES` (`stagetimers.py`); on a GPU each waits for the device
before and after, so the sum is above the time without timers, which is measured too. A stage that
runs inside another counts for itself alone. What no timer holds is the passes, with the launches
between. Operations are counted from shapes (`flops.py`) for the plain way of doing each stage, so a
stage that does less work than that can lie above its share. The peak is the best measured on the
device in the same process: of float32 products, and where the device has them of bfloat16 products
with float32 results.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))

from init import Point, _import_all, _place, points
from measure import in_child, synchronized
from stagetimers import BY_OUTPUTS, STAGES, Timers

from models import Shape
from tlora.files import read_json, write_json

PATH = Path(__file__).with_name("stages.json")


def main() -> None:
    """Measure, write, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("setup", nargs="?", type=Path, help="YAML file of this folder")
    parser.add_argument("--points", nargs="+", help="of the file; default: all that measure tlora")
    parser.add_argument("--label", default="", help="tells runs of one point apart, as 'before'")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one measurement")
    parser.add_argument("--output", type=Path, default=PATH)
    parser.add_argument("--table", action="store_true", help="print the results only")
    flags = parser.parse_args()
    result = {"places": [], "runs": {}}
    if flags.output.is_file():
        result = read_json(flags.output)
    if not flags.table:
        execute(flags, result)
    print(page(result))
    if not flags.table:
        import plots

        plots.stages(result, flags.output.with_suffix(".png"))


def execute(flags: argparse.Namespace, result: dict[str, Any]) -> None:
    """Measure the points, each in a process of its own; written after each."""
    setup = yaml.safe_load(flags.setup.read_text(encoding="utf-8"))
    chosen = [
        point
        for point in points(setup)
        if point.axis is None
        and "tlora" in point.subjects
        and (flags.points is None or point.name in flags.points)
    ]
    _import_all()
    for point in chosen:
        run = in_child(functools.partial(measured, point, flags), flags.limit)
        if "failed" in run:
            raise SystemExit(f"{point.name}: {run['failed']}")
        place = run.pop("place")
        if place not in result["places"]:
            result["places"].append(place)
        run["place"] = result["places"].index(place)
        key = ", ".join(filter(None, (flags.setup.stem, point.name, flags.label)))
        result["runs"][key] = run
        write_json(flags.output, result)


def measured(point: Point, flags: argparse.Namespace) -> dict[str, Any]:
    """Return seconds and operations of the stages at a point, and the device's peaks."""
    import torch
    from flops import operations, peaks
    from subjects import Setting, bare_activations, quiet, tlora

    if flags.threads:
        torch.set_num_threads(flags.threads)
    device = flags.device

    def timed(run: Any, *args: Any) -> tuple[float, Any]:
        synchronized(device)
        start = time.perf_counter()
        result = run(*args)
        synchronized(device)
        return time.perf_counter() - start, result

    with quiet():
        small = Shape(64, 128, 1, 64, samples=8, tokens=32, dtype=point.shape.dtype)
        setting = Setting(r=4, batch_size=4)
        tlora(small.build(device), small.batches(4, device), setting)
        model = point.shape.build(device)
        batches = point.shape.batches(point.setting.batch_size, device)
        passes, _ = timed(bare_activations, model, batches, point.setting)
        model.disable_input_require_grads()
        model.requires_grad_(True)
        plain, adapted = timed(tlora, model, batches, point.setting)
        ranks = _ranks(adapted)
        model = adapted.unload().requires_grad_(True)
        del adapted
        with Timers(device) as timers:
            total, _ = timed(tlora, model, batches, point.setting)
    seconds = dict(timers.seconds)
    seconds["passes"] = total - sum(seconds.values())
    counted = operations(point.shape, ranks, by_outputs=timers.calls[BY_OUTPUTS] > 0)
    return {
        "seconds": seconds,
        "calls": dict(timers.calls),
        "operations": counted,
        "peaks": peaks(device),
        "dtype": point.shape.dtype,
        "total": total,
        "without timers": plain,
        "bare, activations alone": passes,
        "place": _place(),
    }


def _ranks(adapted: Any) -> dict[str, int]:
    """Return the rank of each adapted module."""
    return {
        name: module.r["default"]
        for name, module in adapted.named_modules()
        if hasattr(module, "r")
    }


def page(result: dict[str, Any]) -> str:
    """Return a Markdown table for each run."""
    return "\n\n".join(table(key, run) for key, run in result["runs"].items())


def table(key: str, run: dict[str, Any]) -> str:
    """Return seconds, operations and shares of one run."""
    peaks = run["peaks"]
    said = ", ".join(f"{name} {value / 1e12:.3g} TFLOP/s" for name, value in peaks.items())
    lines = [
        f"**{key}**: {run['without timers']:.2f} s, {run['total']:.2f} s with timers; the bare"
        f" passes to the activations {run['bare, activations alone']:.2f} s. Peak: {said}",
        "",
        "| stage | seconds | share of time | TFLOP |"
        + "".join(f" of the {name} peak |" for name in peaks),
        "|---|---|---|---|" + "---|" * len(peaks),
    ]
    for stage in ("passes", *STAGES):
        seconds, counted = run["seconds"][stage], run["operations"].get(stage, 0)
        cells = [stage, f"{seconds:.2f}", f"{seconds / run['total']:.0%}"]
        cells.append(f"{counted / 1e12:.3g}" if counted else "")
        for peak in peaks.values():
            share = counted / (seconds * peak) if seconds else 0.0
            cells.append(f"{share:.0%}" if counted and seconds else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
