"""Every format that PEFT reads is the adapter it came from, on every family."""

from __future__ import annotations

import importlib.metadata
import json
import shutil

import pytest
import torch

from families import FAMILIES
from served import change_config, save
from tlora import cli
from tlora.adapter.saved import read_lora
from tlora.errors import AdapterError, ConfigError
from tlora.exporters import export
from tlora.exporters.base import Export
from tlora.exporters.exportconfig import ExportConfig
from tlora.exporters.readers import READERS, reading
from tlora.models.pretrained import Pretrained
from tlora.models.skeleton import layer_sizes


def exported(saved, folder, form, **fields):
    """Export an adapter; return the folder."""
    path = str(saved.adapter)
    export.run(ExportConfig(path=path, output_dir=str(folder), format=form, **fields))
    return folder


def update(factors):
    """Return s B A, in float64."""
    return factors.scale * factors.b.double() @ factors.a.double()


@pytest.mark.parametrize("form", ["native", "compact", "uniform"])
def test_peft_reads_a_format_as_the_adapter_itself(served, form, tmp_path):
    folder = exported(served, tmp_path / "out", form)
    torch.testing.assert_close(served.logits(folder), served.logits(), atol=1e-5, rtol=1e-5)


def test_uniform_has_one_rank_no_patterns_and_every_projection_in_every_layer(served, tmp_path):
    lora = read_lora(exported(served, tmp_path / "out", "uniform"))
    before = read_lora(served.adapter)
    most = max(before.rank(name) for name in before.keys)
    assert lora.fields["r"] == lora.fields["lora_alpha"] == most
    assert lora.fields["rank_pattern"] == lora.fields["alpha_pattern"] == {}
    assert isinstance(lora.fields["target_modules"], list)
    assert {lora.factors(name).a.shape[0] for name in lora.keys} == {most}
    layers = {name.rpartition(".")[2]: set() for name in lora.keys}
    for name in lora.keys:
        layers[name.rpartition(".")[2]].add(next(p for p in name.split(".") if p.isdigit()))
    assert {frozenset(found) for found in layers.values()} == {frozenset("01")}
    assert set(before.keys) < set(lora.keys)


def test_a_module_that_was_not_adapted_is_filled_with_zeros(varied, tmp_path):
    lora = read_lora(exported(varied, tmp_path / "out", "uniform"))
    (name,) = set(lora.keys) - set(read_lora(varied.adapter).keys)
    factors = lora.factors(name)
    assert not factors.a.any()
    assert not factors.b.any()


def test_compact_keeps_the_ranks_and_has_the_scale_one(varied, tmp_path):
    before, after = (
        read_lora(folder)
        for folder in (varied.adapter, exported(varied, tmp_path / "out", "compact"))
    )
    assert {n: before.rank(n) for n in before.keys} == {n: after.rank(n) for n in after.keys}
    assert {after.scale(name) for name in after.keys} == {1.0}


def test_every_reader_is_exact_on_uniform_and_not_all_on_native(varied, tmp_path):
    uniform = read_lora(exported(varied, tmp_path / "out", "uniform"))
    wrong = [r.name for r in READERS if not reading(r, uniform).exact]
    assert wrong == ["tgi"]  # it pads rank 5 to 8
    padded = read_lora(exported(varied, tmp_path / "tgi", "uniform", server="tgi"))
    assert padded.fields["r"] == padded.fields["lora_alpha"] == 8
    assert all(reading(reader, padded).exact for reader in READERS)
    native = [reading(reader, read_lora(varied.adapter)) for reader in READERS]
    assert [r.reader.name for r in native if r.exact] == ["peft", "vllm"]
    assert all(r.refused or (r.error or 0) > 0.01 for r in native if not r.exact)


