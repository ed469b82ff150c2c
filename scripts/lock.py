"""Write requirements/*.txt: all packages installed by `make` and CI, with versions and hashes.

    make lock                               # keeps valid locked versions
    make lock LOCK_ARGS=--upgrade           # upgrades to the newest allowed by constraints.txt

Needs uv (`make lock` installs it in a separate environment) and a package index. The files apply to
every platform and to Python 3.10 and later; platform-specific packages have a marker.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).parents[1]
FOLDER = PROJECT / "requirements"
LOCKS = {
    "dev": ["--extra", "dev", "pyproject.toml"],
    "compare": ["--extra", "compare", "pyproject.toml"],
    "library": ["pyproject.toml"],
    "tools": ["--group", "pyproject.toml:tools"],
}
"""Contents of each file; the first one determines the versions of the others."""
HEADER = """\
# {name}: written by `make lock`; do not edit.
# torch and what only its CUDA builds need are not here: an index may offer torch builds of its own
# (for CPUs, for other CUDA versions), and a hash would forbid them. constraints.txt pins torch, and
# a torch build pins its CUDA packages itself.
"""
_BUILDS = re.compile(r"(torch|triton|nvidia-[\w-]+|cuda-[\w-]+)==")
_BLOCK = re.compile(r"^\S.*(?:\n[ \t].*)*\n?", re.MULTILINE)


def lock(name: str, words: list[str], more: list[str]) -> None:
    """Resolve one set of requirements and write its file."""
    file = FOLDER / f"{name}.txt"
    with tempfile.TemporaryDirectory() as scratch:
        part = Path(scratch) / file.name
        if file.exists():
            part.write_text(file.read_text("utf-8"), encoding="utf-8")
        constraints = ["constraints.txt"] + ([] if name == "dev" else ["requirements/dev.txt"])
        command = [sys.executable, "-m", "uv", "--no-config", "pip", "compile", "--quiet", *words]
        command += [word for each in constraints for word in ("--constraint", each)]
        command += ["--universal", "--python-version", "3.10", "--generate-hashes", "--no-header"]
        command += ["--no-annotate", "--output-file", str(part), *more]
        subprocess.run(command, cwd=PROJECT, check=True)
        blocks = _BLOCK.findall(part.read_text("utf-8"))
    kept = [block for block in blocks if not _BUILDS.match(block)]
    file.write_text(HEADER.format(name=f"requirements/{file.name}") + "".join(kept), "utf-8")
    print(f"{file.relative_to(PROJECT)}: {len(kept)} packages")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for each, needs in LOCKS.items():
        lock(each, needs, sys.argv[1:])
