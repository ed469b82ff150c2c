"""Write docs/licenses.md: the license of every locked package, from its metadata.

make licenses
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).parents[1]
REPORT = PROJECT / "docs/licenses.md"
HEAD = """\
# Licenses of the packages

tlora is under the Apache License 2.0. `make licenses` writes this list of the packages that `make`
installs (`requirements/dev.txt` and `constraints.txt`) from their own metadata. Wheels may bundle
libraries under further licenses, as torch's and numpy's do. A CUDA build of torch also installs
NVIDIA's proprietary libraries.

| package | version | license |
|---|---|---|
"""
ELSEWHERE = "not installed on the platform that wrote this: "


def locked() -> dict[str, list[Requirement]]:
    """Return the locked packages, torch and Triton, by name; several if versions differ."""
    found: dict[str, list[Requirement]] = {}
    for name in ("requirements/dev.txt", "constraints.txt"):
        for line in (PROJECT / name).read_text("utf-8").splitlines():
            wanted = r"(torch|triton)==" if name == "constraints.txt" else r"[a-z0-9]"
            if re.match(wanted, line):
                requirement = Requirement(line.removesuffix("\\").strip())
                found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def license_of(distribution: metadata.Distribution) -> str:
    """Return the license in a package's metadata: expression, classifiers, or text."""
    about = distribution.metadata
    if expression := about.get("License-Expression"):
        return expression
    classified = [
        each.rpartition("::")[2].strip()
        for each in about.get_all("Classifier", [])
        if each.startswith("License ::") and each != "License :: OSI Approved"
    ]
    if classified:
        return "; ".join(classified)
    return (about.get("License") or "not named; see its license file").strip().splitlines()[0]


def row(name: str, requirements: list[Requirement]) -> str:
    """Return a package's line of the table."""
    here = [each for each in requirements if each.marker is None or each.marker.evaluate()]
    if not here:
        version = ", ".join(str(each.specifier).removeprefix("==") for each in requirements)
        return f"| {name} | {version} | {ELSEWHERE}`{requirements[0].marker}` |"
    distribution = metadata.distribution(name)
    version = distribution.version.partition("+")[0]
    return f"| {name} | {version} | {license_of(distribution).replace('|', '/')} |"


def report() -> str:
    """Return the text of the file."""
    return HEAD + "".join(f"{row(*each)}\n" for each in sorted(locked().items()))


if __name__ == "__main__":
    REPORT.write_text(report(), encoding="utf-8")
    print(f"{REPORT.relative_to(PROJECT)}: {len(locked())} packages")
