"""`tlora compare --engine ray`: each run is a task on a Ray cluster.

A task starts its run in a separate process (`tlora.compare.queue`), in a scratch folder on the
node. Ray transfers the files of rows to the node, and record, log and adapter back to this process,
which writes them, so nodes need no shared disk. Ray repeats the tasks of a node that dies.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from tlora import __version__
from tlora.compare.compareconfig import CompareConfig
from tlora.compare.queue import Job, Outcome, Workers
from tlora.credentials import redacted
from tlora.errors import ConfigError, first_line
from tlora.files import replacing_file, replacing_folder
from tlora.tasks.mixture import parts
from tlora.training.digests import FILE_FIELDS, field_at, model_identity

_RETRIES = 3  # restarts of a run whose node or worker died
_ANSWER = 10.0  # timeout for RAY_ADDRESS in seconds; Ray itself tries for minutes
_GRACE = 10.0  # seconds for canceled tasks to end their runs
_RECORD, _LOG, _ADAPTER = Path("runs/record.json"), Path("log"), Path("adapter")

Files = dict[str, bytes]
"""Contents by relative path."""


@dataclass(frozen=True)
class RayWorkers:
    """Runs jobs on the connected cluster; compare `Workers`."""

    begins: ClassVar[str] = "waits for the cluster"
    """As in `Workers`: a job may start later."""
    local: Workers
    """Runs one job on a node."""
    cpus: int = 1
    """CPUs that Ray reserves per job."""
    gpus: float = 0.0
    """GPUs that Ray reserves per job."""
    disconnects: bool = False
    """Whether to disconnect from the cluster at the end."""

    @property
    def threads(self) -> int:
        """Threads per job."""
        return self.local.threads

    def work(
        self, ready: Callable[[], Job | None], settled: Callable[[Job, Outcome], None]
    ) -> None:
        """Run jobs until none is ready or running, queuing all ready ones at once.

        Args:
            ready: as in `Workers.work`.
            settled: as in `Workers.work`; called once the job's files are in place.
        """
        import ray

        task = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=_RETRIES)(_on_node)
        stored: dict[str, Any] = {}
        running: dict[Any, tuple[Job, float]] = {}
        try:
            while True:
                while (job := ready()) is not None:
                    payload, sources = _relocated(job.payload)
                    for source in set(sources.values()) - stored.keys():
                        stored[source] = ray.put(Path(source).read_bytes())
                    contents = [stored[source] for source in sources.values()]
                    job_there = replace(job, payload=payload, log=_LOG)
                    reference = task.remote(self.local, job_there, [*sources], *contents)
                    running[reference] = (job, time.monotonic())
                if not running:
                    return
                for reference in ray.wait([*running])[0]:
                    job, started = running.pop(reference)
                    settled(job, _outcome(job, reference, started))
        finally:
            for reference in running:
                ray.cancel(reference)
            if running:
                ray.wait([*running], num_returns=len(running), timeout=_GRACE)
            if self.disconnects:
                ray.shutdown()


def connect(config: CompareConfig, local: Workers, tell: Callable[[str], None]) -> RayWorkers:
    """Connect to the cluster of RAY_ADDRESS, to the one of this machine, or to a new one here.

    Args:
        config: the comparison.
        local: runs a job on a node.
        tell: called with a line about the cluster.

    Raises:
        ConfigError: no cluster answers, or a node lacks the model, has a different one at its path,
            or has another version of tlora.
    """
    import ray

    disconnects = not ray.is_initialized()
    if disconnects:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # for a cluster started here
        address = os.environ.get("RAY_ADDRESS", "")
        tell(f"Ray: connecting to {address or 'the cluster on this machine, or a new one'}")
        try:
            _check_answer(address)
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"cannot connect to Ray: {first_line(error).rstrip('.')}; start it with `ray start"
                " --head`, or fix RAY_ADDRESS.",
                where="engine",
            ) from error
    gpus = config.gpus_per_run
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
    workers = RayWorkers(local, config.cpus_per_run or 1, gpus, disconnects)
    places = {node["NodeID"]: _places(node, workers) for node in ray.nodes() if node["Alive"]}
    fit = [name for name, count in places.items() if count]
    _check_nodes(fit, config.model)
    needs = f"{workers.cpus} CPU and {gpus:g} GPU each"
    tell(
        f"Ray: nodes: {len(fit)}; runs at a time: {sum(places.values())}, {needs}"
        if fit
        else f"Ray: no node has room for a run ({needs}); runs wait for a node to join"
    )
    return workers


def _check_answer(address: str) -> None:
    """Check that a host and port answer; Ray resolves other addresses itself.

    Raises:
        OSError: they do not.
    """
    import ray

    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return
    host = host.strip("[]")
    if host in ("localhost", "127.0.0.1", "::1"):
        host = ray.util.get_node_ip_address()  # as Ray does
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise OSError(f"{address} does not answer ({first_line(error)})") from error


def _places(node: dict[str, Any], workers: RayWorkers) -> int:
    """Return how many runs fit on a node at the same time."""
    has = node["Resources"]
    count = int(has.get("CPU", 0) // workers.cpus)
    return min(count, int(has.get("GPU", 0) / workers.gpus)) if workers.gpus else count


def _check_nodes(nodes: Sequence[str], model: str | None) -> None:
    """Reject a cluster with a node whose runs would fail or differ from those here.

    Raises:
        ConfigError: as in `connect`.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    place = _place(model)
    look = ray.remote(num_cpus=0)(_look)
    asked = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, False)).remote(place)
        for node in nodes
    ]
    faults = []
    for reference in asked:
        try:
            faults += _faults(ray.get(reference), place, model_identity(model))
        except ray.exceptions.RayTaskError as error:
            faults.append(f"a node of the Ray cluster cannot run tlora: {_last_lines(error)[-1]}")
        except ray.exceptions.RayError:
            pass  # the node has left the cluster
    if faults:
        raise ConfigError(faults, where="engine")


