"""Kills, full disks, damaged files: what `tlora` makes of them, case by case.

    python scripts/faults.py --count 400 --output faults.jsonl

A case is a command on a tiny model, a fault, and the same command again (of a damaged file: the
command that reads it). It is recovered if the result equals that of an undisturbed command bit for
bit, or refused if the command says in a sentence what is damaged. Anything else is lost: another
result, a traceback, a half-written file that stays. Stuck is a command that hangs, or a lock that
nobody holds. The exit code is 1 if a case is lost or stuck.

With --output each case is noted as it ends, and the same command does the rest. Needs Linux; as
root the full disk and the read-only folder are real file systems, otherwise the system's answers
are injected.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_OWN_MOUNTS = "TLORA_FAULTS_OWN_MOUNTS"
OUTCOMES = ("recovered", "refused", "lost", "stuck")
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]


def main(argv: list[str] | None = None) -> int:
    """Run the cases; return the exit code."""
    options = _options(argv)
    from faultlib.mounts import can_mount

    if argv is None and can_mount() and _OWN_MOUNTS not in os.environ:
        # What is mounted goes with the process, however that ends.
        os.environ[_OWN_MOUNTS] = "1"
        os.execvp("unshare", ["unshare", "--mount", sys.executable, *sys.argv])
    from faultlib.kinds import KINDS

    planned = plan(KINDS, options.count, options.seed, options.only)
    folder = Path(tempfile.mkdtemp(prefix="tlora-faults-"))
    output = options.output or folder / "cases.jsonl"
    try:
        done = read(output)
        run_cases([c for c in planned if c["id"] not in done], folder, output, options.jobs)
        done = read(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    cases = [done[case["id"]] for case in planned]
    print(table(cases))
    bad = [case for case in cases if case["outcome"] in ("lost", "stuck")]
    for case in bad:
        print(f"\n{case['id']}: {case['outcome']}: {case['detail']}")
    return 1 if bad else 0


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--count", type=int, default=400, help="how many cases, of all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="words; cases that have one of them: kill,merge")
    parser.add_argument("--output", type=Path, help="JSON lines; cases in it are not run again")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    return parser.parse_args(argv)


def plan(kinds: Any, count: int, seed: int, only: str = "") -> list[dict[str, Any]]:
    """Return about ``count`` cases, spread evenly over each command's events, time or bytes."""
    whole = sum(kind.weight * len(kind.commands) for kind in kinds)
    words = [word.strip() for word in only.split(",") if word.strip()]
    cases = []
    for kind in kinds:
        number = max(1, round(count * kind.weight / whole))
        for command in kind.commands:
            for index in range(number):
                name = f"{kind.name} | {command} | seed {seed} | {index + 1} of {number}"
                share = (index + random.Random(name).random()) / number
                cases.append({"id": name, "kind": kind.name, "command": command, "share": share})
    random.Random(seed).shuffle(cases)  # so a stopped call has run cases of every kind
    return [case for case in cases if not words or any(word in case["id"] for word in words)]


def run_cases(cases: list[dict[str, Any]], folder: Path, output: Path, jobs: int = 1) -> None:
    """Run cases in ``folder``; each adds a line with its outcome to ``output``.

    Args:
        cases: as `plan` returns them.
        folder: for their files.
        output: a file of JSON lines.
        jobs: how many processes work at them.
    """
    from faultlib.children import in_children
    from faultlib.commands import World

    if not cases:
        return
    world = World(folder)
    for name in dict.fromkeys(case["command"] for case in cases):
        world.reference(name)

    def work(place: int) -> None:
        world.case = folder / f"case-{place}"
        for case in cases[place::jobs]:
            verdict = judged(world, case)
            detail = verdict.detail.replace(str(folder), "")
            line = json.dumps(case | {"outcome": verdict.outcome, "detail": detail})
            with output.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
            print(f"{case['id']}: {verdict.outcome}", file=sys.stderr, flush=True)

    in_children([functools.partial(work, place) for place in range(jobs)])


def judged(world: Any, case: dict[str, Any]) -> Any:
    """Do one case; return its verdict."""
    from faultlib.kinds import KINDS, Case

    command = world.commands[case["command"]]
    kind = next(kind for kind in KINDS if kind.name == case["kind"])
    return kind.do(Case(world, command, case["share"], random.Random(case["id"])))


def read(output: Path) -> dict[str, dict[str, Any]]:
    """Return the cases that were noted, by id."""
    if not output.is_file():
        return {}
    lines = output.read_text(encoding="utf-8").splitlines()
    return {case["id"]: case for case in map(json.loads, lines)}


def table(cases: list[dict[str, Any]]) -> str:
    """Return outcomes by kind and command, as Markdown."""
    lines = [
        "| fault | command | tried | recovered | refused | lost | stuck |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    pairs = sorted({(case["kind"], case["command"]) for case in cases})
    for kind, command in [*pairs, ("all", "")]:
        chosen = [c for c in cases if kind == "all" or (c["kind"], c["command"]) == (kind, command)]
        counts = [sum(c["outcome"] == outcome for c in chosen) for outcome in OUTCOMES]
        cells = [kind, command, len(chosen), *counts]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
