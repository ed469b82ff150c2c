"""Files that carry a digest: a damaged one is refused, or reads as the very same values."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import accepted, damaged, edited, fuzz, json_file, tensor_file
from hypothesis import strategies as st
from torch import Tensor

from tlora import AdapterPlan, Calibration, TLoraConfig
from tlora.adapter.initial import InitialAdapter
from tlora.adapter.plan import ModulePlan
from tlora.calibration.statistics import ModuleStatistics
from tlora.compare.comparefolder import CompareFolder
from tlora.evaluate.evalfolder import EvalFolder
from tlora.files import read_tensors, seal_tensors, write_json, write_state, write_tensors
from tlora.linalg.moments import SecondMoment
from tlora.report import read_evaluation
from tlora.scoring.mtbench import judging
from tlora.training.checkpoints import damage, last_whole, seal
from tlora.training.runconfig import RunConfig
from tlora.training.runfolder import RunFolder


def same(left: Any, right: Any) -> bool:
    """Return whether two values are equal, tensors bit for bit and of one type."""
    if isinstance(left, Tensor):
        whole = isinstance(right, Tensor) and left.dtype == right.dtype
        return whole and left.shape == right.shape and torch.equal(left, right)
    if hasattr(left, "__dict__"):
        return type(left) is type(right) and same(vars(left), vars(right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


@dataclass(frozen=True)
class Kept:
    """A file with a digest, and what reads it.

    Attributes:
        file: where it is; a case writes a damaged one there.
        read: reads it, and what its values lead to.
    """

    file: Path
    read: Callable[[], Any]


def a_plan() -> AdapterPlan:
    modules = {
        name: ModulePlan(name, 4, 3, 2, 1.5, torch.eye(2, 4), 0.5, 0.1, "exact")
        for name in ("layers.0.one", "layers.1.one")
    }
    return AdapterPlan(modules, TLoraConfig(r=2), {"samples": 3})


def a_calibration() -> Calibration:
    moment = SecondMoment(4)
    moment.update(torch.arange(24.0).reshape(2, 3, 4))
    return Calibration({"one": ModuleStatistics("one", 4, 3, 2, 0.1, moment, moment_id=0)}, 2)


def an_initial() -> InitialAdapter:
    return InitialAdapter({"one": (torch.arange(8.0).view(2, 4), torch.ones(3, 2))})


def a_run(folder: Path) -> RunFolder:
    """Return the folder of a finished run with two checkpoints, as the product writes them."""
    run = RunFolder(folder)
    run.start(RunConfig(model="m", train_file="t").to_dict(), "train", a_plan(), {"model": "0" * 8})
    for step in (2, 4):
        checkpoint = run.checkpoints / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        write_json(checkpoint / "trainer_state.json", {"global_step": step, "log_history": []})
        (checkpoint / "optimizer.pt").write_bytes(bytes(range(200)))
        shutil.copy(run.plan, checkpoint / "adapter_model.safetensors")
        seal(checkpoint, run.run_id())
    run.finish({"parameters": 12})
    for step in range(1, 5):
        run.append_log({"step": step, "loss": 1 / step})
    return run


def an_evaluation(folder: Path) -> EvalFolder:
    """Return an evaluation of two models on a task of two items."""
    evaluation, scores, digests = EvalFolder(folder), {}, {}
    for model, right in (("base", 0.0), ("tuned", 1.0)):
        items = [
            {"item": f"sum-{n}", "prompt": f"{n}+1?", "reply": f"{n + right}", "answer": None}
            | {"target": f"{n + 1}", "scores": {"exact_match": right}}
            for n in range(2)
        ]
        digests[model] = evaluation.write_samples(model, "sums", items)
        scores[model] = {"exact_match": right}
    task = {"name": "sums", "metrics": ["exact_match"], "protocol": "p", "shots": 0}
    models = [{"name": "base", "kind": "base"}, {"name": "tuned", "kind": "adapter"}]
    about = {"config": {"seed": 0}, "provenance": {"python": "3.11"}, "models": models}
    evaluation.write(about | {"tasks": [task | {"scores": scores, "samples": digests}]})
    return evaluation


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kept]:
    """Every kind of file of ours that carries a digest."""
    top = tmp_path_factory.mktemp("kept")
    run, compare = a_run(top / "run"), CompareFolder(top / "compare")
    compare.start({"config": {"model": "m"}, "experiment": "e"})
    compare.write_record("lora-1", {"status": "finished", "score": 0.5, "log": [1, 2.5, None]})
    evaluation = an_evaluation(top / "eval")
    reply = top / "reply.json"
    write_state(
        reply, {"reply": {"text": "[[7]]", "finish": "stop", "tokens_in": 5, "tokens_out": 1}}
    )
    return {
        "plan": Kept(a_plan().save(top / "plan.st"), lambda: AdapterPlan.load(top / "plan.st")),
        "calibration": Kept(
            a_calibration().save(top / "stats.st"), lambda: Calibration.load(top / "stats.st")
        ),
        "initial": Kept(
            an_initial().save(top / "initial.st"), lambda: InitialAdapter.load(top / "initial.st")
        ),
        "run": Kept(
            top / "run" / "run.json",
            lambda: [
                *(run.config(), run.inputs(), run.settled(), run.verb, run.run_id()),
                *(run.finished, run.measured(), run.processes(), run.calibration()),
            ],
        ),
        "run's plan": Kept(run.plan, run.saved_plan),
        "comparison": Kept(top / "compare" / "compare.json", compare.read),
        "record": Kept(compare.record_file("lora-1"), lambda: compare.record("lora-1")),
        "evaluation": Kept(top / "eval" / "eval.json", lambda: read_evaluation.read(top / "eval")),
        "samples": Kept(
            evaluation.samples_file("tuned", "sums"), lambda: read_evaluation.read(top / "eval")
        ),
        "judgment": Kept(reply, lambda: judging._reply_in(reply)),
    }


TENSORS = ("plan", "calibration", "initial", "run's plan")
STATES = ("run", "comparison", "record", "evaluation")


def check(kept: Kept, whole: bytes, content: bytes) -> None:
    """Read a file with other content: it is refused, or says what it said."""
    right = copy.deepcopy(kept.read())  # its tensors are mapped from the file
    assert right is not None
    kept.file.write_bytes(content)
    try:
        found = accepted(kept.read)
        assert found is None or same(found, right)
    finally:
        kept.file.write_bytes(whole)


@pytest.mark.parametrize("kind", TENSORS)
@fuzz(25, data=st.data())
def test_tensors(kept, kind, data):
    whole = kept[kind].file.read_bytes()
    check(kept[kind], whole, data.draw(tensor_file(whole)))


@pytest.mark.parametrize("kind", STATES)
@fuzz(25, data=st.data())
def test_states(kept, kind, data):
    whole = kept[kind].file.read_bytes()
    check(kept[kind], whole, data.draw(json_file(whole)))


@fuzz(30, data=st.data())
def test_samples(kept, data):
    whole = kept["samples"].file.read_bytes()
    check(kept["samples"], whole, data.draw(damaged(whole)))


@fuzz(10, data=st.data())
def test_a_judgment(kept, data):
    whole = kept["judgment"].file.read_bytes()
    check(kept["judgment"], whole, data.draw(json_file(whole)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return a_run(tmp_path_factory.mktemp("run") / "run")


STATE = ("manifest.json", "trainer_state.json", "optimizer.pt", "adapter_model.safetensors")


@pytest.mark.parametrize("name", STATE)
@fuzz(15, data=st.data())
def test_a_checkpoint_is_whole_or_passed_over(run, name, data):
    newest, older = run.checkpoints / "checkpoint-4", run.checkpoints / "checkpoint-2"
    file = newest / name
    whole = file.read_bytes()
    content = data.draw(json_file(whole) if name.endswith(".json") else damaged(whole))
    file.write_bytes(content)
    try:
        fault = accepted(lambda: damage(newest, run.run_id()) or "whole")
        assert accepted(run.last_checkpoint) == (newest if fault == "whole" else older)
        if fault == "whole" and content != whole:  # a manifest's values carry its digest
            assert name == "manifest.json"
            assert json.loads(content) == json.loads(whole)
        assert last_whole(run.checkpoints, "another run") is None
    finally:
        file.write_bytes(whole)


@fuzz(20, data=st.data())
def test_a_log_is_cut_back_to_its_readable_lines(run, data):
    whole = run.log.read_bytes()
    run.log.write_bytes(data.draw(damaged(whole)))
    try:
        accepted(lambda: run.rewind_log(3))
        for line in run.log.read_bytes().splitlines():
            assert json.loads(line).get("step", 0) <= 3
    finally:
        run.log.write_bytes(whole)


@fuzz(10, data=st.data())
def test_a_damaged_provenance_starts_over(run, data):
    file = run.path / "provenance.json"
    whole = file.read_bytes()
    file.write_bytes(data.draw(json_file(whole)))
    try:
        assert isinstance(accepted(run._starts), list)
    finally:
        file.write_bytes(whole)


LOADS = {"plan": AdapterPlan, "calibration": Calibration, "initial adapter": InitialAdapter}
MADE = {"plan": a_plan, "calibration": a_calibration, "initial adapter": an_initial}


@pytest.mark.parametrize("kind", LOADS)
@fuzz(20, data=st.data())
def test_a_header_that_was_edited_and_sealed_again_loads_or_is_refused(tmp_path, kind, data):
    file = MADE[kind]().save(tmp_path / "file")
    tensors, header = read_tensors(file, kind)
    write_tensors(file, tensors, data.draw(edited(header)))
    if (found := accepted(lambda: LOADS[kind].load(file))) is not None:
        again = LOADS[kind].load(found.save(tmp_path / "again"))
        assert type(again) is type(found)


@fuzz(10, data=st.data())
def test_sealing_a_damaged_file_is_refused_or_gives_a_whole_one(tmp_path, data):
    file = a_plan().save(tmp_path / "file")
    file.write_bytes(data.draw(tensor_file(file.read_bytes())))
    try:
        seal_tensors(file)
    except ValueError:
        return
    accepted(lambda: AdapterPlan.load(file))
