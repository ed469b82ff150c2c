"""What trains is float32 on a 16-bit base, and moves at the rates that people use."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tlora.compare.exactmatch import exact_match
from tlora.training import initialize, train
from tlora.training.setup import settle


@pytest.fixture
def texts(tmp_path):
    """Rows of two classes to train on and to evaluate on."""
    files = tmp_path / "train.tsv", tmp_path / "dev.tsv"
    for file, numbers in zip(files, (range(12), range(12, 24)), strict=True):
        lines = [f"{'good' if n % 2 else 'bad'} {n}\t{n % 2}" for n in numbers]
        file.write_text("sentence\tlabel\n" + "\n".join(lines))
    return dict(zip(("train_file", "eval_file"), map(str, files), strict=True))


def losses(folder):
    lines = [json.loads(line) for line in folder.log.read_text().splitlines()]
    return torch.tensor([line["loss"] for line in lines if "loss" in line])


def small_rate(**fields):
    return {"learning_rate": 2e-5, "lr_scheduler_type": "constant", **fields}


@pytest.mark.parametrize(("method", "dtype"), [("tlora", "bfloat16"), ("lora", "float16")])
def test_a_new_head_on_a_16_bit_base_is_float32_and_moves(
    config, saved, tiny_bert_classifier, texts, method, dtype
):
    fields = {"model": saved(tiny_bert_classifier()), "task": "sst2", "method": method, **texts}
    fields |= {"dtype": dtype, "trainer": small_rate()}
    started, ended = (
        stage.run(config(name, **fields)) for name, stage in (("start", initialize), ("end", train))
    )
    assert losses(ended).isfinite().all()
    before, after = (load_file(f.adapter / "adapter_model.safetensors") for f in (started, ended))
    heads = [name for name in before if "classifier" in name]
    assert heads
    for name in heads:
        assert before[name].dtype == after[name].dtype == torch.float32
        # Each step moves a weight by about the rate; 16 bits would lose most steps.
        moved = (after[name] - before[name]).abs()
        assert (moved > 1e-6).float().mean() > 0.9, name
        assert moved.max() < 6 * 2.1e-5, name


def test_full_fine_tuning_is_in_float32_whatever_the_base(config, llama_folder, other_sums):
    dtype = "bfloat16"
    trainer = small_rate()
    run = config(method="full", adapter={}, dtype=dtype, trainer=trainer, eval_file=other_sums)
    folder = train.run(run)
    assert losses(folder).isfinite().all()
    load = transformers.AutoModelForCausalLM.from_pretrained
    base, model = load(llama_folder, dtype=getattr(torch, dtype)), load(folder.adapter)
    trained = dict(model.named_parameters())
    for name, value in base.named_parameters():
        assert trained[name].dtype == torch.float32
        moved = (trained[name] - value.float()).abs() > 1e-6
        if "layers" in name:
            assert moved.float().mean() > 0.9, name


def test_an_adapter_alone_leaves_the_forward_pass_as_it_is(config):
    prepared = initialize.adapt(settle(config(dtype="bfloat16")), "cpu")
    assert "forward" not in vars(prepared.model.get_base_model())
    trained = [p for p in prepared.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}


def test_a_float32_base_is_left_as_it_is(config):
    prepared = initialize.adapt(settle(config(method="full", adapter={})), "cpu")
    assert "forward" not in vars(prepared.model)


def test_a_widened_head_generates_too(config, sums):
    adapter = {"modules_to_save": ["lm_head", "embed_tokens"], "bias": "all"}
    setup = settle(config(method="lora", adapter=adapter, dtype="bfloat16"))
    model = initialize.adapt(setup, "cpu").model
    head = model.get_base_model().lm_head.modules_to_save["default"]
    assert head.weight.dtype == torch.float32
    assert 0 <= exact_match(model, setup.tokenizer, setup.train, 4) <= 1


def test_resumed_weights_of_a_widened_head_equal_uninterrupted_ones(
    config, interrupted, saved, tiny_bert_classifier, texts
):
    fields = {"model": saved(tiny_bert_classifier()), "task": "sst2", "dtype": "bfloat16", **texts}
    whole = train.run(config("whole", **fields))
    interrupted(config("cut", **fields), 3)
    resumed = train.run(config("cut", **fields, resume=True))
    states = [load_file(f.adapter / "adapter_model.safetensors") for f in (whole, resumed)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
