"""A damaged or foreign adapter is refused in one sentence, and nothing is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from served import SERVED, change_config, change_weights, save
from tlora import cli, load_adapter
from tlora.adapter.saved import WEIGHTS
from tlora.errors import AdapterError, ConfigError, MisfitError
from tlora.evaluate import loading
from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.evaluated_models import resolve
from tlora.files import seal_tensors
from tlora.models.pretrained import Pretrained

B = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
A = B.replace("lora_B", "lora_A")


@pytest.fixture
def copied(varied, tmp_path):
    """A copy of an adapter, sealed, in a folder of its own."""
    folder = Path(shutil.copytree(varied.adapter, tmp_path / "copied" / "adapter"))
    seal_tensors(folder / WEIGHTS)
    return folder


def truncate(folder):
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def flip(folder):
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-100] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def lose_one_side(folder):
    change_weights(folder, lambda weights: weights.pop(A))


def lose_a_module(folder):
    change_weights(folder, lambda weights: (weights.pop(A), weights.pop(B)))


def widen(folder):
    change_weights(folder, lambda weights: weights.update({A: weights[A].repeat(1, 2)}))


def rename(folder):
    def change(weights):
        for key in (A, B):
            weights[key.replace("up_proj", "upward")] = weights.pop(key)

    change_weights(folder, change)


def leave(folder):
    outside = folder.parent / "secret.txt"
    outside.write_text("mine")
    (folder / "tokenizer.json").symlink_to(outside)


DAMAGES = {
    truncate: "cut off or damaged",
    flip: "cut off or damaged",
    lose_one_side: "only one of A and B",
    lose_a_module: "has no matrices for model.layers.1.mlp.up_proj",
    widen: "does not fit",
    rename: "has no matrices for model.layers.1.mlp.up_proj",
    leave: "is a link out of its folder",
}


def one_sentence(capsys, words):
    """Run a command that fails; return what it says."""
    assert cli.main(words) in (1, 2)
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("tlora: ")]
    assert len(lines) == 1
    assert "Traceback" not in said
    return lines[0]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_an_export_says_what_is_wrong_and_writes_nothing(copied, damage, tmp_path, capsys):
    damage(copied)
    words = ["export", str(copied), "--format", "uniform", "--output_dir", str(tmp_path / "out")]
    assert DAMAGES[damage] in one_sentence(capsys, words)
    assert [path.name for path in tmp_path.iterdir()] == ["copied"]


@pytest.mark.parametrize("damage", [truncate, flip, lose_one_side], ids=lambda d: d.__name__)
@pytest.mark.parametrize("verb", ["verify", "inspect"])
def test_what_reads_files_alone_says_what_is_wrong(copied, verb, damage, tmp_path, capsys):
    damage(copied)
    assert DAMAGES[damage] in one_sentence(capsys, [verb, str(copied)])
    assert [path.name for path in copied.parent.iterdir()] == ["adapter"]


def test_an_export_onto_another_base_is_refused(copied, tmp_path, capsys):
    other = save(SERVED["gpt2"], tmp_path / "other").base
    words = ["export", str(copied), "--format", "uniform", "--model", str(other)]
    said = one_sentence(capsys, [*words, "--output_dir", str(tmp_path / "out")])
    assert "does not have; give the base that it was trained on" in said
    assert not (tmp_path / "out").exists()


LOADED = {
    lose_a_module: "its file has no matrices for model.layers.1.mlp.up_proj",
    rename: "the model has no module model.layers.1.mlp.upward",
    widen: "up_proj has",
}


@pytest.mark.parametrize("damage", LOADED, ids=lambda damage: damage.__name__)
def test_loading_names_what_does_not_match_and_the_model_stays(copied, varied, damage):
    damage(copied)
    model, _ = Pretrained(name=str(varied.base)).model("transformers:AutoModelForCausalLM", "cpu")
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(MisfitError, match=LOADED[damage]):
        load_adapter(model, copied)
    assert [(name, type(module)) for name, module in model.named_modules()] == before


@pytest.mark.parametrize("damage", LOADED, ids=lambda damage: damage.__name__)
def test_an_evaluation_refuses_what_does_not_match(copied, damage):
    damage(copied)
    config = EvalConfig(models=[str(copied)], tasks=["chat"])
    (evaluated,) = resolve(config)
    with pytest.raises(AdapterError, match=LOADED[damage]):
        loading.load(evaluated, config)


def test_a_head_that_the_model_does_not_have_is_named(copied, varied):
    change_weights(copied, lambda w: w.update({"base_model.model.score.weight": w[A].clone()}))
    model, _ = Pretrained(name=str(varied.base)).model("transformers:AutoModelForCausalLM", "cpu")
    with pytest.raises(MisfitError, match="the model has no module score"):
        load_adapter(model, copied)


def test_a_missing_bias_is_an_error_and_not_a_warning(copied, varied):
    change_config(copied, lora_bias=True)
    model, _ = Pretrained(name=str(varied.base)).model("transformers:AutoModelForCausalLM", "cpu")
    with pytest.raises(MisfitError, match="missing adapter keys"):
        load_adapter(model, copied)


def test_weights_outside_of_the_base_s_folder_are_not_read(varied, tmp_path):
    base = Path(shutil.copytree(varied.base, tmp_path / "base"))
    (base / "model.safetensors").rename(tmp_path / "outside.safetensors")
    names = load_file(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"'../outside\.safetensors', which is not a file in"):
        Pretrained(name=str(base)).model("transformers:AutoModelForCausalLM", "cpu")
