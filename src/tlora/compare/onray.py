"""`tlora compare --engine ray`: each run is a task of a Ray cluster.

A task starts its run in a process of its own (`tlora.compare.queue`), in a scratch folder on the
node. Files of rows travel to the node through Ray; record, log and adapter travel back, and this
process writes them. So the nodes need no shared disk. Ray repeats the tasks of a node that dies.
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
from typing import Any

from tlora import __version__
from tlora.compare.compareconfig import CompareConfig
from tlora.compare.queue import Job, Outcome, Workers
from tlora.credentials import redacted
from tlora.errors import ConfigError, first_line
from tlora.files import replacing_file, replacing_folder
from tlora.tasks.mixture import parts
from tlora.training.digests import FILE_FIELDS, field_at, model_identity

_RETRIES = 3  # times that a run starts again because its node or its worker died
_ANSWER = 10.0  # seconds that RAY_ADDRESS gets to answer; Ray itself tries for minutes
_GRACE = 10.0  # seconds that canceled tasks get to end their runs
_RECORD, _LOG, _ADAPTER = Path("runs/record.json"), Path("log"), Path("adapter")

Files = dict[str, bytes]
"""Contents by relative path."""


@dataclass(frozen=True)
class RayWorkers:
    """How jobs are run on the cluster that this process is connected to; compare `Workers`."""

    local: Workers
    """How a node runs one of them."""
    cpus: int = 1
    """CPUs that Ray sets aside for each job."""
    gpus: float = 0.0
    """GPUs that it sets aside."""
    disconnects: bool = False
    """Whether to disconnect from the cluster at the end."""

    @property
    def threads(self) -> int:
        """Threads of each job."""
        return self.local.threads

    def work(
        self, ready: Callable[[], Job | None], settled: Callable[[Job, Outcome], None]
    ) -> None:
        """Run jobs until none is ready and none is running; all that are ready are queued at once.

        Args:
            ready: as in `Workers.work`.
            settled: as in `Workers.work`; the files of the job are in place by then.
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
        local: how a node runs a job.
        tell: called with a line about the cluster.

    Raises:
        ConfigError: no cluster answers, or a node lacks the model, has another one at that path, or
            has another version of tlora.
    """
    import ray

    disconnects = not ray.is_initialized()
    if disconnects:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a cluster that starts here
        address = os.environ.get("RAY_ADDRESS", "")
        tell(f"Ray: connecting to {address or 'the cluster of this machine, or starting one'}")
        try:
            _check_answer(address)
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"Ray cannot be reached: {first_line(error).rstrip('.')}; start it with `ray start"
                " --head`, or correct RAY_ADDRESS.",
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
        else f"Ray: no node has room for a run ({needs}); the runs wait for one to join"
    )
    return workers


def _check_answer(address: str) -> None:
    """Check that something listens at a host and port; Ray looks up other addresses itself.

    Raises:
        OSError: nothing does.
    """
    import ray

    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return
    host = host.strip("[]")
    if host in ("localhost", "127.0.0.1", "::1"):
        host = ray.util.get_node_ip_address()  # as Ray takes it
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise OSError(f"{address} does not answer ({first_line(error)})") from error


def _places(node: dict[str, Any], workers: RayWorkers) -> int:
    """Return how many runs fit on a node at a time."""
    has = node["Resources"]
    count = int(has.get("CPU", 0) // workers.cpus)
    return min(count, int(has.get("GPU", 0) / workers.gpus)) if workers.gpus else count


def _check_nodes(nodes: Sequence[str], model: str | None) -> None:
    """Refuse a cluster with a node whose runs would fail, or would be other runs than those here.

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
    """Return what is wrong with a node, as `_look` saw it."""
    address, version, found = seen
    if version != __version__:
        return [f"node {address} has tlora {version}; install {__version__} there."]
    if found == identity:
        return []
    wrong = "has no" if found == place else "has another model in"
    return [f"node {address} {wrong} {place}; copy the model there, or name one on the Hub."]


def _relocated(payload: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the payload of a run in a scratch folder, and the files that it needs there.

    The files are given by their path in that folder. An absolute path of the model is the same on
    each node.
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
    """Return what a field that may name files says in the scratch folder; add them to ``sources``.

    What names no file (a template of tlora, an option of the trainer) stays.
    """
    if not value or (Path(value).exists() and not Path(value).is_file()):
        return value
    named = parts(value)
    if not all(Path(part.path).is_file() for part in named):
        return value
    words = []
    for part in named:
        # Files of one name lie in several folders.
        place = f"files/{len(sources)}/{Path(part.path).name}"
        sources[place] = str(part.path)
        words.append(place if part.weight == 1 else f"{place}:{part.weight}")
    return ",".join(words)


def _on_node(
    workers: Workers, job: Job, names: Sequence[str], *contents: bytes
) -> tuple[Outcome, Files]:
    """Run one job in a scratch folder of this node; return how it ended, and its files."""
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
    """Return how a job ended, with its files put in their places; the record comes last."""
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
