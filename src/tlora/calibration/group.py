"""The process group that calibrates and plans together.

Calibration shares samples out over the processes, planning shares modules out. What they have to
agree on goes through a `Cohort`: with `ALONE` every method gives back what it was given, so the
code around reads the same in one process and in many.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tlora import errors
from tlora.calibration import batches as reading
from tlora.calibration.placement import device_of, is_sharded
from tlora.errors import CalibrationError, ConfigError, TLoraError

_IDLE, _BUSY, _FAILED = range(3)


class Cohort:
    """All ranks of the default process group. Every method is to be called on each of them.

    Attributes:
        size: how many.
        rank: which of them this process is.
    """

    def __init__(self, size: int = 1, rank: int = 0) -> None:
        self.size = size
        self.rank = rank
        self._parted = False

    @property
    def leads(self) -> bool:
        """Whether this is the rank that speaks and writes for all."""
        return self.rank == 0

    def highest(self, values: Sequence[int]) -> list[int]:
        """Return the element-wise maximum of all ranks' ``values``, which are equally many."""
        if self.size == 1 or not values:
            return list(values)
        row = torch.tensor(values, dtype=torch.int64, device=_device())
        dist.all_reduce(row, dist.ReduceOp.MAX)
        return row.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's ``value``, by rank; plain Python values."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def send(self, value: Any, source: int) -> Any:
        """Return the ``value`` of rank ``source``: plain values, and tensors on the CPU."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, source)
        return box[0]

    def lend(self, value: Any) -> Any:
        """Return the value of the first rank that has one (see `send`), None if none has."""
        owners = [rank for rank, has in enumerate(self.gather(value is not None)) if has]
        return self.send(value, owners[0]) if owners else None

    def add(self, tensor: Tensor) -> Tensor:
        """Return the sum of all ranks' tensors, of one shape, on the device of this rank's."""
        if self.size == 1:
            return tensor
        total = tensor.to(_device(), copy=True).contiguous()
        dist.all_reduce(total)
        return total.to(tensor.device)

    def stacked(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Return all ranks' rows, one rank's after the other's.

        Args:
            rows: this rank's; of as many columns on every rank.
            counts: how many rows each rank has.
        """
        before = sum(counts[: self.rank])
        whole = rows.new_zeros(sum(counts), *rows.shape[1:])
        whole[before : before + len(rows)] = rows
        return self.add(whole)

    def copy_from(self, source: int, tensor: Tensor) -> Tensor:
        """Return rank ``source``'s tensor; the others give one of its shape and dtype."""
        if self.size == 1:
            return tensor
        copy = tensor.detach().to(_device(), copy=True).contiguous()
        dist.broadcast(copy, source)
        return copy.to(tensor.device)

    def meet(self, busy: bool = True) -> bool:
        """Return whether any rank is ``busy``, once all have come here, or failed on the way.

        Raises:
            Stopped: one has failed, and waits in `together`, which explains.
        """
        [most] = self.highest([_BUSY if busy else _IDLE])
        if most == _FAILED:
            raise Stopped
        return most == _BUSY

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run the body on every rank; if it raises on one, raise on all what it raised, and where.

        Raises:
            TLoraError: of the class that was raised, its message beginning with the rank;
                `CalibrationError` for what is none of ours. The rank itself has the original as
                the cause.
        """
        if self.size == 1:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            if self._parted:
                raise
            failure = error
        if isinstance(failure, Stopped):
            raise self._explained(self.gather(None)) from None
        # This is the `meet` of a rank that failed, and the last one of those that did not.
        [most] = self.highest([_IDLE if failure is None else _FAILED])
        if most == _FAILED:
            told = failure and (type(failure).__name__, str(failure))
            raise self._explained(self.gather(told)) from failure

    @contextlib.contextmanager
    def inside_collectives(self) -> Iterator[None]:
        """Run what makes collectives of its own, which the others wait in if this rank fails.

        Nothing can be told to them from there: the error is raised here alone, and the launcher
        (torchrun, accelerate launch) ends the others.
        """
        try:
            yield
        except Exception:
            self._parted = self.size > 1
            raise

    def _explained(self, told: list[tuple[str, str] | None]) -> Exception:
        rank, (name, message) = next((r, each) for r, each in enumerate(told) if each)
        kind = getattr(errors, name, None)
        if kind is ConfigError:
            return ConfigError(message, where=f"rank {rank}")
        if isinstance(kind, type) and issubclass(kind, TLoraError):
            return kind(f"rank {rank}: {message}")
        return CalibrationError(f"rank {rank} failed with {name}: {message}")


class Stopped(Exception):
    """Another rank has failed; internal, replaced by what it failed with."""


ALONE = Cohort()


def cohort() -> Cohort:
    """Return the ranks of the default process group, `ALONE` where none is initialised."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ALONE
    return Cohort(dist.get_world_size(), dist.get_rank())


def _device() -> torch.device:
    """Return where collectives take tensors: on the CPU, unless the backend has none there."""
    if dist.get_backend() in ("gloo", "mpi", "undefined"):
        return torch.device("cpu")
    device = torch.accelerator.current_accelerator()
    return torch.device("cpu") if device is None else device


class Company:
    """The ranks that run each pass together; alone with whole weights, no method does anything.

    Args:
        model: what runs.
        ranks: who shares its samples.

    Attributes:
        sharded: whether the model's weights are in parts.
        ranks: who has to be waited for; `ALONE` if the weights are whole.
        spare: a sample to run where there is none to count.
    """

    def __init__(self, model: nn.Module, ranks: Cohort) -> None:
        self.model = model
        self.sharded = is_sharded(model)
        self.ranks = ranks if self.sharded else ALONE
        self.spare: dict[str, Any] = {}

    @property
    def present(self) -> bool:
        """Whether there is another rank to wait for."""
        return self.ranks.size > 1

    def open(self, batch: dict[str, Any] | None) -> bool:
        """Begin a pass, if any rank has a batch for it; return whether."""
        going = self.ranks.meet(busy=batch is not None)
        if going and self.present and not self.spare:
            sample = None
            if batch is not None:
                first = next(reading.single_samples(batch, self.model))
                sample = reading.as_batch(first, torch.device("cpu"))
            device = device_of(self.model)
            self.spare = reading.as_batch(self.ranks.lend(sample), device)
        return going

    def meet(self) -> None:
        """Go on to the second half of a pass.

        Raises:
            Stopped: a rank has failed in the first.
        """
        self.ranks.meet()

    def inside_collectives(self) -> contextlib.AbstractContextManager[None]:
        """Run a half of the pass; see `Cohort.inside_collectives`."""
        return self.ranks.inside_collectives()
