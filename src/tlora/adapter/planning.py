"""Statistics -> plan: one process of the group solves each module and broadcasts the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tlora.adapter.plan import AdapterPlan, ModulePlan
from tlora.adapter.solve import ModuleJob, Shares, allocate, joined, solve
from tlora.calibration.group import ProcessGroup, process_group
from tlora.calibration.placement import class_name, device_of, reshard, resharded, unwrapped
from tlora.calibration.preserve import refuse_repacked
from tlora.calibration.statistics import Calibration, ModuleStatistics, model_key
from tlora.calibration.targets import find_targets
from tlora.calibration.weights import Target, dense_weight, is_whole_weight
from tlora.config import TLoraConfig
from tlora.errors import AdapterError, PlanError
from tlora.linalg.orthogonal import BATCH_BYTES, batch_bytes, batches


def plan(
    model: nn.Module, stats: Calibration, config: TLoraConfig, *, progress: bool = True
) -> AdapterPlan:
    """Decide every module's rank, scale and frozen A. The model is only read.

    The same statistics can be planned again with another rank, budget, basis or ablation if they
    contain the required parts.

    In a process group every process calls this with the statistics from its `calibrate` call: the
    modules are divided among processes, and every process gets the same plan, bit for bit. Sharded
    weights (FSDP2, ZeRO-3) are gathered one module at a time.

    Args:
        model: the base model that was calibrated; may be wrapped by DDP or DeepSpeed's engine.
        stats: from `calibrate`.
        config: how to allocate ranks and scales, and which subspace.
        progress: show a progress bar (only on a terminal).

    Raises:
        PlanError: the statistics come from another model.
        AdapterError: a weight cannot be read.
        CalibrationError: the statistics lack something that ``config`` needs.

    Source: arXiv 2604.18124, section 3 (docs/method.md, 3 to 5).
    """
    group, model = process_group(), unwrapped(model)
    reshard(model)
    with resharded(model):
        with group.raise_on_all():
            targets = find_targets(model, config)
            measured = [_statistics_of(target, stats) for target in targets]
            _refuse_another(model, stats)
            shares = allocate(targets, measured, config)
        # The first process's statistics, so that all processes use the same bits.
        shares = group.broadcast(shares, 0)
        each = zip(targets, measured, strict=True)
        solved = solve_each(
            [ModuleJob(target, module, shares.of[target.name]) for target, module in each],
            lambda jobs, weight: solve(jobs, config, weight),
            group,
            "Planning" if progress else None,
        )
    skipped = stats.info.get("skipped", 0)
    modules = joined(targets, solved)
    return AdapterPlan(modules, config, plan_info(model, (stats.samples, skipped), shares))


def _refuse_another(model: nn.Module, stats: Calibration) -> None:
    refuse_repacked(model, AdapterError)
    if stats.key is not None and stats.key.model != model_key(model):
        raise PlanError(
            "the calibration was made with another model "
            f"({stats.info.get('model', 'unknown class')}, with other parameters than "
            f"this {class_name(model)}), or with this one loaded another way (whole, "
            "offloaded or sharded); calibrate this model, loaded as it is now."
        )


def plan_info(model: nn.Module, samples: tuple[int, int], shares: Shares) -> dict[str, Any]:
    """Return the origin of a plan; ``samples``: the numbers of used and skipped samples."""
    return {
        "model": class_name(model),
        "samples": samples[0],
        "skipped": samples[1],
        "budget_wanted": shares.ranks.wanted,
        "budget_spent": shares.ranks.spent,
    }


def _statistics_of(target: Target, stats: Calibration) -> ModuleStatistics:
    found = stats.modules.get(target.name)
    if found is None or (found.d_in, found.d_out) != (target.d_in, target.d_out):
        held = "no statistics of it" if found is None else f"it as {found.d_out} x {found.d_in}"
        raise PlanError(
            f"{target.name} is {target.d_out} x {target.d_in}, and the calibration holds {held};"
            " calibrate with the same model and `target_modules`."
        )
    return found


Solve = Callable[[Sequence[ModuleJob], Tensor | None], list[ModulePlan]]
"""Plans modules; gets the weight of a sharded module after gathering it."""

Round = dict[int, ModuleJob]
"""One job per process, by the process's number."""


