"""A calibration in a file: used again, refused for others, gone on with after a kill."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import support
from tlora import Calibration, TLoraConfig, calibrate, get_tlora_model, plan
from tlora.calibration import journal
from tlora.errors import ArtifactError, CalibrationError

NAME = "calibration.safetensors"
UNFINISHED = f"{NAME}.unfinished"


def config(**fields: Any) -> TLoraConfig:
    return TLoraConfig(**({"r": 2, "lora_alpha": 2} | fields))


def batches() -> list[Any]:
    samples = [s for seed in range(2) for s in support.causal_samples(seed=seed)]
    return support.in_batches(samples, 2)


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(initializer_range=0.2)


@pytest.fixture
def always_save(monkeypatch):
    monkeypatch.setattr(journal, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(journal, "SAVE_PAUSES", 0.0)


def saved(stats: Calibration, path: Path) -> bytes:
    return stats.save(path).read_bytes()


def passes(model: Any) -> list[int]:
    """A list that grows with every forward pass."""
    seen: list[int] = []
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    return seen


# --- used again


@pytest.mark.parametrize("place", [NAME, ".", "deep/er/stats.safetensors"])
def test_what_a_file_holds_is_not_measured_again(model, tmp_path, place):
    cache = tmp_path / place
    first = calibrate(model, batches(), config(), cache=cache)
    seen = passes(model)
    again = calibrate(model, iter(batches()), config(), cache=cache)

    assert seen == []
    assert saved(again, tmp_path / "b") == saved(first, tmp_path / "a")
    assert saved(calibrate(model, batches(), config()), tmp_path / "c") == saved(
        first, tmp_path / "a"
    )
    assert list(tmp_path.rglob(".*")) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 5, "budget": "params", "seed": 3},
        {"whiten": True, "memory_budget": 1},
        {"basis": "random"},
        {"allocate_rank": False, "allocate_scale": False},
    ],
)
def test_any_plan_is_made_of_one_file(model, tmp_path, fields):
    calibrate(model, batches(), config(), cache=tmp_path)
    seen = passes(model)
    stats = calibrate(model, batches(), config(**fields), cache=tmp_path)
    assert plan(model, stats, config(**fields)).modules
    assert seen == []


def other_model(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.mul_(2)


@pytest.mark.parametrize(
    ("names", "change"),
    [
        (["model"], {"model": True}),
        (["data"], {"data": batches()[::-1]}),
        (["data"], {"data": batches()[:-1]}),
        (["data"], {"data": support.in_batches(support.causal_samples(), 2)}),
        (["config"], {"config": {"target_modules": ["q_proj"]}}),
        (["model", "data", "config"], {"model": True, "data": [], "config": {"bias": "none"}}),
    ],
)
def test_a_file_of_another_calibration_is_refused(model, tmp_path, names, change):
    fields = {"exclude_modules": ["q_proj"]} if len(names) > 1 else {}
    path = tmp_path / NAME
    calibrate(model, batches(), config(**fields), cache=path)
    before = path.read_bytes()
    if change.get("model"):
        other_model(model)
    with pytest.raises(CalibrationError) as caught:
        calibrate(
            model,
            change.get("data", batches()),
            config(**change.get("config", {})),
            cache=path,
        )
    message = str(caught.value)
    assert [name for name in ("model", "data", "config") if f"its {name} (" in message] == names
    assert str(path) in message
    assert "delete this file to calibrate anew" in message
    assert path.read_bytes() == before


def test_a_file_that_lacks_statistics_is_refused(model, tmp_path):
    calibrate(model, batches(), config(basis="random"), cache=tmp_path)
    with pytest.raises(CalibrationError, match=r"its config \(.*lacks statistics"):
        calibrate(model, batches(), config(), cache=tmp_path)


def test_a_file_without_a_key_or_of_another_kind_is_refused(model, tmp_path):
    stats = calibrate(model, batches(), config())
    stats.key = None
    path = stats.save(tmp_path / NAME)
    with pytest.raises(CalibrationError, match="does not say what it is of"):
        calibrate(model, batches(), config(), cache=path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="not a readable"):
        calibrate(model, batches(), config(), cache=path)


def test_a_folder_that_cannot_be_is_refused_before_anything_is_run(model, tmp_path):
    (tmp_path / "file").write_text("")
    seen = passes(model)
    with pytest.raises(CalibrationError, match="give `cache` another folder"):
        calibrate(model, batches(), config(), cache=tmp_path / "file" / NAME)
    assert seen == []


def test_bad_samples_that_were_left_out_stay_named(model, tmp_path):
    bad = batches()
    bad[1]["labels"][0] = -100
    with pytest.raises(CalibrationError, match="sample 2"):
        calibrate(model, bad, config(), cache=tmp_path)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"1 of 10 .* 2 \(it has no label that counts\)"):
            stats = calibrate(model, bad, config(), cache=tmp_path, skip_bad_samples=True)
    assert stats.samples == 9
    with pytest.raises(CalibrationError, match=r"leaves out 1 bad samples; allow .*skip_bad"):
        calibrate(model, bad, config(), cache=tmp_path)


def test_the_three_in_one_call_goes_through_the_file(model, tiny_llama, tmp_path):
    adapted = get_tlora_model(model, config(), batches(), cache=tmp_path, progress=False)
    other = tiny_llama(initializer_range=0.2)
    seen = passes(other)
    again = get_tlora_model(other, config(), batches(), cache=tmp_path)
    assert seen == []
    left, right = adapted.state_dict(), again.state_dict()
    assert all(torch.equal(value, right[name]) for name, value in left.items())


def test_the_three_in_one_call_takes_no_other_options(model):
    with pytest.raises(TypeError, match="cach"):
        get_tlora_model(model, config(), batches(), cach="x")


# --- gone on with


class Cut(Exception):
    """Ends an iterator early."""


def until(count: int) -> Iterator[Any]:
    yield from batches()[:count]
    raise Cut


@pytest.mark.parametrize("fields", [{}, {"memory_budget": 1500}, {"basis": "random"}])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_what_was_cut_ends_in_the_same_statistics(model, tmp_path, always_save, count, fields):
    with pytest.raises(Cut):
        calibrate(model, until(count), config(**fields), cache=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [UNFINISHED]
    seen = passes(model)
    stats = calibrate(model, batches(), config(**fields), cache=tmp_path)

    # Saved between batches: after the last one that was asked for, not yet after the one given.
    assert len(seen) == len(batches()) - count
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    expected = calibrate(model, batches(), config(**fields))
    assert saved(stats, tmp_path / "a") == saved(expected, tmp_path / "b")


def test_sharing_and_bad_samples_outlast_a_cut(model, tmp_path, always_save):
    def bad() -> list[Any]:
        every = batches()
        every[0]["labels"][1] = every[4]["labels"][0] = -100
        return every

    def part() -> Iterator[Any]:
        yield from bad()[:3]
        raise Cut

    with pytest.raises(Cut):
        calibrate(model, part(), config(), cache=tmp_path, skip_bad_samples=True)
    with pytest.raises(CalibrationError, match="leaves out 1 bad samples"):
        calibrate(model, bad(), config(), cache=tmp_path)
    with pytest.warns(UserWarning, match=r"2 of 10 .*: 1 \(.*, 8 \("):
        stats = calibrate(model, bad(), config(), cache=tmp_path, skip_bad_samples=True)
    with pytest.warns(UserWarning):
        expected = calibrate(model, bad(), config(), skip_bad_samples=True)
    assert saved(stats, tmp_path / "a") == saved(expected, tmp_path / "b")
    moments = [stats.modules[f"model.layers.0.self_attn.{p}_proj"].moment for p in "qkv"]
    assert moments[0] is moments[1] is moments[2]


@pytest.mark.parametrize("name", ["model", "data", "config", "short"])
def test_progress_of_another_calibration_is_refused(model, tmp_path, always_save, name):
    with pytest.raises(Cut):
        calibrate(model, until(3), config(), cache=tmp_path)
    before = (tmp_path / UNFINISHED).read_bytes()
    if name == "model":
        other_model(model)
    data = {"data": batches()[::-1], "short": batches()[:2]}.get(name, batches())
    fields = {"basis": "random"} if name == "config" else {}
    wanted = {"short": "data"}.get(name, name)
    with pytest.raises(CalibrationError, match=rf"unfinished is another .*its {wanted} \("):
        calibrate(model, data, config(**fields), cache=tmp_path)
    assert (tmp_path / UNFINISHED).read_bytes() == before


def test_without_a_file_nothing_is_kept(model, tmp_path, always_save, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Cut):
        calibrate(model, until(3), config())
    assert list(tmp_path.iterdir()) == []


def test_progress_is_saved_by_time_and_not_by_batch(model, tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 100))  # every look at it is 100 seconds later
    saves: list[int] = []
    monkeypatch.setattr(journal.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(journal.Journal, "_save", lambda *_: saves.append(1))
    many = support.causal_samples((4,) * 40)
    calibrate(model, many, config(), cache=tmp_path)
    # Saving seems to take 100 s, so 1000 s pass before the next one: ten looks of the clock.
    assert 3 <= len(saves) <= 5


def test_what_killed_processes_left_half_written_is_cleared_away(model, tmp_path):
    old, fresh = (tmp_path / f".{UNFINISHED}.{name}.part" for name in ("old", "fresh"))
    other = tmp_path / ".other.safetensors.old.part"
    for path in (old, fresh, other):
        path.write_bytes(b"half")
    for path in (old, other):
        os.utime(path, (0, 0))
    calibrate(model, batches(), config(), cache=tmp_path)
    # What may still be written by another process, or for another file, is not touched.
    assert (old.exists(), fresh.exists(), other.exists()) == (False, True, True)


# Imports once, then runs each calibration in a process of its own.
SCRIPT = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import safetensors.torch, transformers
import support
from tlora import TLoraConfig, calibrate
from tlora.calibration import journal

journal.SAVE_SECONDS = journal.SAVE_PAUSES = 0.0
save_file = safetensors.torch.save_file

def killed():
    os.kill(os.getpid(), signal.SIGKILL)

def calibration(cache, when):
    shape = dict(vocab_size=160, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
    llama = transformers.LlamaConfig(**shape, num_attention_heads=4, initializer_range=0.2)
    model = support.seeded(lambda: transformers.LlamaForCausalLM(llama))
    samples = [s for seed in range(2) for s in support.causal_samples(seed=seed)]
    runs, saves = [], []

    def batches():
        for number, batch in enumerate(support.in_batches(samples, 2)):
            if when == f"batch {number}":
                killed()
            yield batch

    def saving(tensors, path, **rest):
        save_file(tensors, path, **rest)
        saves.append(path)
        if when == f"save {len(saves)}":
            os.truncate(path, os.path.getsize(path) // 2)
            killed()

    safetensors.torch.save_file = saving
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    calibrate(model, batches(), TLoraConfig(r=2), cache=cache)
    return len(runs)

for cache, when in zip(sys.argv[2::2], sys.argv[3::2]):
    child = os.fork()
    if child == 0:
        os._exit(calibration(cache, when))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no kill -9 to survive")
def test_a_killed_process_is_gone_on_with_to_the_bit(tmp_path):
    whole, cache = tmp_path / "whole.safetensors", tmp_path / NAME
    # Killed between two batches; then within writing the second progress of the next process.
    runs = [(whole, "never"), (cache, "batch 2"), (cache, "save 2"), (cache, "never")]
    arguments = [str(Path(support.__file__).parent), *map(str, itertools.chain(*runs))]
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], check=True, capture_output=True, text=True
    )

    # The passes that were run, or the signal; at the end batches 0 to 2 are passed over.
    assert ended.stdout.split() == ["5", "-9", "-9", "2"]
    assert cache.read_bytes() == whole.read_bytes()
    assert not (tmp_path / UNFINISHED).exists()
