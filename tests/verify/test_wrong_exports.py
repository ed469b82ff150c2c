"""A verdict is `exact` exactly when every module's dense product is the adapter's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from served import SERVED, change_config, change_weights, save
from tlora import cli
from tlora.adapter.saved import read_lora
from tlora.exporters import export
from tlora.exporters.exportconfig import ExportConfig
from tlora.exporters.readers import READERS, RefusedError
from tlora.models.pretrained import Pretrained
from tlora.verify import adapters, mergedweights


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(SERVED["llama"], tmp_path_factory.mktemp("wrong"))


def copied(folder, to):
    return Path(shutil.copytree(folder, to))


def exported(saved, out, **fields):
    given = {"path": str(saved.adapter), "output_dir": str(out)} | fields
    export.run(ExportConfig(**given))
    return out


def product(lora, name):
    a, b = (lora.tensors[key].double() for key in lora.keys[name])
    return lora.scale(name) * b @ a


def distance(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("form", ["native", "compact", "uniform"])
def test_each_changed_module_is_found_and_no_other(form, dtype, seed, tmp_path):
    generator = torch.Generator().manual_seed(seed)
    source = save(
        SERVED["llama"],
        tmp_path / "saved",
        use_rslora=bool(seed % 2),
        exclude_modules=[f"layers.{seed % 2}.mlp.up_proj"],
    )
    sizes = torch.randn(26, generator=generator).mul(2).exp()

    def scale(weights):
        for size, key in zip(sizes, sorted(weights), strict=False):
            weights[key] *= size

    change_weights(source.adapter, scale)
    meant = read_lora(source.adapter)
    out = exported(source, tmp_path / "out", format=form, dtype=dtype)
    assert adapters.by_every_reader(read_lora(out), meant)[0].exact
    name = sorted(meant.keys)[int(torch.randint(len(meant.keys), (1,), generator=generator))]
    b = read_lora(out).keys[name][1]
    change_weights(out, lambda weights: weights.update({b: weights[b] * 1.1}))
    wrong = read_lora(out)
    off = {n for n in meant.keys if distance(product(wrong, n), product(meant, n)) > 0.05}
    (verdict, *_) = adapters.by_every_reader(wrong, meant)
    assert not verdict.exact
    assert {*verdict.modules} == off == {name}


def test_a_small_module_does_not_hide_behind_the_rounding_of_large_ones(saved, tmp_path):
    folder = copied(saved.adapter, tmp_path / "adapter")
    lora = read_lora(folder)
    name, (_, b) = next(iter(lora.keys.items()))
    change_weights(folder, lambda weights: weights.update({b: weights[b] * 1e-5}))
    meant = read_lora(folder)
    source = type(saved)(saved.base, folder)
    out = exported(source, tmp_path / "out", format="compact", dtype="bfloat16")
    change_weights(out, lambda weights: weights.update({b: weights[b] * 3}))
    (verdict, *_) = adapters.by_every_reader(read_lora(out), meant)
    assert [*verdict.modules] == [name]
    assert not verdict.exact


@pytest.mark.parametrize(
    "fields",
    [{"alora_invocation_tokens": [1, 2]}, {"use_qalora": True}, {"layer_replication": [[0, 2]]}],
    ids=str,
)
def test_a_field_that_changes_what_the_matrices_mean_is_compared(saved, fields, tmp_path, capsys):
    folder = copied(saved.adapter, tmp_path / "adapter")
    change_config(folder, **fields)
    assert cli.main(["verify", str(folder), str(saved.adapter)]) == 1
    assert f"{next(iter(fields))} of the configuration changed" in capsys.readouterr().err


def test_a_reader_that_stacks_layers_lacks_a_layer_between_two_others(tmp_path):
    source = save(
        SERVED["llama"],
        tmp_path,
        ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"],
        exclude_modules=None,
        rank_pattern={},
        alpha_pattern={},
        lora_alpha=3,
    )

    def move(weights):
        for key in [key for key in weights if ".layers.1." in key]:
            weights[key.replace(".layers.1.", ".layers.3.")] = weights.pop(key)

    change_weights(source.adapter, move)
    change_config(source.adapter, target_modules=["q_proj"])
    by_name = {each.name: each for each in READERS}
    lora = read_lora(source.adapter)
    assert {*by_name["tgi"].scales(lora).values()} == {0.0}
    with pytest.raises(RefusedError, match=r"layers\.1\.self_attn\.q_proj"):
        by_name["lmdeploy"].scales(lora)


@pytest.mark.parametrize("pattern", [r".*q_proj.*", r"^model\.layers\.0.*"])
def test_hotswap_matches_patterns_with_the_names_of_tensors(saved, pattern, tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    folder = copied(saved.adapter, tmp_path / "adapter")
    ranks = json.loads((folder / "adapter_config.json").read_text())["rank_pattern"]
    change_config(folder, rank_pattern=ranks, alpha_pattern={pattern: 11.0})
    model = saved.load(folder)
    hotswap_adapter(model, str(folder), adapter_name="default")
    lora = read_lora(folder)
    rule = {each.name: each for each in READERS}["peft-hotswap"].scales(lora)
    found = {n: model.base_model.model.get_submodule(n).scaling["default"] for n in lora.keys}
    assert rule == pytest.approx(found)


def half_precision(saved, folder, size):
    """Return a base of bfloat16, and an adapter of it whose updates are small."""
    base = copied(saved.base, folder / "base")
    weights = load_file(base / "model.safetensors")
    save_file({k: w.bfloat16() for k, w in weights.items()}, base / "model.safetensors")
    adapter = copied(saved.adapter, folder / "adapter")
    change_weights(adapter, lambda w: w.update({k: w[k] * size for k in w if "lora_B" in k}))
    change_config(adapter, base_model_name_or_path=str(base))
    return type(saved)(base, adapter)


@pytest.mark.parametrize("size", [1e-3, 1e-2, 1.0])
def test_a_base_without_the_update_is_no_merged_model(saved, size, tmp_path):
    """Not even where rounding the base's weights takes more than the whole update."""
    source = half_precision(saved, tmp_path, size)
    base, lora = Pretrained(name=str(source.base)), read_lora(source.adapter)
    out = exported(source, tmp_path / "out", format="merged")
    assert mergedweights.check(out, base, lora).exact
    assert not mergedweights.check(copied(source.base, tmp_path / "plain"), base, lora).exact


def test_what_peft_merges_in_half_precision_is_right(saved, tmp_path):
    import transformers

    source = half_precision(saved, tmp_path, 0.1)
    model = transformers.AutoModelForCausalLM.from_pretrained(source.base, dtype=torch.bfloat16)
    adapted = peft.PeftModel.from_pretrained(model, str(source.adapter))
    adapted.merge_and_unload().save_pretrained(tmp_path / "out")
    base, lora = Pretrained(name=str(source.base)), read_lora(source.adapter)
    verdict = mergedweights.check(tmp_path / "out", base, lora)
    assert verdict.exact, verdict.words()


def lose_head(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def turn_faster(folder):
    fields = json.loads((folder / "config.json").read_text())
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": 5.0}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "digests.json").unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [(lose_head, "lm_head.weight missing"), (turn_faster, "rope_parameters of config.json")],
)
def test_a_merged_model_that_computes_otherwise_is_found(saved, damage, says, tmp_path, capsys):
    out = exported(saved, tmp_path / "out", format="merged")
    damage(out)
    assert cli.main(["verify", str(saved.adapter), str(out)]) == 1
    assert says in capsys.readouterr().err
