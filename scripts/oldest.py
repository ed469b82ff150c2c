"""Print the oldest versions that pyproject.toml allows of what the library and training need.

    make test-oldest    # installs them before the environment's packages and runs some tests

torch is left out: its builds differ by machine, and constraints.txt names the tested one.
"""

from __future__ import annotations

import re
from pathlib import Path

try:
    import tomllib
except ImportError:
    import tomli as tomllib

_LOWEST = re.compile(r"([\w-]+)>=([\d.]+)")
_LEFT_OUT = {"torch", "attrs"}  # attrs: nothing of ours reads it


def oldest() -> list[str]:
    """Return requirements like `peft==0.21`, of the library and of the extra `train`."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8")
    project = tomllib.loads(text)["project"]
    listed = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    found = [match for each in listed if (match := _LOWEST.match(each))]
    return [f"{match[1]}=={match[2]}" for match in found if match[1] not in _LEFT_OUT]


if __name__ == "__main__":
    print(*oldest())
