"""Timers around the library's functions that make up an initialization, by stage."""

from __future__ import annotations

import functools
import importlib
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from measure import synchronized

BY_OUTPUTS = "tlora.linalg.crossmoment:CrossMoment.update"

STAGES: dict[str, tuple[str, ...]] = {
    "moments": (
        "tlora.calibration.accumulators:MomentAccumulator.update",
        "tlora.linalg.moments:SecondMoment._form",
    ),
    "sensitivities": ("tlora.calibration.backward:SensitivityPass._add",),
    "W C": (BY_OUTPUTS, "tlora.linalg.moments:SecondMoment.weighted"),
    "factorizations": ("tlora.adapter.solve:solve",),
    "attach": ("tlora.adapter.attach:attach",),
}
"""module:function, or module:Class.method, of each stage. The same name in other modules of the
library that have imported the function is timed too."""


class Timers:
    """While open, adds up what each stage takes. One inside another counts for itself alone.

    Args:
        device: "cuda" waits for the device at both ends of each call.

    Attributes:
        seconds: by stage.
        calls: by function.

    Raises:
        AttributeError: a name in `STAGES` no longer exists.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.calls: Counter[str] = Counter()
        # Backward hooks run on other threads, while the one that started the pass waits.
        self._open: list[str] = []
        self._since = 0.0
        self._undo: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Timers:
        for stage, names in STAGES.items():
            for name in names:
                self._wrap(stage, name)
        return self

    def __exit__(self, *_: object) -> None:
        for owner, attribute, original in reversed(self._undo):
            setattr(owner, attribute, original)
        self._undo = []

    def _wrap(self, stage: str, name: str) -> None:
        path, _, dotted = name.partition(":")
        owner: Any = importlib.import_module(path)
        *classes, attribute = dotted.split(".")
        for each in classes:
            owner = getattr(owner, each)
        original = vars(owner).get(attribute)
        if original is None:
            raise AttributeError(f"{name} does not exist; put the name of what does it in STAGES.")
        timed = self._timed(stage, name, original)
        owners = [owner] if classes else _holders(attribute, original)
        for each in owners:
            self._undo.append((each, attribute, original))
            setattr(each, attribute, timed)

    def _timed(self, stage: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            self._switch(lambda: self._open.append(stage))
            try:
                return function(*args, **kwargs)
            finally:
                self._switch(self._open.pop)

        return run

    def _switch(self, change: Callable[[], object]) -> None:
        """Close the account of the stage that runs, and open that of the next."""
        synchronized(self.device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        change()
        self._since = now


def _holders(attribute: str, function: Any) -> list[Any]:
    """Return the library's modules that hold a function by its name."""
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "tlora"]
    return [module for module in modules if vars(module).get(attribute) is function]
