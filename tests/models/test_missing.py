"""A base is whole, or it is refused by the names of what its files lack."""

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tlora import cli
from tlora.errors import ConfigError
from tlora.models.pretrained import Pretrained
from tlora.training import initialize

CAUSAL = "transformers:AutoModelForCausalLM"
SEQ2SEQ = "transformers:AutoModelForSeq2SeqLM"
LABELED = "transformers:AutoModelForSequenceClassification"
CPU = torch.device("cpu")


def edit(folder, config=None, drop=(), **tensors):
    """Change fields of a saved model's configuration; drop or replace weights of its file."""
    path = Path(folder)
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | (config or {})))
    file = path / "model.safetensors"
    weights = load_file(file)
    assert all(any(key.startswith(name) for key in weights) for name in drop)
    kept = {key: value for key, value in weights.items() if not key.startswith(tuple(drop) or "-")}
    save_file(kept | tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("config", "drop", "message"),
    [
        (
            {"num_hidden_layers": 4},
            (),
            r"lacks 18 of 39 weights of LlamaForCausalLM, which would start at random:"
            r" model\.layers\.2\.input_layernorm\.weight, \S+, \S+ and 15 more; give a complete",
        ),
        ({}, ("lm_head",), r"lacks 1 of 21 weights of LlamaForCausalLM.*: lm_head\.weight; give"),
        ({}, ("model.layers.1.mlp.up",), r"random: model\.layers\.1\.mlp\.up_proj\.weight; give"),
        (
            {"intermediate_size": 48},
            (),
            r"model\.layers\.0\.mlp\.down_proj\.weight is 16 x 32 in its files and 16 x 48 by its"
            r" config \(6 differ\); correct",
        ),
    ],
)
def test_a_decoder_that_is_not_whole_is_refused(saved, tiny_llama, config, drop, message):
    folder = edit(saved(tiny_llama()), config, drop)
    with pytest.raises(ConfigError, match=f"model: .*{message}"):
        Pretrained(name=folder).model(CAUSAL, CPU)


def test_nothing_is_written_for_a_base_that_is_not_whole(config, saved, tiny_llama, capsys):
    folder = edit(saved(tiny_llama()), {"num_hidden_layers": 4})
    run = config(model=folder)
    with pytest.raises(ConfigError, match="lacks 18 of 39 weights"):
        initialize.run(run)
    assert not Path(run.output_dir).exists()
    words = ["train", "--model", folder, "--train_file", run.train_file]
    assert cli.main([*words, "--output_dir", run.output_dir, "--trainer.use_cpu", "true"]) == 2
    assert "lacks 18 of 39 weights of LlamaForCausalLM" in capsys.readouterr().err
    assert not Path(run.output_dir).exists()


def test_a_tied_head_is_not_missing(saved, tiny_llama):
    folder = saved(tiny_llama(tie_word_embeddings=True))
    assert "lm_head.weight" not in load_file(Path(folder) / "model.safetensors")
    model, drawn = Pretrained(name=folder).model(CAUSAL, CPU)
    assert drawn == []
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(ConfigError, match=r"embed_tokens\.weight"):
        Pretrained(name=edit(folder, drop=("model.embed_tokens",))).model(CAUSAL, CPU)


def test_what_the_models_class_allows_to_be_missing_is_not_missing(saved, tiny_llama, monkeypatch):
    allowed = [r"layers\.\d+\.mlp\.up_proj"]
    folder = edit(saved(tiny_llama()), drop=("model.layers.1.mlp.up",))
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keys_to_ignore_on_load_missing", allowed)
    assert Pretrained(name=folder).model(CAUSAL, CPU)[1] == []


def test_an_encoder_decoder_is_whole_with_tied_embeddings(saved, tiny_t5):
    folder = saved(tiny_t5())
    assert Pretrained(name=folder).model(SEQ2SEQ, CPU)[1] == []
    with pytest.raises(ConfigError, match=r"decoder\.block\.0"):
        Pretrained(name=edit(folder, drop=("decoder.block.0.",))).model(SEQ2SEQ, CPU)


HEAD = {"num_labels": 3}


@pytest.mark.parametrize("drop", [("bert.pooler",), ("classifier",), ("bert.pooler", "classifier")])
def test_a_classifier_may_lack_head_and_pooler(saved, tiny_bert_classifier, drop):
    folder = edit(saved(tiny_bert_classifier(num_labels=3)), drop=drop)
    model, drawn = Pretrained(name=folder).model(LABELED, CPU, head=HEAD)
    lacks = {name for name, _ in model.named_parameters() if name.startswith(drop)}
    assert set(drawn) == lacks
    with pytest.raises(ConfigError, match="BertForSequenceClassification"):
        Pretrained(name=folder).model(LABELED, CPU)  # evaluated as it is, it has a head


def test_a_classifier_of_other_classes_gets_a_new_head(saved, tiny_bert_classifier):
    folder = saved(tiny_bert_classifier(num_labels=5))
    model, drawn = Pretrained(name=folder).model(LABELED, CPU, head=HEAD)
    assert drawn == ["classifier.bias", "classifier.weight"]
    assert model.classifier.out_features == 3


def test_a_classifier_does_not_lack_its_body(saved, tiny_bert_classifier, tiny_llama):
    for model, lost in (
        (tiny_bert_classifier(), "bert.encoder.layer.1.output.dense"),
        (tiny_llama(), "model.layers.1.mlp.up_proj"),
    ):
        folder = edit(saved(model), drop=(lost, *(["lm_head"] if model.can_generate() else [])))
        with pytest.raises(ConfigError, match=rf"random: {lost}"):
            Pretrained(name=folder).model(LABELED, CPU, head=HEAD)


def test_a_causal_model_gives_a_classifier_all_but_the_new_head(saved, tiny_llama, caplog):
    folder = saved(tiny_llama())
    with caplog.at_level(logging.WARNING, "tlora"):
        _, drawn = Pretrained(name=folder).model(LABELED, CPU, head=HEAD)
    assert drawn == ["score.weight"]
    assert not [record for record in caplog.records if record.name.startswith("tlora")]


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_layers_that_the_configuration_leaves_out_are_named(saved, tiny_llama, caplog, prefix):
    folder = edit(saved(tiny_llama()), {"num_hidden_layers": 1})
    if not prefix:
        file = Path(folder) / "model.safetensors"
        weights = {key.removeprefix("model."): value for key, value in load_file(file).items()}
        save_file(weights, file, {"format": "pt"})
    with caplog.at_level(logging.WARNING, "tlora"):
        Pretrained(name=folder).model(LABELED, CPU, head=HEAD)
    [said] = [r.getMessage() for r in caplog.records if r.name.startswith("tlora")]
    assert "has 9 weights of layers that its config.json lacks, and they are not used" in said
    assert f"{prefix}layers.1.input_layernorm.weight" in said