def solve_each(
    jobs: Sequence[ModuleJob], solve: Solve, group: ProcessGroup, title: str | None
) -> dict[str, ModulePlan]:
    """Plan every module, with the same bits on every process.

    Jobs are assigned in rounds, one per process, largest first. Sharded weights are gathered one by
    one, at the start of the round that needs them, so a process holds one at a time (and a second
    while gathering). If weights are whole and on an accelerator, a process solves its jobs of many
    rounds together.

    Args:
        jobs: the same on every process, in model order.
        solve: plans some jobs; it gets a weight only if the weight is sharded.
        group: the processes that take part.
        title: title of the progress bar; None: no bar.

    Raises:
        TLoraError: as ``solve``; on every process if one raises.
    """
    from tqdm.auto import tqdm

    done: dict[str, ModulePlan] = {}
    rounds = list(_rounds(jobs, group.size))
    # None: silent if standard error is not a terminal.
    hidden = None if title and group.is_main_process else True
    bar = tqdm(total=len(jobs), desc=title, unit=" modules", disable=hidden)
    with group.raise_on_all(), bar:
        for together in _batches(rounds):
            weight = _gathered(together[0], group)
            own = [some[group.process] for some in together if group.process in some]
            if own:
                done |= {module.name: module for module in solve(own, weight)}
            del weight  # before the next one is gathered
            bar.update(sum(map(len, together)))
    owners = {job.target.name: process for some in rounds for process, job in some.items()}
    return _broadcast(jobs, owners, done, group)


def _rounds(jobs: Sequence[ModuleJob], size: int) -> Iterator[Round]:
    """Assign jobs to processes in alternating order, for balance."""

    def cost(job: ModuleJob) -> tuple[int, int]:
        # The product W C costs m d^2, and its sketch less, in the same order. Jobs of equal shape
        # and rank are adjacent and form a batch.
        return -job.target.d_out * job.target.d_in**2, -job.share.rank

    order = sorted(jobs, key=cost)
    for number, start in enumerate(range(0, len(order), size)):
        some = dict(enumerate(order[start : start + size]))
        yield {size - 1 - r: job for r, job in some.items()} if number % 2 else some


def _batches(rounds: Sequence[Round]) -> Iterator[Sequence[Round]]:
    """Yield rounds that are solved together: single rounds if a weight is sharded, or on a CPU."""
    sizes = [max(map(_solving_bytes, some.values())) for some in rounds]
    for places in batches(sizes, BATCH_BYTES):
        yield rounds[places.start : places.stop]


def _solving_bytes(job: ModuleJob) -> int:
    """Return the bytes that a job takes in a batch; all of them if it is a batch of its own."""
    module = job.target.module
    if not (is_whole_weight(module) and batch_bytes(device_of(module))):
        return BATCH_BYTES
    # A sketch and the rows of A, which stay until the batch is read; W C does not.
    return 4 * job.target.d_in * (3 * job.share.rank + 1)


def _gathered(some: Round, group: ProcessGroup) -> Tensor | None:
    """Return the weight of this process's job if it is sharded; all processes take part."""
    split = {p: job for p, job in some.items() if not is_whole_weight(job.target.module)}
    if split:
        group.barrier()
    own = None
    for process, job in split.items():
        weight = dense_weight(job.target)
        own = weight if process == group.process else own
    return own


def _broadcast(
    jobs: Sequence[ModuleJob],
    owner: dict[str, int],
    done: dict[str, ModulePlan],
    group: ProcessGroup,
) -> dict[str, ModulePlan]:
    if group.size == 1:
        return {job.target.name: done[job.target.name] for job in jobs}
    bare = {name: replace(module, lora_A=torch.empty(0)) for name, module in done.items()}
    found = {name: module for each in group.all_gather(bare) for name, module in each.items()}
    plans = {}
    for job in jobs:
        name = job.target.name
        shape = (found[name].rank, job.target.d_in)
        own = done[name].lora_A if name in done else torch.empty(shape)
        plans[name] = replace(found[name], lora_A=group.broadcast_tensor(owner[name], own))
    return plans
