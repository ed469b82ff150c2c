"""Merging into whatever a base's folder may be: damaged, quantized, another head's, fused."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import moe
import quantized_bases
from families import DECODER, Kind
from served import PROMPT, Saved, save
from tlora import cli
from tlora.errors import AdapterError, ConfigError, DiskFullError
from tlora.exporters import export
from tlora.exporters.exportconfig import ExportConfig

INDEX = "model.safetensors.index.json"
WIDE = Kind(
    "LlamaConfig",
    "LlamaForCausalLM",
    DECODER | {"hidden_size": 64, "head_dim": 32, "intermediate_size": 128},
)


def merged(saved: Saved, folder: Path, **fields: Any) -> export.Exported:
    given = {"path": str(saved.adapter), "output_dir": str(folder), "format": "merged"} | fields
    return export.run(ExportConfig(**given))


@pytest.fixture
def shards(varied, tmp_path) -> Saved:
    """A base in several files, which may be changed."""
    model = transformers.AutoModelForCausalLM.from_pretrained(varied.base)
    model.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    return Saved(tmp_path / "base", varied.adapter)


def escaping(base: Path) -> None:
    index = json.loads((base / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "../" + index["weight_map"][name]
    (base / INDEX).write_text(json.dumps(index))


def lacking_a_shard(base: Path) -> None:
    next(iter(sorted(base.glob("*.safetensors")))).unlink()


def cut_off(base: Path) -> None:
    file = next(iter(sorted(base.glob("*.safetensors"))))
    file.write_bytes(file.read_bytes()[:-10])


def lacking_a_tensor(base: Path) -> None:
    index = json.loads((base / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = sorted({*index["weight_map"].values()})[0]
    (base / INDEX).write_text(json.dumps(index))


def of_another_shape(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": 161}))


def without_an_index(base: Path) -> None:
    (base / INDEX).write_text("[]")


def deeper(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


@pytest.mark.parametrize(
    "damage, fault",
    [
        (escaping, r"lists '../\S+', which is not a safetensors file in"),
        (lacking_a_shard, r"model-00001-of-\d+.safetensors is missing"),
        (cut_off, r"model-00001-of-\d+.safetensors is truncated or damaged"),
        (lacking_a_tensor, r"model.norm.weight is not in the file listed in"),
        (of_another_shape, r"is 160 x 16 in its files but 161 x 16 in its config.json"),
        (without_an_index, "maps no tensors to files"),
        (deeper, r"lack model.layers.2\S+, "),
    ],
)
def test_a_damaged_base_is_refused_and_nothing_written(shards, damage, fault, tmp_path):
    damage(shards.base)
    with pytest.raises(ConfigError, match=fault):
        merged(shards, tmp_path / "out", model=str(shards.base))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_full_disk_is_seen_before_anything_is_written(varied, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(DiskFullError, match=r"needs 0.1 GiB, but \S+ only has 0.0 GiB free"):
        merged(varied, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_values_beyond_the_dtype_are_refused(tmp_path):
    saved = save(WIDE, tmp_path, alpha_pattern={}, lora_alpha=1e8)
    with pytest.raises(AdapterError, match="has values beyond float16"):
        merged(saved, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_a_name_that_the_hub_s_cache_lacks_is_one_sentence(varied, tmp_path, capsys):
    words = ["merge", str(varied.adapter), "--model", "nobody/nothing"]
    assert cli.main([*words, "--output_dir", str(tmp_path / "out")]) == 2
    assert "no model of this name in the Hub's cache" in capsys.readouterr().err


def test_a_base_in_the_hub_s_cache_is_merged_into(shards, tmp_path, monkeypatch):
    cache = tmp_path / "cache" / "models--us--base"
    snapshot = cache / "snapshots" / ("a" * 40)
    shutil.copytree(shards.base, snapshot)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    places = {"hub": "us/base", "local": str(shards.base)}
    folders = [merged(shards, tmp_path / n, model=place).folder for n, place in places.items()]
    assert sorted(names(folders[0])) == sorted(names(folders[1]))
    for file in folders[1].glob("*.safetensors"):
        assert (folders[0] / file.name).read_bytes() == file.read_bytes()


def test_tokenizer_and_template_are_the_adapter_s_where_it_has_its_own(varied, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(varied.base, base)
    shutil.copytree(varied.adapter, adapter)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json"):
        (base / name).write_text("base")
    (base / "notes.bin").write_text("no")
    out = merged(Saved(base, adapter), tmp_path / "one", model=str(base)).folder
    assert (out / "chat_template.jinja").read_text() == "base"
    assert (out / "generation_config.json").is_file()
    assert not (out / "notes.bin").exists()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).write_text("adapter")
    (adapter / "optimizer.pt").write_text("no")
    out = merged(Saved(base, adapter), tmp_path / "two", model=str(base)).folder
    assert (out / "tokenizer.json").read_text() == "adapter"
    assert not {"chat_template.jinja", "vocab.json", "optimizer.pt"} & set(names(out))


def names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


@pytest.mark.parametrize("prefix", [True, False])
def test_a_classifier_brings_its_head_and_its_labels(prefix, tmp_path):
    model = WIDE.build()
    (model if prefix else model.model).save_pretrained(tmp_path / "base")
    labels = {"id2label": {0: "no", 1: "yes", 2: "so"}, "label2id": {"no": 0, "yes": 1, "so": 2}}
    kind = transformers.AutoModelForSequenceClassification
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS")
    adapted = peft.get_peft_model(kind.from_pretrained(tmp_path / "base", **labels), config)
    with torch.no_grad():
        for name, parameter in sorted(adapted.named_parameters()):
            if "lora_" in name:
                parameter.fill_(0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "classifier.json").write_text(json.dumps(labels))
    out = merged(Saved(tmp_path / "base", tmp_path / "adapter"), tmp_path / "out").folder
    whole, found = kind.from_pretrained(out, output_loading_info=True)
    assert not any(found[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert whole.config.id2label == labels["id2label"]
    assert whole.config.architectures == ["LlamaForSequenceClassification"]
    with torch.no_grad():
        wanted = adapted.eval()(input_ids=PROMPT).logits
        torch.testing.assert_close(whole(input_ids=PROMPT).logits, wanted, atol=1e-5, rtol=1e-5)
    assert "classifier.json" not in names(out)


@pytest.mark.parametrize("form", ["nf4", "int8", "torchao"])
def test_a_quantized_base_is_dequantized_if_asked_and_the_difference_said(form, tmp_path):
    saved = save(WIDE, tmp_path, alpha_pattern={}, lora_alpha=1)
    base = quantized_bases.load(str(saved.base), form, dtype=torch.float32)
    base.save_pretrained(tmp_path / "quantized")
    fields = {"model": str(tmp_path / "quantized")}
    with pytest.raises(ConfigError, match=r"is quantized and .* use --dequantize"):
        merged(saved, tmp_path / "out", **fields)
    done = merged(saved, tmp_path / "out", **fields, dequantize=True)
    assert any("of the adapter's effect" in note for note in done.notes)
    assert "quantization_config" not in json.loads((done.folder / "config.json").read_text())
    whole = transformers.AutoModelForCausalLM.from_pretrained(done.folder)
    again = quantized_bases.load(str(saved.base), form, dtype=torch.float32)
    with torch.no_grad():
        plain = again(input_ids=PROMPT).logits
        wanted = peft.PeftModel.from_pretrained(again, str(saved.adapter))(input_ids=PROMPT).logits
        off = (whole(input_ids=PROMPT).logits - wanted).norm() / (wanted - plain).norm()
    assert off < 0.1


def test_an_adapter_trained_on_quantized_weights_says_so(varied, tmp_path, monkeypatch):
    class Run(export.RunFolder):
        exists = True

        def config(self):
            return {"quantization": "nf4"}

    shutil.copytree(varied.adapter, tmp_path / "run" / "adapter")
    monkeypatch.setattr("tlora.exporters.merged.RunFolder", Run)
    saved = Saved(varied.base, tmp_path / "run" / "adapter")
    assert any("quantized to nf4" in note for note in merged(saved, tmp_path / "out").notes)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("experts", [None, moe.BOTH])
def test_only_adapters_of_fused_experts_are_merged_in_memory(family, experts, tmp_path):
    model = getattr(moe, family)()
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        target_modules=["q_proj"], target_parameters=experts, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in sorted(adapted.named_parameters()):
            if "lora_" in name:
                generator = torch.Generator().manual_seed(len(name))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    done = merged(Saved(tmp_path / "base", tmp_path / "adapter"), tmp_path / "out")
    assert any("in memory" in note for note in done.notes) is bool(experts)
    whole = transformers.AutoModelForCausalLM.from_pretrained(done.folder).eval()
    with torch.no_grad():
        wanted = adapted.eval()(input_ids=PROMPT).logits
        torch.testing.assert_close(whole(input_ids=PROMPT).logits, wanted, atol=1e-5, rtol=1e-4)
