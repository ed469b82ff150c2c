"""`tlora verify` against the same arithmetic with dense products, in float64."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from served import SERVED, change_config, change_weights, dense, save
from tlora import cli
from tlora.adapter.nested import mark_nested
from tlora.adapter.saved import WEIGHTS, read_lora
from tlora.adapter.savedconfig import CONFIG
from tlora.errors import ConfigError
from tlora.exporters import export
from tlora.exporters.exportconfig import ExportConfig
from tlora.exporters.readers import READERS, reading
from tlora.exporters.truncate import truncated
from tlora.verify.verifyconfig import VerifyConfig


def equal_ranks(folder, rank=3, gap=False, **fields):
    """Save an adapter of one rank and several scales; with a gap, one layer lacks a projection."""
    pattern = {"rank_pattern": {}} | ({} if gap else {"exclude_modules": None})
    return read_lora(save(SERVED["llama"], folder, r=rank, **pattern | fields).adapter)


def relative(wrong, right):
    """Return the relative norm of a difference over all modules."""
    names = {*wrong, *right}
    zero = torch.zeros(())
    off = math.hypot(*(float((wrong.get(n, zero) - right.get(n, zero)).norm()) for n in names))
    return off / math.hypot(*(float(each.norm()) for each in right.values()))


READ = {reader.name: reader for reader in READERS}


def test_old_vllm_multiplies_all_modules_by_one_scale(varied):
    lora = read_lora(varied.adapter)
    right = dense(lora)
    read = {
        n: lora.tensors[b].double() @ lora.tensors[a].double() for n, (a, b) in lora.keys.items()
    }
    scale = lora.fields["lora_alpha"] / lora.fields["r"]
    expected = relative({name: scale * each for name, each in read.items()}, right)
    found = reading(READ["vllm-0.31"], lora)
    assert found.error == pytest.approx(expected, rel=1e-12)
    assert found.error > 0.1
    assert reading(READ["vllm"], lora).error == 0


@pytest.mark.parametrize("name", ["sglang", "lmdeploy"])
def test_readers_of_equal_ranks_multiply_by_alpha_over_r(name, tmp_path):
    lora = equal_ranks(tmp_path)
    right = dense(lora)
    read = {
        n: lora.tensors[b].double() @ lora.tensors[a].double() for n, (a, b) in lora.keys.items()
    }
    expected = relative({n: each * (4 / 3) for n, each in read.items()}, right)
    assert reading(READ[name], lora).error == pytest.approx(expected, rel=1e-12)


def test_tgi_leaves_a_projection_out_that_one_layer_lacks(tmp_path):
    lora = equal_ranks(tmp_path, rank=8, gap=True, alpha_pattern={}, lora_alpha=8)
    right = dense(lora)
    lone = {n.rpartition(".")[2] for n in right if n.replace("s.0.", "s.1.") not in right}
    assert lone
    kept = {name: each for name, each in right.items() if name.rpartition(".")[2] not in lone}
    found = reading(READ["tgi"], lora)
    assert found.error == pytest.approx(relative(kept, right), rel=1e-12)
    assert {name.rpartition(".")[2] for name in found.modules} == lone
    assert reading(READ["lmdeploy"], lora).refused


def run(*words):
    """Run `tlora verify`; return the exit code."""
    return cli.main(["verify", *map(str, words)])


@pytest.mark.parametrize(
    ("server", "code"), [(None, 0), ("peft", 0), ("vllm", 1), ("sglang", 1), ("tgi", 1)]
)
def test_the_exit_code_is_that_of_the_reader_that_was_asked_for(varied, server, code, capsys):
    words = [] if server is None else ["--for", server]
    assert run(varied.adapter, *words) == code
    shown = capsys.readouterr()
    *lines, meaning = shown.out.splitlines()
    assert len(lines) == len(READERS)
    assert meaning == "exact: the server applies the same update that was trained."
    if code:
        assert {"vllm": "vLLM to 0.31", "sglang": "SGLang", "tgi": "TGI"}[server] in shown.err
        assert f"--for {server}` to convert it" in shown.err


def copy(folder, to):
    """Copy an adapter."""
    return Path(shutil.copytree(folder, to))


def exported(saved, folder, form="uniform", **fields):
    """Export an adapter; return the folder."""
    export.run(ExportConfig(path=str(saved.adapter), output_dir=str(folder), format=form, **fields))
    return folder


def test_one_changed_scale_finds_the_module(varied, tmp_path, capsys):
    other = copy(varied.adapter, tmp_path / "other")
    fields = json.loads((other / CONFIG).read_text())
    key = next(key for key in fields["alpha_pattern"] if "1" in key and "k_proj" in key)
    changed = {**fields["alpha_pattern"], key: fields["alpha_pattern"][key] * 1.5}
    change_config(other, alpha_pattern=changed)
    numbers = tmp_path / "out.json"
    assert run(varied.adapter, other, "--output", numbers) == 1
    peft = json.loads(numbers.read_text())["readers"][0]
    (name,) = peft["modules"]
    assert name == "model.layers.1.self_attn.k_proj"
    assert peft["modules"][name] == pytest.approx(0.5, rel=1e-9)
    right = dense(read_lora(varied.adapter))
    assert peft["error"] == pytest.approx(relative(dense(read_lora(other)), right), rel=1e-9)
    shown = capsys.readouterr()
    assert not shown.out.startswith("PEFT")
    assert f"of {varied.adapter}'s (1 of {len(right)} modules: {name}). If" in shown.err


def test_an_export_older_than_the_run_is_no_fault_of_its_readers(varied, tmp_path, capsys):
    folder, count = exported(varied, tmp_path / "out"), len(read_lora(varied.adapter).keys)
    assert run(varied.adapter, folder) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"{folder} holds the same update as {varied.adapter}."
    assert len(lines) == len(READERS) + 1
    change_weights(folder, lambda w: w.update({k: t * 2 for k, t in w.items() if "lora_B" in k}))
    assert run(varied.adapter, folder, "--for", "sglang") == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == (
        f"tlora: {folder} does not hold the adapter in {varied.adapter}: the updates differ by 1 of"
        f" {varied.adapter}'s ({count} of {count} modules). If {varied.adapter} was"
        " trained after the export, export it again; if it was exported with --max_rank, give the"
        " same --max_rank here.\n"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rounding_is_told_apart_from_a_wrong_export(varied, dtype, tmp_path, capsys):
    folder = exported(varied, tmp_path / "out", dtype=dtype, server="tgi")
    assert run(varied.adapter, folder) == 0
    assert "wrong" not in capsys.readouterr().out
    step = {"float32": 1e-6, "bfloat16": 0.02, "float16": 0.004}[dtype]
    change_weights(folder, lambda w: w.update({k: t * (1 + step) for k, t in w.items()}))
    assert run(varied.adapter, folder) == 1


@pytest.mark.parametrize("missing", [True, False])
def test_a_missing_or_an_extra_module_is_named(varied, missing, tmp_path, capsys):
    less = copy(varied.adapter, tmp_path / "less")
    name = "model.layers.0.mlp.up_proj"
    change_weights(less, lambda w: [w.pop(key) for key in [*w] if name in key])
    fields = json.loads((less / CONFIG).read_text())
    change_config(less, target_modules=[n for n in fields["target_modules"] if n != name])
    pair = (varied.adapter, less) if missing else (less, varied.adapter)
    assert run(*pair) == 1
    said = f"{name} missing" if missing else f"{name} not in the adapter"
    assert said in capsys.readouterr().err


def test_a_tensor_beside_the_matrices_is_compared_too(tmp_path, capsys):
    saved = save(SERVED["llama"], tmp_path, modules_to_save=["lm_head"])
    other = copy(saved.adapter, tmp_path / "other")
    assert run(saved.adapter, other) == 0
    change_weights(other, lambda w: w["base_model.model.lm_head.weight"].add_(1))
    assert run(saved.adapter, other) == 1
    assert "lm_head.weight changed" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_truncated_export_loses_what_the_dense_svd_loses(varied, rank):
    lora = read_lora(varied.adapter)
    _, cut = truncated(lora, rank)
    squares = {n: torch.linalg.svdvals(each).square() for n, each in dense(lora).items()}
    for name, values in squares.items():
        lost = float(values[rank:].sum() / values.sum())
        assert cut.lost[name] == pytest.approx(lost, abs=1e-12)
    every = sum(float(values.sum()) for values in squares.values())
    lost = sum(float(values[rank:].sum()) for values in squares.values())
    assert cut.in_all == pytest.approx(lost / every, rel=1e-9)


def test_a_truncated_export_is_off_by_the_root_of_what_it_lost(varied, tmp_path):
    folder = exported(varied, tmp_path / "out", max_rank=2)
    numbers = tmp_path / "out.json"
    assert run(varied.adapter, folder, "--output", numbers) == 1
    _, cut = truncated(read_lora(varied.adapter), 2)
    found = json.loads(numbers.read_text())["readers"][0]["error"]
    assert found == pytest.approx(cut.in_all**0.5, rel=1e-5)


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    """An adapter of which any number of leading ranks from 2 on is an adapter."""
    saved = save(SERVED["llama"], tmp_path_factory.mktemp("nested"))
    mark_nested(saved.adapter, 2)
    return saved


@pytest.mark.parametrize("fields", [{}, {"form": "native"}, {"server": "tgi", "dtype": "bfloat16"}])
def test_leading_ranks_of_dylora_are_compared_with_the_same_ranks(nested, fields, tmp_path, capsys):
    folder = exported(nested, tmp_path / "out", max_rank=2, **fields)
    assert run(nested.adapter, folder) == 0
    assert f"{folder} is compared with {nested.adapter} cut to rank 2." in capsys.readouterr().out
    change_weights(folder, lambda w: w.update({k: t * 1.1 for k, t in w.items()}))
    assert run(nested.adapter, folder) == 1
    assert run(nested.adapter, exported(nested, tmp_path / "whole")) == 0


def test_a_cut_merged_model_is_compared_with_the_rank_that_is_given(nested, tmp_path):
    folder = exported(nested, tmp_path / "out", "merged", max_rank=2)
    assert run(nested.adapter, folder) == 1
    assert run(nested.adapter, folder, "--max_rank", 2) == 0
    assert run(nested.adapter, folder, "--max_rank", 1) == 1
    assert run(nested.adapter, "--max_rank", 2) == 2


@pytest.mark.parametrize(("rank", "warned"), [(1, True), (2, False)])
def test_fewer_ranks_than_dylora_trained_are_warned_about(nested, rank, warned, tmp_path):
    fields = {"path": str(nested.adapter), "output_dir": str(tmp_path / "out"), "format": "native"}
    notes = export.run(ExportConfig(**fields, max_rank=rank)).notes
    assert any("never trained fewer than 2 ranks" in note for note in notes) == warned


def test_a_damaged_adapter_ends_with_one_because_peft_does_not_read_it(varied, tmp_path, capsys):
    other = copy(varied.adapter, tmp_path / "other")
    (other / WEIGHTS).write_bytes(b"damaged")
    assert run(other) == 1
    assert "cut off or damaged" in capsys.readouterr().err


def test_what_cannot_be_compared_is_refused(varied, tmp_path):
    assert run(varied.base) == 2
    assert run(tmp_path / "nowhere") == 2
    other = save(SERVED["gpt2"], tmp_path / "gpt2").adapter
    assert run(varied.adapter, other) == 1
    with pytest.raises(ConfigError, match="at most one export"):
        VerifyConfig(paths=["a", "b", "c"])
