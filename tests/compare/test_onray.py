"""Runs on a Ray cluster of two nodes, both on this machine."""

import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from tlora import __version__
from tlora.compare import compare, onray
from tlora.compare.compareconfig import CompareConfig
from tlora.compare.comparefolder import CompareFolder
from tlora.compare.queue import Job, Workers
from tlora.errors import ConfigError

LONG = 300
SMALL = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
FROM_THE_MACHINE = ("seconds", "memory", "provenance")


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """Return the file that a run on the second node writes when it has started."""
    return tmp_path_factory.mktemp("held") / "run.pid"


@pytest.fixture(scope="module")
def cluster(held):
    """Start two nodes of a CPU each and connect to the first; runs on the second never end."""
    import ray
    from ray.cluster_utils import Cluster

    # Scratch folders of killed runs stay; here they go with the test's own.
    found = {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(held.parent)}
    cluster = Cluster(initialize_head=True, head_node_args=SMALL | {"env_vars": found})
    cluster.add_node(**SMALL, env_vars=found | {"HELD_RUN": str(held)})
    ray.init(cluster.address, log_to_driver=False)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def until(condition):
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.05)


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


def results(folder):
    """Return all records of a comparison but for what is the machine's."""
    records = {name: folder.record(name) for name in folder.names()}
    for record in records.values():
        for name in FROM_THE_MACHINE:
            del record[name]
    return records


