"""Planning spread over the ranks: each module is solved on one of them, and sent to the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tlora.adapter.module import ModulePlan
from tlora.adapter.solve import Share
from tlora.calibration.distributed import Cohort
from tlora.calibration.statistics import ModuleStatistics
from tlora.calibration.targets import Target
from tlora.calibration.weights import dense_weight, is_whole_weight


@dataclass(frozen=True)
class Job:
    """A module to plan: what is known of it, and what it gets of the budget."""

    target: Target
    statistics: ModuleStatistics
    share: Share


Solve = Callable[[Job, Tensor | None], ModulePlan]
"""Plans one module; is given its weight where that is sharded and had to be gathered."""


def solve_each(
    jobs: Sequence[Job], solve: Solve, ranks: Cohort, title: str | None
) -> dict[str, ModulePlan]:
    """Plan every module, on every rank the same to the bit.

    The jobs are dealt out in rounds, one to a rank, the largest first. Sharded weights are gathered
    one by one, at the start of the round that needs them, so that a rank holds one at a time (and
    a second while it is gathered).

    Args:
        jobs: the same on every rank, in model order.
        solve: plans one.
        ranks: who takes part.
        title: of the bar; None: no bar.

    Raises:
        TLoraError: as ``solve``; on every rank, if it raises on one.
    """
    from tqdm.auto import tqdm

    done: dict[str, ModulePlan] = {}
    rounds = list(_rounds(jobs, ranks.size))
    bar = tqdm(total=len(jobs), desc=title, unit=" modules", disable=_hidden(title, ranks))
    with ranks.together(), bar:
        for some in rounds:
            weight = _gathered(some, ranks)
            if job := some.get(ranks.rank):
                done[job.target.name] = solve(job, weight)
            del weight  # before the next one is gathered
            bar.update(len(some))
    owners = {job.target.name: rank for some in rounds for rank, job in some.items()}
    return _exchanged(jobs, owners, done, ranks)


def _hidden(title: str | None, ranks: Cohort) -> bool | None:
    # None: silent where standard error is no terminal.
    return None if title and ranks.leads else True


def _rounds(jobs: Sequence[Job], size: int) -> Iterator[dict[int, Job]]:
    """Deal the jobs out to ranks; the first of a round is the last of the next, for balance."""
    # The product W C costs m d^2, and a sketch of it less, in the same order.
    order = sorted(jobs, key=lambda job: -job.target.d_out * job.target.d_in**2)
    for number, start in enumerate(range(0, len(order), size)):
        some = dict(enumerate(order[start : start + size]))
        yield {size - 1 - r: job for r, job in some.items()} if number % 2 else some


def _gathered(some: dict[int, Job], ranks: Cohort) -> Tensor | None:
    """Return the weight of this rank's job, if it is sharded; every rank helps with every other."""
    split = {rank: job for rank, job in some.items() if not is_whole_weight(job.target.module)}
    if split:
        ranks.meet()
    own = None
    for rank, job in split.items():
        weight = dense_weight(job.target)
        own = weight if rank == ranks.rank else own
    return own


def _exchanged(
    jobs: Sequence[Job], owner: dict[str, int], done: dict[str, ModulePlan], ranks: Cohort
) -> dict[str, ModulePlan]:
    if ranks.size == 1:
        return {job.target.name: done[job.target.name] for job in jobs}
    bare = {name: replace(module, lora_A=torch.empty(0)) for name, module in done.items()}
    found = {name: module for each in ranks.gather(bare) for name, module in each.items()}
    plans = {}
    for job in jobs:
        name = job.target.name
        shape = (found[name].rank, job.target.d_in)
        own = done[name].lora_A if name in done else torch.empty(shape)
        plans[name] = replace(found[name], lora_A=ranks.copy_from(owner[name], own))
    return plans
