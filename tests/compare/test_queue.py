import json
import os
import sys

import pytest

from tlora.compare import queue
from tlora.compare.queue import Job, Workers


@pytest.fixture
def do(tmp_path):
    """Run jobs of a stand-in; return the outcomes by name, in the order in which they ended."""

    def work(function, payloads, **fields):
        jobs = [Job(n, p, tmp_path / "logs" / f"{n}.log") for n, p in payloads.items()]
        outcomes = {}
        waiting = iter(jobs)
        Workers(f"fake_runs:{function}", **fields).work(
            lambda: next(waiting, None), lambda job, how: outcomes.update({job.name: how})
        )
        return outcomes

    return work


def test_two_jobs_run_side_by_side(do, tmp_path):
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    outcomes = do("meet", {"a": {"own": a, "other": b}, "b": {"own": b, "other": a}}, jobs=2)
    assert {name: how.exit_code for name, how in outcomes.items()} == {"a": 0, "b": 0}


def test_a_crash_takes_one_job_with_it(do):
    hows = ("raise", "fine", "abort", "exit", "fine again")
    outcomes = do("end", {how: {"how": how} for how in hows})
    assert list(outcomes) == list(hows)
    assert [how.exit_code for how in outcomes.values()] == [1, 0, -6, 3, 0]
    assert outcomes["raise"].last_lines[0] == "a line on standard output"
    assert outcomes["raise"].last_lines[-1] == "ValueError: a sentence about the fault"
    assert "Fatal Python error: Aborted" in outcomes["abort"].last_lines
    assert outcomes["abort"].cause == "ended by SIGABRT"
    assert outcomes["exit"].cause == "exit code 3"
    assert outcomes["fine"].last_lines == []


def test_the_log_of_a_crash_shows_no_credential(do, tmp_path):
    planted = "planted-in-a-message"
    outcome = do("refuse", {"one": {"message": f"hub_token='{planted}'"}})["one"]
    assert outcome.last_lines[-1] == "ValueError: hub_token='[hidden]'"
    assert planted not in (tmp_path / "logs" / "one.log").read_text()


def test_a_log_that_cannot_be_opened_is_one_sentence(do, tmp_path, monkeypatch):
    log = tmp_path / "logs" / "one.log"
    log.mkdir(parents=True)
    assert do("end", {"one": {"how": "fine"}})["one"].exit_code == 1
    monkeypatch.setattr(queue.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as refused:
        queue._run("fake_runs:end", {"how": "fine"}, str(log), {})
    assert refused.value.code == f"{log}: Is a directory; check the path and its permissions."


def test_every_job_is_a_process_of_its_own_with_its_threads_and_gpu(do, tmp_path):
    files = {str(n): {"file": str(tmp_path / f"{n}.json")} for n in range(3)}
    do("tell", files, threads=3, gpus=("5",))
    seen = [json.loads((tmp_path / f"{n}.json").read_text()) for n in range(3)]
    assert len({each["pid"] for each in seen}) == 3
    assert {each["OMP_NUM_THREADS"] for each in seen} == {"3"}
    assert {each["CUDA_VISIBLE_DEVICES"] for each in seen} == {"5"}


@pytest.mark.skipif(sys.platform != "linux", reason="jobs are forked on Linux alone")
@pytest.mark.parametrize("gpus", [(), ("5",)])
def test_only_jobs_without_gpus_are_forked(do, tmp_path, gpus):
    file = tmp_path / "seen.json"
    do("tell", {"one": {"file": str(file)}}, gpus=gpus)
    assert (json.loads(file.read_text())["parent"] == os.getpid()) is bool(gpus)


def test_a_job_that_ends_makes_others_ready(tmp_path):
    log = tmp_path / "log"
    ended, ready = [], ["first"]

    def settled(job, outcome):
        ended.append(job.name)
        ready.extend({"first": ["second", "third"], "second": ["fourth"]}.get(job.name, []))

    def next_job():
        return Job(ready.pop(0), {"how": "fine"}, log) if ready else None

    Workers("fake_runs:end", jobs=2).work(next_job, settled)
    assert sorted(ended) == ["first", "fourth", "second", "third"]
    assert ended[0] == "first"


def test_an_error_in_the_queue_leaves_no_job_behind(tmp_path):
    import multiprocessing

    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "wait").write_text("slow")
    names = iter(["slow", "fast"])

    def payload(name):
        record = {"name": name, "phase": "final", "method": "lora", "learning_rate": 1, "seed": 0}
        return {"record": record, "file": str(folder / "runs" / f"{name}.json")}

    def next_job():
        name = next(names, None)
        return name and Job(name, payload(name), tmp_path / f"{name}.log")

    def settled(job, outcome):
        raise RuntimeError("the caller's own fault")

    before = set(multiprocessing.active_children())  # other tests may keep processes
    with pytest.raises(RuntimeError, match="own fault"):
        Workers("fake_runs:run", jobs=2).work(next_job, settled)
    assert set(multiprocessing.active_children()) <= before
