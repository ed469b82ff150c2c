"""Words of the command line become models, or one sentence for each that does not."""

import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tlora.demo.run import BASE_MODEL
from tlora.errors import AdapterError, ConfigError
from tlora.evaluate import loading
from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.evaluated_models import resolve
from tlora.files import write_state


def found(*models, **fields):
    config = EvalConfig(models=[str(model) for model in models], tasks=["t"], **fields)
    return [(s.name, s.kind, s.model, s.adapter) for s in resolve(config)]


@pytest.fixture
def adapters(here, demo_adapter):
    """Two adapters of one base: a folder of its own, and the run of a training."""
    shutil.copytree(demo_adapter, "one")
    shutil.copytree(demo_adapter, "runs/two/adapter")
    write_state(here / "runs/two/run.json", {"kind": "tlora run", "config": {}})
    return "one", "runs/two"


def test_a_run_is_its_adapter_and_bases_come_first(adapters):
    one, two = adapters
    assert found(one, two) == [
        ("one", "adapter", BASE_MODEL, "one"),
        ("two", "adapter", BASE_MODEL, "runs/two/adapter"),
    ]
    with_base = ("base", "base", BASE_MODEL, None)
    assert found(one, two, with_base=True)[0] == with_base
    assert found(BASE_MODEL, one) == found(one, with_base=True)
    assert found(BASE_MODEL, one, with_base=True) == found(one, with_base=True)
    # An order that was given is kept; only a base that was not named goes first.
    assert found(one, BASE_MODEL)[1] == with_base
    assert found(BASE_MODEL) == [with_base]


def test_merged_stands_in_place_of_the_adapter_or_beside_it(adapters):
    assert [s[:2] for s in found("one", merge=True)] == [("one-merged", "merged")]
    both = found("one", with_merged=True, with_base=True)
    assert [s[:2] for s in both] == [
        ("base", "base"),
        ("one", "adapter"),
        ("one-merged", "merged"),
    ]


def test_models_can_be_given_names_and_a_base(adapters, saved, tiny_llama):
    other = saved(tiny_llama())
    assert found("mine=one", model=other) == [("mine", "adapter", other, "one")]
    assert found(model=BASE_MODEL, adapter="one") == found("one")
    assert found(model=BASE_MODEL) == found(BASE_MODEL)
    names = [s[0] for s in found(f"b={BASE_MODEL}", "one", with_base=True)]
    assert names == ["b", "one"]


def edit(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("base", [["b"], 1, {}])
def test_a_base_that_is_no_name_is_none(adapters, here, base):
    shutil.copytree("one", "odd")
    edit(here / "odd", base_model_name_or_path=base)
    with pytest.raises(ConfigError, match=r"odd does not name its base model; give --model\."):
        found("odd")


def test_every_fault_is_named_at_once(adapters, here):
    shutil.copytree("one", "lost")
    edit(here / "lost", base_model_name_or_path="/gone/base")
    shutil.copytree("one", "nameless")
    edit(here / "nameless", base_model_name_or_path=None)
    (here / "empty").mkdir()
    (here / "unfinished").mkdir()
    run = {"kind": "tlora run", "verb": "init", "config": {}}
    write_state(here / "unfinished/run.json", run)
    words = [
        "one",
        "lost",
        "nameless",
        "empty",
        "unfinished",
        "/not/there",
        "a b/c",
        "nobody/model",
    ]
    with pytest.raises(ConfigError) as error:
        found(*words)
    said = error.value.faults
    assert len(said) == 7
    assert said[0].startswith("cannot read a model at '/gone/base', the base of lost; give")
    assert said[1] == "nameless does not name its base model; give --model."
    assert said[2].startswith("empty contains no model (config.json), adapter")
    assert said[3].endswith("finish it with tlora init --output_dir unfinished --resume.")
    assert said[4].startswith("there is no model, run or adapter '/not/there'")
    assert said[5].startswith("there is no model, run or adapter 'a b/c'")
    assert said[6].startswith("there is no folder 'nobody/model', and no model of this name in")


def test_models_of_one_name_or_of_other_heads_are_refused(adapters, saved, tiny_bert_classifier):
    classifier = saved(tiny_bert_classifier())
    with pytest.raises(
        ConfigError, match="classifiers cannot be evaluated together with generative models"
    ):
        found(classifier, BASE_MODEL)
    shutil.copytree("one", "again/one")
    with pytest.raises(
        ConfigError, match=r"one, again/one would all have the name 'one'; .*NAME=PATH"
    ):
        found("one", "again/one")
    assert [s[0] for s in found("one", "other=again/one")] == ["one", "other"]


def test_new_weights_are_seen(adapters):
    config = EvalConfig(models=["one"], tasks=["t"])
    (evaluated,) = resolve(config)
    before = evaluated.identity()
    assert before == evaluated.identity()
    file = "one/adapter_model.safetensors"
    with open(file, "r+b") as weights:  # noqa: PTH123
        weights.seek(-1, 2)
        last = weights.read(1)
        weights.seek(-1, 2)
        weights.write(bytes([last[0] ^ 1]))
    after = evaluated.identity()
    assert (after["model"] == before["model"], after["adapter"] == before["adapter"]) == (
        True,
        False,
    )


def test_merging_gives_the_adapters_logits_and_no_adapter(here, saved, tiny_llama):
    base = saved(tiny_llama())
    model = get_peft_model(
        tiny_llama(),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    )
    model.save_pretrained("made")
    config = EvalConfig(models=["made"], model=base, tasks=["t"], with_merged=True)
    adapted, merged = (loading.load(evaluated, config) for evaluated in resolve(config))
    ids = torch.arange(3, 40).reshape(1, -1)
    with torch.no_grad():
        assert torch.allclose(
            adapted(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-4
        )
    assert not [name for name, _ in merged.named_modules() if "lora" in name]
    assert not any(p.requires_grad for p in adapted.parameters())


def test_tokens_that_were_added_come_with_the_adapters_tokenizer(
    here, saved, tiny_llama, tiny_tokenizer
):
    base = saved(tiny_llama())
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["<one>", "<two>", *(f"<{n}>" for n in range(99))])
    tokenizer.save_pretrained("made")
    model = tiny_llama()
    model.resize_token_embeddings(len(tokenizer))
    made = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    made.save_pretrained("made", save_embedding_layers=True)
    fields = {"models": ["made"], "model": base, "tasks": ["t"], "with_base": True}
    config = EvalConfig(**fields)
    with pytest.raises(AdapterError, match=r"made does not fit .* --tokenizer"):
        loading.load(resolve(config)[1], config)
    config = EvalConfig(**fields, tokenizer="made")
    for evaluated in resolve(config):
        loaded = loading.load(evaluated, config)
        assert loaded.get_input_embeddings().weight.shape[0] == len(tokenizer)
    ids = torch.tensor([tokenizer("a <one> b <two>")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, made.eval()(input_ids=ids).logits)
