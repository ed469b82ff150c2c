"""`--quantization`: a run on a base that is quantized while it is loaded."""

import importlib.util
import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import quantized_bases
from support import distance
from tlora import AdapterPlan
from tlora.errors import ConfigError
from tlora.training import train
from tlora.training.runconfig import RunConfig
from tlora.training.setup import settle


@pytest.fixture(scope="module")
def folder(saved, tiny_llama):
    return saved(tiny_llama(hidden_size=64, intermediate_size=128, initializer_range=0.2))


def kinds(model):
    return {type(m).__name__ for name, m in model.named_modules() if name.endswith("_proj")}


@pytest.mark.parametrize(
    ("form", "dtype", "wanted"),
    [("nf4", "auto", torch.float32), ("int8", "bfloat16", torch.bfloat16)],
)
def test_the_model_is_loaded_quantized(config, folder, form, dtype, wanted):
    setup = settle(config(model=folder, quantization=form, dtype=dtype))
    model = setup.load_model(torch.device("cpu"))
    assert kinds(model) == {{"nf4": "Linear4bit", "int8": "Linear8bitLt"}[form]}
    assert model.model.norm.weight.dtype == model.lm_head.weight.dtype == wanted
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.dtype == {"nf4": torch.uint8, "int8": torch.int8}[form]
    if form == "nf4":
        assert layer.compute_dtype == wanted
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested) == ("nf4", True)


def test_auto_computes_in_the_checkpoints_precision(config, saved, tiny_llama):
    folder = saved(tiny_llama(hidden_size=64).to(torch.bfloat16))
    model = settle(config(model=folder, quantization="nf4")).load_model("cpu")
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16


def test_none_loads_what_is_there(config, folder, tmp_path):
    assert kinds(settle(config(model=folder)).load_model("cpu")) == {"Linear"}
    quantized_bases.nf4(folder).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert kinds(settle(config(model=str(tmp_path))).load_model("cpu")) == {"Linear4bit"}
    again = settle(config(model=str(tmp_path), quantization="int8"))
    with pytest.raises(ConfigError, match=r"is already quantized; remove `quantization`"):
        again.load_model("cpu")


@pytest.mark.parametrize(("form", "dtype"), [("nf4", "float32"), ("int8", "bfloat16")])
def test_a_run_trains_b_and_peft_loads_the_adapter(config, other_sums, folder, form, dtype):
    trainer = {
        "max_steps": 15,
        "learning_rate": 0.05,
        "save_strategy": "no",
        # Evaluations in between, from which bitsandbytes would rewrite the weights.
        "eval_strategy": "steps",
        "eval_steps": 5,
    }
    fields = {"model": folder, "quantization": form, "dtype": dtype, "trainer": trainer}
    run = train.run(config(eval_file=other_sums, **fields))

    assert run.config()["quantization"] == form
    log = [json.loads(line) for line in run.log.read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    plan = AdapterPlan.load(run.plan)
    weights = load_file(run.adapter / "adapter_model.safetensors")
    for name, module in plan.modules.items():
        a = weights[f"base_model.model.{name}.lora_A.weight"]
        # TRL casts B to bfloat16 on a quantized base, and A goes with it.
        assert torch.equal(a, module.lora_A.to(torch.bfloat16))
        assert weights[f"base_model.model.{name}.lora_B.weight"].any()
    ids = torch.tensor([[5, 6, 7, 8]])
    base = quantized_bases.load(folder, form, dtype=dtype).train()
    before = base(ids).logits
    after = peft.PeftModel.from_pretrained(base, run.adapter).train()(ids).logits
    assert distance(after, before) > 0.05


def test_a_resumed_run_ends_in_the_same_weights(config, folder, interrupted):
    fields = {"model": folder, "quantization": "nf4"}
    whole = train.run(config("whole", **fields))
    interrupted(config("cut", **fields), 3)
    resumed = train.run(config("cut", resume=True, **fields))

    name = "adapter_model.safetensors"
    assert (resumed.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()


def test_a_classifiers_new_head_is_trained_in_full(config, folder, tmp_path):
    rows = tmp_path / "train.tsv"
    lines = [f"{'good' if n % 2 else 'bad'} {n}\t{n % 2}" for n in range(12)]
    rows.write_text("sentence\tlabel\n" + "\n".join(lines))
    fields = {"model": folder, "quantization": "nf4", "task": "sst2", "train_file": str(rows)}
    fields |= {"trainer": {"max_steps": 2}}
    model = settle(config(**fields)).load_model("cpu")
    assert type(model.score) is torch.nn.Linear

    run = train.run(config(**fields))

    weights = load_file(run.adapter / "adapter_model.safetensors")
    assert not torch.equal(weights["base_model.model.score.weight"], model.score.weight)
    assert any(value.any() for name, value in weights.items() if "lora_B" in name)


def test_an_unknown_quantization_is_named():
    with pytest.raises(ConfigError, match=r"`quantization` is 'nf5'; choose one of 'none', 'nf4'"):
        RunConfig(quantization="nf5")


def test_without_bitsandbytes_it_says_what_to_install(config, folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    with pytest.raises(
        ConfigError, match=r'bitsandbytes is not installed; run `pip install "\.\[quantized\]"`'
    ):
        settle(config(model=folder, quantization="nf4"))
