"""The process group that calibrates and plans together.

Calibration divides samples among processes; planning divides modules. They exchange results through
a `ProcessGroup`. With `SINGLE_PROCESS` every method returns its argument, so the same code serves
one process and many.
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
from tlora.errors import ConfigError, ProcessError, TLoraError

_IDLE, _BUSY, _FAILED = range(3)


class ProcessGroup:
    """All processes of the default process group. Every process must call each method.

    Attributes:
        size: number of processes.
        process: index of this process.
    """

    def __init__(self, size: int = 1, process: int = 0) -> None:
        self.size = size
        self.process = process
        self._left = False

    @property
    def is_main_process(self) -> bool:
        """Whether this process logs and writes for all."""
        return self.process == 0

    def all_reduce_max(self, values: Sequence[int]) -> list[int]:
        """Return the element-wise maximum of all processes' ``values``, of equal length."""
        if self.size == 1 or not values:
            return list(values)
        row = torch.tensor(values, dtype=torch.int64, device=_device())
        dist.all_reduce(row, dist.ReduceOp.MAX)
        return row.tolist()

    def all_gather(self, value: Any) -> list[Any]:
        """Return every process's ``value``, in order; plain Python values only."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any, source: int) -> Any:
        """Return the ``value`` of process ``source``: plain values, and tensors on the CPU."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, source)
        return box[0]

    def broadcast_first(self, value: Any) -> Any:
        """Return the value of the first process that has one; None if none has."""
        owners = [process for process, has in enumerate(self.all_gather(value is not None)) if has]
        return self.broadcast(value, owners[0]) if owners else None

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of all processes' tensors, of one shape, on this process's device."""
        if self.size == 1:
            return tensor
        total = tensor.to(_device(), copy=True).contiguous()
        dist.all_reduce(total)
        return total.to(tensor.device)

    def all_gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Return all processes' rows, process by process.

        Args:
            rows: this process's rows; every process has the same number of columns.
            counts: number of rows of each process.
        """
        before = sum(counts[: self.process])
        whole = rows.new_zeros(sum(counts), *rows.shape[1:])
        whole[before : before + len(rows)] = rows
        return self.all_reduce_sum(whole)

    def broadcast_tensor(self, source: int, tensor: Tensor) -> Tensor:
        """Return process ``source``'s tensor; the others pass one of its shape and dtype."""
        if self.size == 1:
            return tensor
        copy = tensor.detach().to(_device(), copy=True).contiguous()
        dist.broadcast(copy, source)
        return copy.to(tensor.device)

    def barrier(self, busy: bool = True) -> bool:
        """Return whether any process is ``busy``, once all have arrived here or failed.

        Raises:
            PeerFailed: a process failed and waits in `raise_on_all`, which reports its error.
        """
        [most] = self.all_reduce_max([_BUSY if busy else _IDLE])
        if most == _FAILED:
            raise PeerFailed
        return most == _BUSY

    @contextlib.contextmanager
    def raise_on_all(self) -> Iterator[None]:
        """Run the body on every process; an error on one is raised on all, with its process number.

        Raises:
            TLoraError: the class that was raised, its message prefixed with the process number;
                `CalibrationError` for errors of other classes. The failing process itself has the
                original as the cause.
        """
        if self.size == 1:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            if self._left:
                raise
            failure = error
        if isinstance(failure, PeerFailed):
            raise self._explained(self.all_gather(None)) from None
        # This matches the `barrier` of a failed process, and the last one of the others.
        [most] = self.all_reduce_max([_IDLE if failure is None else _FAILED])
        if most == _FAILED:
            told = failure and (type(failure).__name__, str(failure))
            raise self._explained(self.all_gather(told)) from failure

    @contextlib.contextmanager
    def inside_collectives(self) -> Iterator[None]:
        """Run code with collectives of its own; the other processes wait there if this one fails.

        They cannot be notified there: the error is raised only here, and the launcher
        (torchrun, accelerate launch) stops the others.
        """
        try:
            yield
        except Exception:
            self._left = self.size > 1
            raise

    def _explained(self, told: list[tuple[str, str] | None]) -> Exception:
        number, (name, message) = next((r, each) for r, each in enumerate(told) if each)
        kind = getattr(errors, name, None)
        if kind is ConfigError:
            return ConfigError(message, where=f"process {number}")
        if isinstance(kind, type) and issubclass(kind, TLoraError):
            return kind(f"process {number}: {message}")
        return ProcessError(f"process {number} failed with {name}: {message}")


class PeerFailed(Exception):
    """Another process failed; internal, replaced by that process's error."""


SINGLE_PROCESS = ProcessGroup()


def process_group() -> ProcessGroup:
    """Return the default process group, or `SINGLE_PROCESS` if none is initialized."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return SINGLE_PROCESS
    return ProcessGroup(dist.get_world_size(), dist.get_rank())


def _device() -> torch.device:
    """Return the device for collectives: the CPU, unless the backend does not support it."""
    if dist.get_backend() in ("gloo", "mpi", "undefined"):
        return torch.device("cpu")
    device = torch.accelerator.current_accelerator()
    return torch.device("cpu") if device is None else device


class Lockstep:
    """The processes that run each pass together; with whole weights, all methods do nothing.

    Args:
        model: the model that runs.
        group: the processes that divide its samples.

    Attributes:
        sharded: whether the model's weights are in parts.
        group: the processes to wait for; `SINGLE_PROCESS` if the weights are whole.
        spare: a sample to run when this process has none left.
    """

    def __init__(self, model: nn.Module, group: ProcessGroup) -> None:
        self.model = model
        self.sharded = is_sharded(model)
        self.group = group if self.sharded else SINGLE_PROCESS
        self.spare: dict[str, Any] = {}

    @property
    def active(self) -> bool:
        """Whether there is another process to wait for."""
        return self.group.size > 1

    def begin_pass(self, batch: dict[str, Any] | None) -> bool:
        """Begin a pass if any process has a batch for it; return whether it begins."""
        going = self.group.barrier(busy=batch is not None)
        if going and self.active and not self.spare:
            sample = None
            if batch is not None:
                first = next(reading.single_samples(batch, self.model))
                sample = reading.as_batch(first, torch.device("cpu"))
            device = device_of(self.model)
            self.spare = reading.as_batch(self.group.broadcast_first(sample), device)
        return going
