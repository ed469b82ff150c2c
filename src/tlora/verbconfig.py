"""The records of the verbs that need no more than a few flags.

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
    """Return what to say after Ctrl-C: what the same command does when it is run again."""
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
    """Only write the rows of the tasks that the small model can be adapted to, for `tlora train`
    and `tlora compare`."""


@dataclass(kw_only=True)
class InitConfig(RunConfig):
    """One initialization: a model, a task, a method and where the result goes."""

    dry_run: bool = False
    """Show what would be adapted and the memory it would take, from the model's config alone: no
    weights are read, nothing is written."""

    def relations(self) -> Iterator[str]:
        """Yield what is wrong between fields."""
        yield from super().relations()
        if self.continue_from:
            yield "`continue_from`: `tlora init` makes a new adapter; leave it out."

    def run_config(self) -> RunConfig:
        """Return the run without what belongs to the dry run."""
        return RunConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(RunConfig)})

    def resolved(self) -> RunConfig:
        """Return the run, which any verb takes, with every option of the method written out."""
        return self.run_config().resolved()


@dataclass(kw_only=True)
class InspectConfig(Record):
    """Show ranks, scales and captured energy of a plan, or ranks, scales, norms and spectra of any
    LoRA, as a table and as a page; of a comparison or an evaluation, make page and tables again
    from its files."""

    where: ClassVar[str] = "inspect"

    path: str = field(metadata={"positional": True})
    """A run's folder, a plan.safetensors, the folder of an adapter, of a comparison or of an
    evaluation. A run with a plan shows the plan; its adapter is the folder `adapter` in it."""
    by: Literal["module", "layer", "projection"] = "module"
    """What a line of the table is about."""
    against: str | None = field(default=None, metadata={"positional": True})
    """The second word, or --against. Of an adapter: another run or adapter, to show how their
    updates differ. Of a comparison: a method by its label, to print its paired difference to every
    other one."""
    output: str | None = None
    """HTML file of an adapter's page, with its numbers in a .json beside it; by default
    FOLDER.inspect.html beside the adapter's folder, which stays as it is."""

    def relations(self) -> Iterator[str]:
        """Yield what is wrong between fields."""
        if self.output is not None and not self.output.endswith(".html"):
            yield f"`output` is {self.output!r}; give the name of an .html file."


@dataclass(kw_only=True)
class ListConfig(Record):
    """List what is registered, a line each."""

    where: ClassVar[str] = "list"

    what: Literal["methods", "tasks", "formats", "evaluations", "presets"] | None = field(
        default=None, metadata={"positional": True}
    )
    """Which registry to list; all of them, if left out. Tasks are to train on; what `tlora eval`
    calls tasks are evaluations, and follow them."""


def no_bars_in_batch_jobs() -> None:
    """Let loading and tokenizing show no bars where no terminal would draw them over.

    The libraries read this when they are imported.
    """
    if not sys.stderr.isatty():
        for library in ("HF_DATASETS", "HF_HUB"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
