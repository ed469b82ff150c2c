"""A merged model is compared with its base and the adapter."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from served import SERVED, dense, save
from tlora import cli
from tlora.adapter.saved import read_lora


def merge(saved, folder, dtype=torch.float32, scale=1.0, transposed=False):
    """Merge an adapter by hand, with dense products, into a copy of its base."""
    shutil.copytree(saved.base, folder)
    lora = read_lora(saved.adapter)
    weights = load_file(folder / "model.safetensors")
    for name, update in dense(lora).items():
        found = next(key for key in weights if f"{name}.weight".endswith(key))
        change = scale * (update.T if transposed else update)
        weights[found] = weights[found].double() + change
    weights = {key: tensor.to(dtype) for key, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def run(*words):
    """Run `tlora verify`; return the exit code."""
    return cli.main(["verify", *map(str, words)])


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def saved(request, tmp_path_factory):
    """An adapter; GPT-2's weights are transposed, one of them square."""
    return save(SERVED[request.param], tmp_path_factory.mktemp(request.param))


def turned(saved):
    return "gpt2" in str(saved.base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_merge_is_exact_but_for_rounding(saved, dtype, tmp_path, capsys):
    folder = merge(saved, tmp_path / "merged", dtype, transposed=turned(saved))
    assert run(saved.adapter, folder) == 0
    assert "exact up to rounding" in capsys.readouterr().out


def test_a_merge_at_another_scale_is_wrong_by_that(saved, tmp_path, capsys):
    folder = merge(saved, tmp_path / "merged", scale=1.3, transposed=turned(saved))
    assert run(saved.adapter, folder, "--for", "vllm") == 1
    count = len(dense(read_lora(saved.adapter)))
    assert f"wrong by 0.3 of the update ({count} modules" in capsys.readouterr().out


def test_a_weight_that_no_adapter_touches_must_be_the_base_s(saved, tmp_path, capsys):
    folder = merge(saved, tmp_path / "merged", transposed=turned(saved))
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if "norm" in key or "ln_" in key)
    save_file(weights | {name: weights[name] + 1}, folder / "model.safetensors", {"format": "pt"})
    assert run(saved.adapter, folder) == 1
    assert f"{name} changed" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_what_the_export_merges_is_right(saved, dtype, tmp_path):
    folder = tmp_path / "merged"
    words = ["merge", saved.adapter, "--output_dir", folder, "--dtype", dtype]
    assert cli.main([*map(str, words)]) == 0
    assert run(saved.adapter, folder, "--for", "sglang") == 0


def test_a_reader_of_other_formats_does_not_pass(saved, tmp_path, capsys):
    folder = merge(saved, tmp_path / "merged", transposed=turned(saved))
    assert run(saved.adapter, folder, "--for", "llama.cpp") == 1
    assert "llama.cpp does not read this format" in capsys.readouterr().err