@pytest.mark.parametrize("form", ["compact", "uniform"])
def test_rank_stabilized_scales_go_into_b(form, tmp_path):
    saved = save(FAMILIES["llama"], tmp_path, use_rslora=True)
    folder = exported(saved, tmp_path / "out", form)
    torch.testing.assert_close(saved.logits(folder), saved.logits(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype, most", [("bfloat16", 1e-2), ("float16", 1e-3)])
def test_baking_costs_what_casting_costs(varied, dtype, most, tmp_path):
    """The error of s B rounded once is that of B rounded once."""
    before = read_lora(varied.adapter)
    errors = []
    for form in ("native", "uniform"):
        after = read_lora(exported(varied, tmp_path / form, form, dtype=dtype))
        off = whole = 0.0
        for name in before.keys:
            right, found = update(before.factors(name)), update(after.factors(name))
            off += float((right - found).square().sum())
            whole += float(right.square().sum())
        errors.append((off / whole) ** 0.5)
    assert 0 < errors[1] < most
    assert errors[1] < 1.1 * errors[0]


def test_the_same_export_is_the_same_bytes(varied, tmp_path):
    folders = [exported(varied, tmp_path / name, "uniform") for name in ("one", "two")]
    files = [(folder / "adapter_model.safetensors").read_bytes() for folder in folders]
    assert files[0] == files[1]


def test_for_picks_the_format_and_prints_the_line_that_serves_it(varied, tmp_path, capsys):
    words = ["export", str(varied.adapter), "--for", "vllm", "--output_dir", str(tmp_path / "v")]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert f"vllm serve {varied.base} --enable-lora --max-lora-rank 8" in shown
    assert read_lora(tmp_path / "v").fields["rank_pattern"] == {}


@pytest.mark.parametrize(
    "form, words",
    [("uniform", "vllm serve"), ("compact", "vllm serve"), ("native", "peft.PeftModel")],
)
def test_without_a_server_the_first_that_takes_the_format_is_shown(varied, tmp_path, form, words):
    path, out = str(varied.adapter), str(tmp_path / "out")
    done = export.run(ExportConfig(path=path, output_dir=out, format=form))
    assert done.command.startswith(words)


def test_a_format_that_a_server_reads_wrongly_is_refused_with_it(varied, tmp_path):
    with pytest.raises(ConfigError, match="which some versions of SGLang read incorrectly"):
        exported(varied, tmp_path / "v", "native", server="sglang")


def test_a_failed_export_leaves_nothing(varied, tmp_path, monkeypatch):
    def fails(*_):
        raise AdapterError("no.")

    monkeypatch.setattr("tlora.exporters.uniform.write_lora", fails)
    with pytest.raises(AdapterError):
        exported(varied, tmp_path / "v", "uniform")
    assert not list(tmp_path.iterdir())


def test_values_that_half_precision_cannot_hold_are_refused(tmp_path):
    saved = save(FAMILIES["llama"], tmp_path, alpha_pattern={}, lora_alpha=1e8)
    with pytest.raises(AdapterError, match="values beyond float16"):
        exported(saved, tmp_path / "v", "compact", dtype="float16")


def test_the_card_names_no_local_path(varied, tmp_path):
    folder = exported(varied, tmp_path / "v", "uniform", server="vllm")
    card = (folder / "README.md").read_text()
    assert "vllm serve base" in card
    assert str(varied.base.parent) not in card
    assert str(tmp_path) not in card
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 5


@pytest.mark.parametrize("rank", [1, 3])
def test_a_cut_keeps_the_largest_singular_values_and_reports_the_energy_lost(
    varied, rank, tmp_path, capsys
):
    words = ["export", str(varied.adapter), "--format", "compact", "--max_rank", str(rank)]
    assert cli.main([*words, "--output_dir", str(tmp_path / "v")]) == 0
    before, after = read_lora(varied.adapter), read_lora(tmp_path / "v")
    card = (tmp_path / "v" / "README.md").read_text()
    lost = whole = 0.0
    for name in before.keys:
        right = update(before.factors(name))
        u, values, v = torch.linalg.svd(right, full_matrices=False)
        best = u[:, :rank] * values[:rank] @ v[:rank]
        torch.testing.assert_close(update(after.factors(name)), best, atol=1e-5, rtol=1e-5)
        energy = float(values[rank:].square().sum())
        lost, whole = lost + energy, whole + float(values.square().sum())
        if before.rank(name) > rank:
            assert f"{name} {energy / float(values.square().sum()):.2%}" in card
    assert f"losing {lost / whole:.2%} of the energy" in capsys.readouterr().out


@pytest.mark.parametrize(
    "fields", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}], ids=str
)
def test_an_adapter_that_a_server_does_not_read_is_not_exported_for_it(fields, tmp_path, capsys):
    saved = save(FAMILIES["llama"], tmp_path, **fields)
    words = ["export", str(saved.adapter), "--output_dir", str(tmp_path / "v")]
    assert cli.main([*words, "--for", "vllm"]) == 2
    assert "vLLM from 0.32 reads this adapter incorrectly" in capsys.readouterr().err
    assert not (tmp_path / "v").exists()
    assert cli.main([*words, "--format", "uniform"]) == 0  # for PEFT
    shown = capsys.readouterr().out
    assert "exact in: PEFT and transformers, PEFT's hotswap_adapter\n" in shown
    assert "vllm serve" not in shown


@pytest.mark.parametrize(
    "form, exact", [("gguf", "llama.cpp, Ollama"), ("merged", "transformers, vLLM, SGLang, TGI")]
)
def test_readers_of_other_files_are_named_too(varied, form, exact, tmp_path, capsys):
    words = ["export", str(varied.adapter), "--format", form, "--output_dir", str(tmp_path / "v")]
    assert cli.main(words) == 0
    assert f"exact in: {exact}" in capsys.readouterr().out
    assert f"read exactly by: {exact}" in (tmp_path / "v" / "README.md").read_text()


def test_a_base_on_the_hub_is_asked_for_its_layers(varied, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(varied.adapter, tmp_path / "adapter")
    change_config(folder, base_model_name_or_path="someone/base")
    words = ["export", str(folder), "--format", "uniform", "--output_dir"]
    assert cli.main([*words, str(tmp_path / "blind")]) == 0
    assert "configuration was not found" in capsys.readouterr().out
    sizes = layer_sizes(Pretrained(name=str(varied.base)), "CAUSAL_LM")
    monkeypatch.setattr(export, "layer_sizes", lambda checkpoint, _: sizes)
    assert cli.main([*words, str(tmp_path / "seen")]) == 0
    assert "configuration was not found" not in capsys.readouterr().out


class Rows:
    """Somebody else's format: the ranks as text."""

    needs = None

    def write(self, source, folder):
        """Write the folder."""
        lora = source.lora
        text = "\n".join(f"{name} {lora.rank(name)}" for name in lora.keys)
        (folder / "ranks.txt").write_text(text)
        return Export(["Only the ranks."], 5)


def test_a_format_of_another_package_is_written_beside_its_card(
    varied, tmp_path, monkeypatch, capsys
):
    entry = importlib.metadata.EntryPoint("rows", f"{__name__}:Rows", "tlora.formats")
    found = {entry.group: [entry]}
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found.get(group, []))
    words = ["export", str(varied.adapter), "--format", "rows", "--output_dir", str(tmp_path / "v")]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "Only the ranks.\nrows: " in shown
    assert "exact in" not in shown  # by no rule known here
    assert "serve it" not in shown
    assert sorted(each.name for each in (tmp_path / "v").iterdir()) == ["README.md", "ranks.txt"]
