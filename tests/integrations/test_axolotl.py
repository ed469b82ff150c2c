"""The Axolotl plugin against a stand-in of Axolotl, which pins other versions of torch and PEFT.

The stand-in has what the plugin imports, as Axolotl 0.19 declares it.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any

import pytest
import torch
from datasets import Dataset

import support
from tlora.config import TLoraConfig
from tlora.errors import ConfigError

ROWS = [{"input_ids": [5 + n, 6, 7 + n, 8], "labels": [-100, -100, 7 + n, 8]} for n in range(8)]


@dataclasses.dataclass(frozen=True)
class AdapterCapabilities:
    name: str
    lora_like: bool = False
    relora: bool = False


@pytest.fixture
def axolotl(monkeypatch) -> Any:
    """Put the stand-in where the plugin imports from; return the plugin's module."""
    made = {name: types.ModuleType(name) for name in ("axolotl", "axolotl.integrations")}
    base = made["axolotl.integrations.base"] = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin, base.AdapterCapabilities = type("BasePlugin", (), {}), AdapterCapabilities
    common = made["axolotl.common"] = types.ModuleType("axolotl.common")
    data = made["axolotl.common.datasets"] = types.ModuleType("axolotl.common.datasets")
    meta = types.SimpleNamespace(train_dataset=Dataset.from_list(ROWS))
    data.load_datasets = lambda *, cfg: meta
    common.datasets = data
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "tlora.integrations.axolotl", raising=False)
    import tlora.integrations.axolotl as plugin

    yield plugin
    sys.modules.pop("tlora.integrations.axolotl", None)


def cfg(**fields: Any) -> Any:
    section = {"r": 2, "lora_alpha": 2, "samples": 5, "batch_size": 2}
    values = {"adapter": "tlora", "tlora": section, "lora_model_dir": None, "seed": 3}
    return types.SimpleNamespace(**values | fields)


def test_it_names_its_section_and_its_adapter(axolotl):
    plugin = axolotl.TLoraPlugin()
    module, _, name = plugin.get_input_args().rpartition(".")
    section = getattr(sys.modules[module], name)(tlora={"r": 4})
    assert section.tlora == {"r": 4}
    assert plugin.get_adapter_capabilities() == [AdapterCapabilities("tlora", lora_like=True)]


def test_other_adapters_are_left_to_axolotl(axolotl, tiny_llama):
    assert axolotl.TLoraPlugin().load_adapter(tiny_llama(), cfg(adapter="lora")) is None


def test_it_calibrates_on_the_training_rows_and_trains_b_alone(axolotl, tiny_llama, tmp_path):
    plugin, batch = axolotl.TLoraPlugin(), next(axolotl.batches(ROWS, 3))
    base = tiny_llama(initializer_range=0.2)
    before = support.logits_of(base, batch)
    model, config = plugin.load_adapter(base, cfg())
    assert config is model.peft_config["default"]
    assert torch.equal(support.logits_of(model, batch), before)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains
    assert all("lora_B" in name for name in trains)
    losses = support.train(model.train(), batch, steps=3)
    assert losses[-1] < losses[0]

    model.eval().save_pretrained(tmp_path)
    given = cfg(lora_model_dir=str(tmp_path))
    again, _ = plugin.load_adapter(tiny_llama(initializer_range=0.2), given)
    assert torch.equal(support.logits_of(again, batch), support.logits_of(model, batch))
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trains


def test_its_section_is_laid_over_the_recommended_setting(axolotl):
    config, *_ = axolotl._read({"r": 4, "allocate_scale": True})
    assert config == TLoraConfig(
        r=4, allocate_rank=False, allocate_scale=True, task_type="CAUSAL_LM"
    )


def test_batches_are_padded_and_masked(axolotl):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8]}]
    (batch,) = axolotl.batches(rows, 2)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]


@pytest.mark.parametrize(
    ("fields", "config_only", "says"),
    [
        ({"tlora": {"rank": 4}}, False, "there is no option `rank`"),
        ({"tlora": {"samples": 0}}, False, "`samples` is 0; give a whole number above 0"),
        ({}, True, "preference training creates its adapter from a configuration"),
    ],
)
def test_what_is_wrong_is_said(axolotl, tiny_llama, fields, config_only, says):
    plugin = axolotl.TLoraPlugin()
    with pytest.raises(ConfigError, match=says):
        plugin.load_adapter(tiny_llama(), cfg(**fields), config_only=config_only)
