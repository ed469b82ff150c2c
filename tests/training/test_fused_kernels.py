"""Kernels that need a GPU: asked for, they reach the model under the adapter, or are refused."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types

import pytest
import torch

from tlora.errors import ConfigError
from tlora.files import read_json, write_json
from tlora.training import train
from tlora.training.setup import settle


@pytest.fixture
def asking(saved, tiny_llama):
    """A model whose config.json asks for an attention."""

    def folder(attention: str) -> str:
        path = saved(tiny_llama())
        file = f"{path}/config.json"
        write_json(file, read_json(file) | {"attn_implementation": attention})
        return path

    return folder


def test_the_checkpoint_chooses_the_attention(config, asking):
    model = settle(config(model=asking("eager"))).load_model(torch.device("cpu"))
    assert model.config._attn_implementation == "eager"


def test_flash_attention_that_is_not_installed_is_refused_in_a_sentence(config, asking):
    setup = settle(config(model=asking("flash_attention_2")))
    if importlib.util.find_spec("flash_attn") is None:
        with pytest.raises(ConfigError, match=r"cannot be loaded.*[Ff]lash"):
            setup.load_model(torch.device("cpu"))
    else:
        model = setup.load_model(torch.device("cpu"))
        assert model.config._attn_implementation == "flash_attention_2"


@pytest.mark.filterwarnings("ignore:.*use_liger_kernel:FutureWarning")
def test_liger_is_given_the_base_model_and_leaves_the_loss_to_the_trainer(config, monkeypatch):
    given = []
    module = types.ModuleType("liger_kernel.transformers")
    module._apply_liger_kernel_to_instance = lambda **fields: given.append(fields)
    package = types.ModuleType("liger_kernel")
    package.__spec__ = importlib.machinery.ModuleSpec("liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    for name in ("utils", "integrations.liger"):
        monkeypatch.setattr(f"transformers.{name}.is_liger_kernel_available", lambda: True)
    fields = {"use_liger_kernel": True, "max_steps": 1, "save_strategy": "no"}
    done = train.run(config(trainer=fields))
    assert done.finished
    (fields,) = given
    assert type(fields.pop("model")).__name__ == "LlamaForCausalLM"
    assert fields == {"fused_linear_cross_entropy": False}


def test_liger_that_is_not_installed_is_refused(config, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_liger_kernel_available", lambda: False)
    with pytest.raises(ConfigError, match="`use_liger_kernel` needs the package liger-kernel"):
        train.run(config(trainer={"use_liger_kernel": True}))
