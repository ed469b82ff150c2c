"""A damaged or foreign adapter is refused in one sentence, and nothing is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from served import change_config, change_weights
from tlora import load_adapter
from tlora.adapter.saved import WEIGHTS
from tlora.errors import MisfitError
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


def lose_a_module(folder):
    change_weights(folder, lambda weights: (weights.pop(A), weights.pop(B)))


def widen(folder):
    change_weights(folder, lambda weights: weights.update({A: weights[A].repeat(1, 2)}))


def rename(folder):
    def change(weights):
        for key in (A, B):
            weights[key.replace("up_proj", "upward")] = weights.pop(key)

    change_weights(folder, change)


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
