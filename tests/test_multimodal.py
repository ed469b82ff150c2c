"""Multimodal checkpoints on rows of text: the language model is adapted, its towers stay alone."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

import multimodal_bases
from tlora.errors import ConfigError
from tlora.evaluate import evaluate
from tlora.evaluate.evalconfig import EvalConfig
from tlora.registry import METHODS
from tlora.tasks.base import LONGEST
from tlora.training import dryrun, initialize, train
from tlora.training.setup import settle

TOWERS = {
    "gemma3": "multi_modal_projector and vision_tower are not",
    "gemma4": "embed_vision and vision_tower are not",
    "qwen2.5-vl": "visual is not",
    "qwen3-vl": "visual is not",
    "mistral3": "multi_modal_projector and vision_tower are not",
    "llava": "multi_modal_projector and vision_tower are not",
}


@pytest.fixture(scope="module")
def folders(saved) -> dict[str, str]:
    return {name: saved(multimodal_bases.build(name)) for name in multimodal_bases.CONFIGS}


@pytest.mark.filterwarnings("ignore:Llama4ForCausalLM keeps experts")
@pytest.mark.parametrize("family", multimodal_bases.CONFIGS)
def test_a_run_on_rows_of_text(family, folders, config, other_sums, caplog):
    folder = folders[family]
    trainer = {"max_steps": 8, "learning_rate": 0.05, "save_strategy": "no"}
    adapter = {"r": 2, "target_modules": "all-linear"}
    with caplog.at_level(logging.INFO, "tlora"):
        run = train.run(
            config(model=folder, eval_file=other_sums, trainer=trainer, adapter=adapter)
        )

    said = [r.getMessage() for r in caplog.records if "is multimodal" in r.getMessage()]
    if family == "llama4":  # transformers has a causal model of its language model alone
        assert said == []
    else:
        assert len(said) == 1
        assert f"the Linears of model.language_model are adapted, {TOWERS[family]}" in said[0]
    adapted = {
        key.split(".lora_")[0] for key in load_file(run.adapter / "adapter_model.safetensors")
    }
    assert adapted
    assert not [name for name in adapted if "vis" in name or "multi_modal" in name]
    losses = [line["loss"] for line in map(json.loads, run.log.open()) if "loss" in line]
    assert losses[-1] < losses[0]
    base = _load(folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = base(input_ids=ids).logits
    again = PeftModel.from_pretrained(base, run.adapter)
    assert not torch.equal(again(input_ids=ids).logits, before)

    result = evaluate.run(
        EvalConfig(
            models=[str(run.path)],
            tasks=["jsonl"],
            test_file=other_sums,
            output_dir=str(run.path / "eval"),
            device="cpu",
            limit=2,
        )
    )
    assert result is not None


def _load(folder: str):
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(folder)
    except ValueError:
        return transformers.AutoModelForImageTextToText.from_pretrained(folder)


@pytest.mark.parametrize("method", [name for name in METHODS.names() if name != "full"])
def test_every_method_leaves_the_vision_tower_alone(method, folders, config):
    own = {"adalora": {"init_r": 4, "target_r": 2}, "qa-lora": {"r": 2, "group_size": 4}}
    adapter = own.get(method, {"r": 2})
    setup = settle(config(model=folders["llava"], method=method, adapter=adapter))
    model = initialize.adapt(setup, "cpu").model
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".language_model." in name for name in trained)


@pytest.mark.parametrize("family", multimodal_bases.CONFIGS)
def test_the_dry_run_reads_the_text_configuration(family, folders, config):
    found = dryrun.run(config(model=folders[family], adapter={"r": 2}))
    text = transformers.AutoConfig.from_pretrained(folders[family]).get_text_config()
    assert found.length == min(text.max_position_embeddings, LONGEST)
    layers = {n.split(".layers.")[1][0] for t in found.targets if ".layers." in (n := t.name)}
    assert layers == {"0", "1"}
    assert not [target.name for target in found.targets if "vis" in target.name]
    assert found.training[0].trainable == sum(
        found.ranks[target.name] * target.d_out for target in found.targets
    )


def test_a_run_on_text_does_not_adapt_the_tower_alone(folders, config):
    run = config(model=folders["llava"], adapter={"r": 2, "target_modules": ["fc1", "fc2"]})
    with pytest.raises(
        ConfigError, match=r"'model\.vision_tower\..* only reach model\.language_model;"
    ):
        train.run(run)


def test_named_modules_of_the_tower_are_adapted(folders, config):
    adapter = {"r": 2, "target_modules": ["fc1"]}
    found = dryrun.run(config(model=folders["llava"], adapter=adapter))
    assert {target.name.split(".")[1] for target in found.targets} == {"vision_tower"}
