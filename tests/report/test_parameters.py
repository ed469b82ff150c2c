"""How an adapter's entries are distributed, and their norms over training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from served import SERVED, change_weights, save
from tlora import cli
from tlora.adapter.saved import WEIGHTS, read_lora
from tlora.report.parameters import Entries
from tlora.training.checkpoints import seal


def test_quantiles_and_excess_kurtosis_are_those_of_the_distribution():
    even = Entries.of(torch.linspace(-1, 1, 1001, dtype=torch.float64).reshape(7, 143))
    assert even.quantiles == pytest.approx([-0.98, -0.9, -0.5, 0, 0.5, 0.9, 0.98])
    assert even.excess == pytest.approx(-1.2, abs=1e-3)
    assert even.deviation == pytest.approx(3**-0.5, rel=1e-2)
    drawn = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    gaussian = Entries.of(drawn)
    assert gaussian.norm == pytest.approx(float(drawn.norm()))
    assert gaussian.excess == pytest.approx(0, abs=0.05)
    assert all(y == pytest.approx(x, abs=0.03) for x, y in gaussian.against_gaussian())


def test_entries_that_are_all_equal_have_no_shape():
    zero = Entries.of(torch.zeros(4, 3))
    assert (zero.deviation, zero.excess, zero.against_gaussian()) == (0.0, None, [])


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of three checkpoints, B being 1, 2 and 3 times as large; the last one is not whole."""
    folder = tmp_path / "run"
    shutil.copytree(save(SERVED["llama"], tmp_path).adapter, folder / "adapter")
    (folder / "run.json").write_text("{}")
    for times, step in ((1, 2), (2, 10), (3, 20)):
        made = folder / "checkpoints" / f"checkpoint-{step}"
        made.mkdir(parents=True)
        shutil.copy(folder / "adapter" / WEIGHTS, made)
        change_weights(made, lambda w, by=times: [w[key].mul_(by) for key in w if "_B" in key])
        if step < 20:
            seal(made)
    return folder


def test_the_norms_of_a_run_are_those_of_its_whole_checkpoints(run, capsys):
    assert cli.main(["inspect", str(run)]) == 0
    training = json.loads((run / "adapter.inspect.json").read_text())["training"]
    lora = read_lora(run / "adapter")
    for name in lora.keys:
        factors = lora.factors(name)
        a, b = float(factors.a.norm()), float(factors.b.norm())
        assert training["A"][name] == [[2, pytest.approx(a)], [10, pytest.approx(a)]]
        assert training["B"][name] == [[2, pytest.approx(b)], [10, pytest.approx(2 * b)]]
    assert "norm of B" in capsys.readouterr().out
    assert "norms over training" in (run / "adapter.inspect.html").read_text(encoding="utf-8")


def test_one_checkpoint_is_no_course_of_training(run, capsys):
    shutil.rmtree(run / "checkpoints" / "checkpoint-2")
    assert cli.main(["inspect", str(run / "adapter")]) == 0
    assert "training" not in json.loads((run / "adapter.inspect.json").read_text())
    assert "norm of B" not in capsys.readouterr().out
