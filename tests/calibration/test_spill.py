"""Second moments beyond the budget: in mapped files, the same to the bit, and gone afterwards."""

from __future__ import annotations

import errno
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import support
from tlora import Calibration, TLoraConfig, calibrate, plan
from tlora.calibration import spill
from tlora.calibration.spill import Spill
from tlora.errors import CalibrationError

ONE = 16 * 16 * 4  # bytes of a moment of 16 columns


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(initializer_range=0.2)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The folder for temporary files."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


def config(**fields: Any) -> TLoraConfig:
    return TLoraConfig(**({"r": 2} | fields))


def mapped(stats: Calibration, folder: Path) -> set[str]:
    """Modules whose moments lie in a mapping of a file of this folder, by the system's own list."""
    ranges = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        if str(folder) in line:
            low, high = (int(end, 16) for end in line.split()[0].split("-"))
            ranges.append((low, high))
    return {
        name
        for name, module in stats.modules.items()
        if module.moment is not None
        for part in [module.moment.parts()]
        for kept in [part.get("rows", part.get("scatter"))]
        if any(low <= kept.data_ptr() < high for low, high in ranges)
    }


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads the system's list of mappings")


@linux
@pytest.mark.parametrize(
    ("fields", "in_memory"),
    [
        ({"memory_budget": 1}, 0),
        ({"memory_budget": 2 * ONE}, 2),
        ({"memory_budget": 100 * ONE}, 8),
        ({"covariance": "streamed"}, 0),
        ({"covariance": "streamed", "memory_budget": 100 * ONE}, 0),
        ({}, 8),
    ],
)
def test_what_is_beyond_the_budget_is_mapped_and_the_same_to_the_bit(
    model, folder, tmp_path, fields, in_memory
):
    batches = support.in_batches(support.causal_samples(), 2)
    expected = calibrate(model, batches, config())
    stats = calibrate(model, batches, config(**fields))

    away = mapped(stats, folder)
    moments = {id(m.moment) for name, m in stats.modules.items() if name not in away}
    assert len(moments) == in_memory
    assert (len(away) == 0) == (in_memory == 8)
    for name, module in stats.modules.items():
        other = expected.modules[name]
        assert module.sensitivity == other.sensitivity
        assert torch.equal(module.covariance(), other.covariance())
        assert torch.equal(module.uncentred(), other.uncentred())
    one, two = plan(model, stats, config()), plan(model, expected, config())
    assert all(torch.equal(m.lora_A, two.modules[n].lora_A) for n, m in one.modules.items())
    # Unnamed from the start: nothing to clear away, whatever happens to the process.
    assert list(folder.iterdir()) == []
    del stats, module, one
    assert mapped(expected, folder) == set()
    assert str(folder) not in Path("/proc/self/maps").read_text(encoding="utf-8")


@linux
def test_the_files_are_beside_the_cache(model, folder, tmp_path):
    cache = tmp_path / "kept" / "calibration.safetensors"
    stats = calibrate(model, support.causal_samples(), config(memory_budget=1), cache=cache)
    assert mapped(stats, cache.parent) == set(stats)
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


@linux
def test_a_file_is_loaded_as_a_mapping(model, tmp_path):
    stats = calibrate(model, support.causal_samples(), config())
    path = stats.save(tmp_path)
    before = path.read_bytes()
    loaded = Calibration.load(path)
    assert mapped(loaded, tmp_path) == set(stats)
    # What is done to the tensors stays in memory.
    for module in loaded.modules.values():
        module.moment.scatter.zero_()
    assert path.read_bytes() == before


def test_modules_that_part_are_counted_against_the_budget(folder):
    class ForkedForSequenceClassification(support.Toy):
        def __init__(self) -> None:
            super().__init__()
            self.second = torch.nn.Linear(8, 8)

        def encode(self, x: torch.Tensor, apart: bool = False, **_: Any) -> torch.Tensor:
            return self.first(x) + self.second(2 * x if apart else x)

    model = support.seeded(ForkedForSequenceClassification)
    samples = support.toy_samples()
    batches = [s | {"apart": i == 2} for i, s in enumerate(samples)]
    fields = {"target_modules": ["first", "second"]}
    expected = calibrate(model, batches, config(**fields))
    stats = calibrate(model, batches, config(**fields, memory_budget=8 * 8 * 4))
    assert stats.modules["first"].moment is not stats.modules["second"].moment
    if sys.platform == "linux":
        assert mapped(stats, folder) == {"second"}
    for name, module in stats.modules.items():
        assert torch.equal(module.covariance(), expected.modules[name].covariance())


def test_a_killed_process_leaves_no_file(folder):
    code = (
        "import os, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from tlora.calibration.spill import Spill\n"
        "zeros, here = Spill(0, Path(sys.argv[1])).zeros(64, torch.device('cpu'))\n"
        "zeros.fill_(1.0)\n"
        "print(here, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(folder)], check=False, capture_output=True, text=True
    )
    assert (ended.stdout.strip(), ended.returncode) == ("False", -9)
    assert list(folder.iterdir()) == []


def test_a_full_disk_is_an_error_with_a_way_out(folder, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spill.os, "posix_fallocate", full)
    with pytest.raises(CalibrationError, match=r"No space left.*raise `memory_budget`, or set TMP"):
        Spill(0, folder).zeros(64, torch.device("cpu"))
    assert list(folder.iterdir()) == []


def test_a_file_system_that_sets_no_room_aside_will_do(folder, monkeypatch):
    def unsupported(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(spill.os, "posix_fallocate", unsupported)
    zeros, in_memory = Spill(0, folder).zeros(64, torch.device("cpu"))
    assert (zeros.shape, zeros.abs().sum().item(), in_memory) == ((64, 64), 0, False)


def test_where_a_mapped_file_keeps_its_name_it_goes_at_the_end(folder, monkeypatch):
    kept: list[Any] = []
    unlink = Path.unlink

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "in use")

    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(spill.atexit, "register", lambda run, path: kept.append((run, path)))
    Spill(0, folder).zeros(64, torch.device("cpu"))
    monkeypatch.setattr(Path, "unlink", unlink)
    [(run, path)] = kept
    assert [path] == list(folder.iterdir())
    run(path)
    assert list(folder.iterdir()) == []