def _place(model: Any) -> str:
    """Return the absolute path of a model's folder, or its name on the Hub."""
    return str(Path(str(model)).absolute()) if Path(str(model)).is_dir() else str(model)


def _look(model: str) -> tuple[str, str, str]:
    """Return the address of a node, its version of tlora, and the identity of the model there."""
    import ray

    return ray.util.get_node_ip_address(), __version__, model_identity(model)


def _faults(seen: tuple[str, str, str], place: str, identity: str) -> list[str]:
    """Return the faults of a node inspected by `_look`."""
    address, version, found = seen
    if version != __version__:
        return [f"node {address} has tlora {version}; install {__version__} there."]
    if found == identity:
        return []
    wrong = "has no" if found == place else "has a different model in"
    return [f"node {address} {wrong} {place}; copy the model there, or name one on the Hub."]


def _relocated(payload: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the payload of a run in a scratch folder, and the files needed there.

    Keys of the files are their paths in that folder. An absolute model path is the same on each
    node.
    """
    config = {name: dict(v) if isinstance(v, dict) else v for name, v in payload["config"].items()}
    sources: dict[str, str] = {}
    for dotted in FILE_FIELDS:
        if isinstance(value := field_at(config, dotted), str):
            section, _, field = dotted.rpartition(".")
            (config[section] if section else config)[field] = _sent(value, sources)
    config["model"] = _place(config["model"])
    work, validation = f"work/{payload['record']['name']}", payload["validation"]
    return payload | {
        "config": config | {"output_dir": work},
        "validation": _sent(validation, sources) if isinstance(validation, str) else validation,
        "file": str(_RECORD),
        "work": work,
        "adapter": payload["adapter"] and str(_ADAPTER),
    }, sources


def _sent(value: str, sources: dict[str, str]) -> str:
    """Return a field with its file names relocated, and add the files to ``sources``.

    Other values (a template name, a trainer option) stay unchanged.
    """
    if not value or (Path(value).exists() and not Path(value).is_file()):
        return value
    named = parts(value)
    if not all(Path(part.path).is_file() for part in named):
        return value
    words = []
    for part in named:
        # Files with the same name are in different folders.
        place = f"files/{len(sources)}/{Path(part.path).name}"
        sources[place] = str(part.path)
        words.append(place if part.weight == 1 else f"{place}:{part.weight}")
    return ",".join(words)


def _on_node(
    workers: Workers, job: Job, names: Sequence[str], *contents: bytes
) -> tuple[Outcome, Files]:
    """Run one job in a scratch folder on this node; return its outcome and files."""
    import ray

    workers = replace(workers, gpus=[",".join(map(str, ray.get_gpu_ids()))])
    outcomes: list[Outcome] = []
    jobs = iter([job])
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="tlora-ray-", ignore_cleanup_errors=True) as scratch:
        os.chdir(scratch)  # processes of multiprocessing start in the folder of their parent
        try:
            for name, content in zip(names, contents, strict=True):
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                Path(name).write_bytes(content)
            workers.work(lambda: next(jobs, None), lambda _, outcome: outcomes.append(outcome))
            found = [_RECORD, _LOG, *_ADAPTER.rglob("*")]
            files = {file.as_posix(): file.read_bytes() for file in found if file.is_file()}
        finally:
            os.chdir(before)
    return outcomes[0], files


def _outcome(job: Job, reference: Any, started: float) -> Outcome:
    """Write a job's files, the record last, and return its outcome."""
    import ray

    try:
        outcome, files = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        return Outcome(1, time.monotonic() - started, _last_lines(error))
    except ray.exceptions.RayError as error:  # the worker was killed, once and in each retry
        return Outcome(-signal.SIGKILL, time.monotonic() - started, _last_lines(error))
    adapter = {name: files[name] for name in files if Path(name).parts[0] == str(_ADAPTER)}
    if adapter:
        with replacing_folder(job.payload["adapter"]) as folder:
            for name, content in adapter.items():
                file = folder / Path(name).relative_to(_ADAPTER)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
    for place, target in ((_LOG, job.log), (_RECORD, job.payload["file"])):
        if (content := files.get(place.as_posix())) is not None:
            with replacing_file(target) as part:
                part.write_bytes(content)
    return outcome


def _last_lines(error: Exception) -> list[str]:
    return [line.rstrip() for line in redacted(str(error)).splitlines() if line.strip()][-20:]
