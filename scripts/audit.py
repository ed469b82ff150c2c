"""Check every locked package, torch and Triton against a public vulnerability database.

    make audit

Exit codes: 0 no known vulnerabilities, 1 vulnerabilities (each is listed), 3 the database did not
cover every package, so the audit is incomplete.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[1]
FILES = ("requirements/dev.txt", "requirements/tools.txt", "constraints.txt")
CLEAN, VULNERABLE, UNKNOWN = 0, 1, 3


def pins() -> list[list[str]]:
    """Return the locked packages, torch and Triton as lists with each name once.

    All versions are audited, regardless of platform and Python version.
    """
    versions: dict[str, list[str]] = {}
    for name in FILES:
        for line in (PROJECT / name).read_text("utf-8").splitlines():
            found = re.match(r"([\w.-]+)==[^\s;]+", line)
            if found and (name != "constraints.txt" or found[1] in {"torch", "triton"}):
                known = versions.setdefault(found[1], [])
                known += [found[0]] if found[0] not in known else []
    longest = max(map(len, versions.values()))
    return [[each[n] for each in versions.values() if n < len(each)] for n in range(longest)]


def ask(service: str) -> tuple[list[dict[str, Any]], str]:
    """Return pip-audit's result per package from one database, and the error that ended it."""
    told: list[dict[str, Any]] = []
    for pinned in pins():
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "requirements.txt"
            file.write_text("\n".join(pinned), encoding="utf-8")
            command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--no-deps"]
            command += ["--format", "json", "--progress-spinner", "off"]
            command += ["--vulnerability-service", service, "--requirement", str(file)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        try:
            told += json.loads(done.stdout)["dependencies"]
        except json.JSONDecodeError:
            return told, (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
    return told, ""


def verdict(packages: list[dict[str, Any]], failure: str, service: str) -> tuple[int, list[str]]:
    """Return the exit code and the lines to print for a database's results."""
    told = [package for package in packages if "vulns" in package]
    faults = [
        f"{package['name']} {package['version']}: {fault['id']}"
        f" (fixed in {', '.join(fault['fix_versions']) or 'no version yet'})"
        for package in told
        for fault in package["vulns"]
    ]
    untold = [package["name"] for package in packages if "vulns" not in package]
    if not told:
        cause = failure or "it knows none of the packages"
        return UNKNOWN, [f"The database {service!r} is unreachable; nothing was audited ({cause})."]
    said = [f"{len(told)} packages, {len(faults)} known vulnerabilities (database {service!r})."]
    if untold:
        said.append(f"The database {service!r} does not know: {', '.join(untold)}.")
    if failure:
        said.append(f"The rest was not audited ({failure}).")
    code = VULNERABLE if faults else UNKNOWN if untold or failure else CLEAN
    return code, [*faults, *said]


def main() -> int:
    """Query one database, and if it is unreachable, the other."""
    for service in ("pypi", "osv"):
        code, lines = verdict(*ask(service), service)
        print("\n".join(lines))
        if code != UNKNOWN:
            break
    return code


if __name__ == "__main__":
    sys.exit(main())
