"""The fields that are read from source are those of the real dataclasses."""

import dataclasses
import sys

import pytest

from tlora.checks import takes
from tlora.models.pretrained import load_class
from tlora.training import argumentfields
from tlora.training.kinds import KINDS

TARGETS = sorted({kind.arguments for kind in KINDS.values()})
VALUES = (None, True, 0, 3, -1, 0.5, "", "no", "word", "1e-4", [], ["a"], [1], {}, {"a": 1}, {1: 2})


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_parsed_equals_the_dataclass(target):
    parsed = argumentfields._parsed(*target.split(":"))
    real = {each.name: each.type for each in dataclasses.fields(load_class(target)) if each.init}
    assert list(parsed) == list(real)
    assert argumentfields.declared_fields(target) == real
    for name, kind in real.items():
        taken = [value for value in VALUES if takes(kind, value)]
        assert [value for value in VALUES if takes(parsed[name], value)] == taken, name


def package(folder, name, **files):
    (folder / name).mkdir()
    for module, text in files.items():
        (folder / name / f"{module}.py").write_text(text)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A package whose class inherits a field from another package; importing either one fails."""
    monkeypatch.syspath_prepend(tmp_path)
    argumentfields._parsed.cache_clear()
    failing = "raise AssertionError('imported')\n"
    base = "class Base:\n    rate: float = 0.1\n    _left: int = field(init=False)\n"
    package(tmp_path, "outer", __init__=failing + "from .inner import Base\n", inner=base)
    own = "from outer import Base as B\nclass Mine(B):\n    mode: Foreign | str = ''\n    n: int\n"
    package(tmp_path, "mine", __init__=failing + "from .fields import Mine\n", fields=own)
    return tmp_path


def test_bases_are_found_through_imports_and_nothing_is_imported(source):
    found = argumentfields.declared_fields("mine:Mine")
    assert list(found) == ["rate", "mode", "n"]
    assert (found["rate"], found["n"]) == (float, int)
    assert takes(found["mode"], "word")
    assert not {"mine", "outer"} & {*sys.modules}


def test_without_source_the_class_is_imported(source):
    (source / "mine" / "fields.py").unlink()
    text = "from dataclasses import make_dataclass\nMine = make_dataclass('Mine', ['x'])\n"
    (source / "mine" / "__init__.py").write_text(text)
    assert list(argumentfields.declared_fields("mine:Mine")) == ["x"]
