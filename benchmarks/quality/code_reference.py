"""Run the reference solution of every HumanEval and MBPP problem in the sandbox.

    python benchmarks/quality/code_reference.py DATA

DATA holds code/HumanEval.jsonl.gz and code/mbpp.jsonl. The programs are the data sets' own, and
run as untrusted ones are. Every one of them has to pass, and the same program with its function
made to return None has to fail. The counts go to code_reference.json beside this file.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tlora.files import write_json
from tlora.scoring.pass_at_k import Check, humaneval_check, mbpp_check, run_checks
from tlora.scoring.sandbox import Limits, Sandbox


def humaneval(data: Path) -> list[tuple[str, Check]]:
    """Return (name, check of the canonical solution) of the 164 problems."""
    with gzip.open(data / "code" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [(row["task_id"], humaneval_check(row, row["canonical_solution"])) for row in rows]


def mbpp(data: Path) -> list[tuple[str, Check]]:
    """Return (name, check of the reference code) of the 974 problems."""
    lines = (data / "code" / "mbpp.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [(f"MBPP/{row['task_id']}", mbpp_check(row, row["code"])) for row in rows]


def spoilt(check: Check) -> Check:
    """Return the check with every entry point redefined to return None."""
    ends = "".join(f"\ndef {name}(*a, **k): return None\n" for name in check.entry_points)
    return Check(check.program + ends, check.tests, check.entry_points)


def outcome(name: str, checks: list[tuple[str, Check]], sandbox: Sandbox) -> dict[str, Any]:
    """Run reference and spoilt programs; print and return the counts and what does not pass."""
    start = time.perf_counter()
    right = run_checks(sandbox, [check for _, check in checks])
    seconds = time.perf_counter() - start
    wrong = run_checks(sandbox, [spoilt(check) for _, check in checks])
    names = [task for task, _ in checks]
    record = {
        "data": name,
        "problems": len(checks),
        "reference": dict(Counter(result.status for result in right)),
        "returning None": dict(Counter(result.status for result in wrong)),
        "not passed": {t: r.detail for t, r in zip(names, right, strict=True) if not r.passed},
        "passed returning None": [t for t, r in zip(names, wrong, strict=True) if r.passed],
    }
    print(json.dumps(record, indent=2))
    print(f"{1000 * seconds / len(checks):.0f} ms for each program")
    return record


def main() -> int:
    """Return 1 if a reference fails or a spoilt program passes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    data = parser.parse_args().data
    sandbox = Sandbox(allow_untrusted_code=True, limits=Limits(seconds=60.0, cpu_seconds=60))
    records = [
        outcome("HumanEval", humaneval(data), sandbox),
        outcome("MBPP", mbpp(data), sandbox),
    ]
    write_json(Path(__file__).with_suffix(".json"), records)
    return int(any(r["not passed"] or r["passed returning None"] for r in records))


if __name__ == "__main__":
    sys.exit(main())
