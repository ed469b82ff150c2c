"""The records of verbs with only a few flags.

Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from tlora.checks import FOLDER, SEED, Record
from tlora.training.runconfig import RunConfig

_AGAIN = {
    "demo": "continue; finished methods are kept",
    "init": "start over",
    "train": "resume from the last checkpoint",
    "eval": "continue; finished pairs of model and task are kept",
    "compare": "continue; finished runs are kept",
}


def interrupted(verb: str = "") -> str:
    """Return the message after Ctrl-C: what rerunning the same command does."""
    again = f"; rerun the same command to {_AGAIN[verb]}" if verb in _AGAIN else ""
    return f"interrupted{again}."


@dataclass(kw_only=True)
class DemoConfig(Record):
    """Train and compare on the small model that comes with the package; needs nothing else."""

    where: ClassVar[str] = "demo"

    output_dir: Annotated[str, FOLDER] = "demo-run"
    """Folder of the result."""
    seed: Annotated[int, SEED] = 0
    """Seed of the demonstration."""
    rows_only: bool = False
    """Only write the rows of the tasks that the small model can learn, for `tlora train` and `tlora
    compare`."""


@dataclass(kw_only=True)
class InitConfig(RunConfig):
    """One initialization: a model, a task, a method and where the result goes."""

    dry_run: bool = False
    """Show the modules to adapt and the memory needed, from the model's config alone: no weights
    are read, nothing is written."""

    def relations(self) -> Iterator[str]:
        """Yield faults between fields."""
        yield from super().relations()
        if self.continue_from:
            yield "`continue_from` does not apply: `tlora init` makes a new adapter; remove it."

    def run_config(self) -> RunConfig:
        """Return the run without the fields of the dry run."""
        return RunConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(RunConfig)})

    def resolved(self) -> RunConfig:
        """Return the run as any verb takes it, with every option of the method written out."""
        return self.run_config().resolved()


@dataclass(kw_only=True)
class InspectConfig(Record):
    """Show ranks, scales and captured energy of a plan, or ranks, scales, norms and spectra of any
    LoRA, as a table and as a page; for a comparison or an evaluation, write page and tables again
    from its files."""

    where: ClassVar[str] = "inspect"

    path: str = field(metadata={"positional": True})
    """A run's folder, a plan.safetensors, or the folder of an adapter, a comparison or an
    evaluation. A run with a plan shows the plan; its adapter is the folder `adapter` in it."""
    by: Literal["module", "layer", "projection"] = "module"
    """The subject of each line of the table."""
    against: str | None = field(default=None, metadata={"positional": True})
    """The second word, or --against. For an adapter: another run or adapter, to compare their
    updates. For a comparison: a method by its label, to print its paired difference to every other
    one."""
    output: str | None = None
    """HTML file of an adapter's page, with its numbers in a .json beside it; by default
    FOLDER.inspect.html beside the adapter's folder, which does not change."""

    def relations(self) -> Iterator[str]:
        """Yield faults between fields."""
        if self.output is not None and not self.output.endswith(".html"):
            yield f"`output` is {self.output!r}; give the name of an .html file."


@dataclass(kw_only=True)
class ListConfig(Record):
    """List registered names, one per line."""

    where: ClassVar[str] = "list"

    what: Literal["methods", "tasks", "formats", "evaluations", "presets"] | None = field(
        default=None, metadata={"positional": True}
    )
    """Registry to list; all of them by default. Tasks are for training; the tasks of `tlora eval`
    are evaluations and come after them."""


def no_bars_in_batch_jobs() -> None:
    """Hide the progress bars of loading and tokenizing unless a terminal would overwrite them.

    The libraries read this when they are imported.
    """
    if not sys.stderr.isatty():
        for library in ("HF_DATASETS", "HF_HUB"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