def test_a_killed_node_changes_no_result(compared, shared, cluster, held, tmp_path, monkeypatch):
    _, local, _ = compared
    out, lines, seen, ended = tmp_path / "out", [], [], []
    fields = shared | {"output_dir": str(out), "keep_adapters": True, "engine": "ray"}
    monkeypatch.setattr(compare, "RUN", "fake_runs:held")

    def kill():
        until(lambda: held.exists() or ended)
        seen.append(len(list((out / "runs").glob("*.json"))))
        (node,) = cluster.worker_nodes
        cluster.remove_node(node, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        progress = compare.run(CompareConfig(**fields), tell=lines.append)
    finally:
        ended.append(True)
        killer.join()
    assert lines[0] == "Ray: nodes: 2; runs at a time: 2, 1 CPU and 0 GPU each"
    assert seen[0] < 4
    until(lambda: not alive(int(held.read_text())))
    assert (progress.finished, progress.total, progress.failed) == (4, 4, [])
    folder = CompareFolder(out)
    assert results(folder) == results(local)
    assert adapters(folder) == adapters(local)
    assert list(folder.logs.iterdir()) == []
    # Either engine resumes what the other has begun.
    jobs = []
    monkeypatch.setattr(Workers, "work", lambda self, ready, settled: jobs.append(ready()))
    monkeypatch.setattr(onray.RayWorkers, "work", Workers.work)
    compare.run(CompareConfig(**fields | {"engine": "local"}))
    first = next(iter(folder.names()))
    shutil.copytree(local.path, tmp_path / "begun")
    (tmp_path / "begun" / "runs" / f"{first}.json").unlink()
    compare.run(CompareConfig(**fields | {"output_dir": str(tmp_path / "begun")}))
    assert [job and job.name for job in jobs] == [None, first]


def adapters(folder):
    return {
        file.relative_to(folder.adapters).as_posix(): file.read_bytes()
        for file in folder.adapters.rglob("*.safetensors")
    }


@pytest.fixture
def do(cluster, tmp_path):
    """Run jobs of a stand-in on the cluster; return the outcomes by name."""

    def work(function, payloads, settled=None):
        empty = {"model": None, "data": {}, "trainer": {}}
        common = {"config": empty, "validation": 4, "record": {"name": "run"}, "adapter": None}
        jobs = [
            Job(n, common | {"file": str(tmp_path / "file")} | p, tmp_path / "logs" / f"{n}.log")
            for n, p in payloads.items()
        ]
        outcomes = {}
        waiting = iter(jobs)
        onray.RayWorkers(Workers(f"fake_runs:{function}")).work(
            lambda: next(waiting, None),
            settled or (lambda job, how: outcomes.update({job.name: how})),
        )
        return outcomes

    return work


def test_a_run_that_fails_is_told_as_on_this_machine_and_is_not_repeated(do, tmp_path):
    outcomes = do("end", {how: {"how": how} for how in ("raise", "fine", "abort", "exit")})
    causes = {name: how.cause for name, how in outcomes.items()}
    assert causes == {
        "raise": "exit code 1",
        "fine": "exit code 0",
        "abort": "ended by SIGABRT",
        "exit": "exit code 3",
    }
    assert outcomes["raise"].last_lines[-1] == "ValueError: a sentence about the fault"
    log = (tmp_path / "logs" / "raise.log").read_text()
    assert log.startswith("a line on standard output\nTraceback")
    assert outcomes["fine"].last_lines == []


def test_a_run_whose_worker_dies_each_time_fails_in_the_end(do, tmp_path):
    starts = tmp_path / "starts"
    (outcome,) = do("kill_parent", {"one": {"starts": str(starts)}}).values()
    assert outcome.exit_code == -signal.SIGKILL
    assert outcome.last_lines
    assert len(starts.read_text().split()) == 1 + onray._RETRIES


def test_an_error_here_leaves_no_run_on_the_cluster(do, tmp_path, monkeypatch):
    import ray

    file, wait = tmp_path / "pid", ray.wait

    def interrupted(references, **fields):
        if fields:
            return wait(references, **fields)
        until(lambda: file.is_file() and file.read_text().endswith("\n"))
        raise KeyboardInterrupt

    monkeypatch.setattr(ray, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        do("sleep", {"one": {"pid": str(file)}, "queued": {"pid": str(tmp_path / "never")}})
    until(lambda: not alive(int(file.read_text())))


def test_an_address_that_does_not_answer_is_refused_at_once(shared, tmp_path, monkeypatch):
    import ray

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **fields: pytest.fail("Ray would try for minutes"))
    config, lines = CompareConfig(**shared | {"output_dir": str(tmp_path)}), []
    with pytest.raises(ConfigError, match=rf"{address} does not answer .*fix RAY_ADDRESS\."):
        onray.connect(config, Workers("x"), lines.append)
    assert lines == [f"Ray: connecting to {address}"]


def test_a_node_without_tlora_or_the_model_is_named():
    good = ("10.0.0.7", __version__, "digest")
    assert onray._faults(good, "/models/llama", "digest") == []
    assert onray._faults(("10.0.0.7", __version__, "a/hub-name"), "a/hub-name", "a/hub-name") == []
    for seen, said in (
        (("10.0.0.7", "0.0", "digest"), f"node 10.0.0.7 has tlora 0.0; install {__version__} the"),
        (("10.0.0.7", __version__, "/models/llama"), "node 10.0.0.7 has no /models/llama; copy"),
        (
            ("10.0.0.7", __version__, "else"),
            "node 10.0.0.7 has a different model in /models/llama; c",
        ),
    ):
        (fault,) = onray._faults(seen, "/models/llama", "digest")
        assert fault.startswith(said)


def test_a_model_that_a_node_lacks_is_refused_before_any_run(cluster, shared, monkeypatch):
    import ray

    nodes = [node["NodeID"] for node in ray.nodes()]
    nodes.append("0" * len(nodes[0]))  # one that has left meanwhile
    onray._check_nodes(nodes, shared["model"])
    # The node is asked for a folder that only this machine is said to have.
    monkeypatch.setattr(onray, "_place", lambda model: "/only/here")
    with pytest.raises(ConfigError, match=r"engine: .*node [\d.]+ has no /only/here; copy the mo"):
        onray._check_nodes(nodes, shared["model"])


def test_the_files_of_rows_travel_and_all_paths_are_in_the_scratch_folder(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.jsonl").write_text(folder)
    (tmp_path / "chat.jinja").write_text("template")
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    payload = {
        "config": {
            "model": "model",
            "train_file": "a/rows.jsonl:0.5,b/*.jsonl",
            "eval_file": str(tmp_path / "a" / "rows.jsonl"),
            "data": {"chat_template": "chat.jinja"},
            "trainer": {"max_steps": 3},
        },
        "validation": "b/rows.jsonl",
        "record": {"name": "lora-1"},
        "file": "out/runs/lora-1.json",
        "adapter": "out/adapters/lora-1",
    }
    moved, sources = onray._relocated(payload)
    config = moved["config"]
    assert config["model"] == str(tmp_path / "model")
    assert config["trainer"] == {"max_steps": 3}
    contents = {place: Path(source).read_text() for place, source in sources.items()}
    parts = [word.partition(":") for word in config["train_file"].split(",")]
    assert [(contents[place], weight) for place, _, weight in parts] == [("a", "0.5"), ("b", "")]
    assert contents[config["eval_file"]] == "a"
    assert contents[moved["validation"]] == "b"
    assert contents[config["data"]["chat_template"]] == "template"
    own = [moved["file"], moved["adapter"], moved["work"], config["output_dir"], *sources]
    assert not any(Path(path).is_absolute() for path in own)
    assert payload["config"]["data"]["chat_template"] == "chat.jinja"  # the payload is as before


@pytest.mark.parametrize(("granted", "seen"), [([3], "3"), ([], "")])
def test_a_run_sees_the_gpus_that_ray_gave_it(tmp_path, monkeypatch, granted, seen):
    import ray

    monkeypatch.setattr(ray, "get_gpu_ids", lambda: granted)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    file = tmp_path / "seen.json"
    job = Job("one", {"file": str(file)}, onray._LOG)
    outcome, _ = onray._on_node(Workers("fake_runs:tell", threads=2), job, [])
    assert outcome.exit_code == 0
    found = json.loads(file.read_text())
    assert (found["CUDA_VISIBLE_DEVICES"], found["OMP_NUM_THREADS"]) == (seen, "2")


@pytest.mark.parametrize(
    ("cpus", "gpus", "count"), [(2, 0.0, 4), (2, 1.0, 2), (4, 0.5, 2), (1, 0.5, 4), (9, 0.0, 0)]
)
def test_a_node_holds_what_fits_its_cpus_and_gpus(cpus, gpus, count):
    node = {"Resources": {"CPU": 8.0, "GPU": 2.0, "memory": 1e9}}
    assert onray._places(node, onray.RayWorkers(Workers("x"), cpus, gpus)) == count
