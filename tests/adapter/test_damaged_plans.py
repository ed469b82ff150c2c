"""Headers of plans and calibrations that were edited or cut: one sentence with the file."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tlora import AdapterPlan, Calibration, TLoraConfig
from tlora.adapter.plan import ModulePlan
from tlora.calibration.statistics import ModuleStatistics
from tlora.errors import ArtifactError
from tlora.files import read_tensors, write_tensors
from tlora.linalg.moments import SecondMoment

JUNK = [None, True, -1, 1.5, float("nan"), "x", [], {}, [1], {"a": 1}]


@pytest.fixture
def saved(tmp_path):
    """A plan and a calibration of one module; return each one's file by its kind."""
    module = ModulePlan("one", 4, 3, 2, 1.0, torch.eye(2, 4), 0.5, 0.1, "exact")
    moment = SecondMoment(4)
    moment.update(torch.arange(24.0).reshape(2, 3, 4))
    statistics = ModuleStatistics("one", 4, 3, 2, 0.1, moment, moment_id=0)
    return {
        "plan": AdapterPlan({"one": module}, TLoraConfig(r=2)).save(tmp_path / "a"),
        "calibration": Calibration({"one": statistics}, 2).save(tmp_path / "b"),
    }


def places(value: Any, path: tuple = ()):
    if path:
        yield path
    named = dict(enumerate(value)) if isinstance(value, list) else value
    for key, inner in named.items() if isinstance(named, dict) else ():
        yield from places(inner, (*path, key))


def changed(header: Any, path: tuple, value: Any) -> Any:
    header = copy.deepcopy(header)
    inner = header
    for key in path[:-1]:
        inner = inner[key]
    if value is KeyError:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return header


LOADS = {"plan": AdapterPlan.load, "calibration": Calibration.load}


@pytest.mark.parametrize("kind", LOADS)
def test_no_header_makes_another_error_than_ours(saved, kind):
    file = saved[kind]
    tensors, header = read_tensors(file, kind)
    refused = 0
    for path in places(header):
        for value in (KeyError, *JUNK):
            write_tensors(file, tensors, changed(header, path, value))
            try:
                LOADS[kind](file)
            except ArtifactError as error:
                assert str(file) in str(error)
                assert len(str(error).splitlines()) == 1
                refused += 1
    assert refused > 100


@pytest.mark.parametrize("kind", LOADS)
@pytest.mark.parametrize("field", ["name", "d_in", "d_out", "sensitivity"])
def test_a_missing_or_wrong_field_of_a_module_is_refused(saved, kind, field):
    file = saved[kind]
    tensors, header = read_tensors(file, kind)
    for value in (KeyError, [], {}, True):
        write_tensors(file, tensors, changed(header, ("modules", 0, field), value))
        with pytest.raises(ArtifactError, match="damaged"):
            LOADS[kind](file)
    write_tensors(file, tensors, changed(header, ("modules", 0), {**header["modules"][0], "z": 1}))
    with pytest.raises(ArtifactError, match="there is no field `z`"):
        LOADS[kind](file)


@pytest.mark.parametrize("header", [[], "x", None, 5])
def test_a_header_that_is_no_mapping_is_refused(saved, header):
    tensors, _ = read_tensors(saved["plan"], "plan")
    write_tensors(saved["plan"], tensors, header)
    with pytest.raises(ArtifactError, match="its header is"):
        AdapterPlan.load(saved["plan"])
