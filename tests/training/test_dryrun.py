"""A dry run says beforehand what a run turns out to be.

Parameters, weights, adapter, optimizer states and second moments to the byte; activations, which
are by formula, within a third.
"""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers

import moe
import tlora
from support import LLAMA_2_7B
from tlora import cli
from tlora.errors import ConfigError
from tlora.linalg.packed import packed_numbers
from tlora.report.estimate import fits_in, show
from tlora.tasks.dataconfig import DataConfig
from tlora.training import dryrun
from tlora.training.dryrun import adapter_parameters
from tlora.training.precision import widen
from tlora.training.runconfig import RunConfig

GIB = 2**30
LLAMA = LLAMA_2_7B | {"dtype": "bfloat16"}


@pytest.fixture
def folder(tmp_path):
    """Write a folder with nothing but a config."""

    def write(config):
        if not isinstance(config, dict):
            config.architectures = config.architectures or None
            config = config.to_dict()
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        return str(tmp_path / "model")

    return write


def predict(path, kind=None, **fields):
    adapter = {"r": 2, "lora_alpha": 2} | fields.pop("adapter", {})
    data = DataConfig(kind=kind, max_length=fields.pop("max_length", 8))
    config = RunConfig(model=path, data=data, adapter=adapter, **fields)
    return dryrun.run(config)


def ready(model, folder):
    model.config.architectures = [type(model).__name__]
    return folder(model.config)


def saved_bytes(model, batch):
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).loss
    del loss
    return sum(storage.nbytes() for place, storage in kept.items() if place not in own)


SMALL = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CAUSAL = {
    "llama": transformers.LlamaConfig(**SMALL),
    "qwen3": transformers.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=32),
    "gemma2": transformers.Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=32),
    "mistral": transformers.MistralConfig(**SMALL, num_key_value_heads=2),
    "gpt2": transformers.GPT2Config(
        n_embd=128, n_layer=3, n_head=4, vocab_size=64, attn_pdrop=0.0, resid_pdrop=0.0
    ),
    "mixtral": transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4),
}
LABELED = {
    "bert": transformers.BertConfig(**SMALL, **NO_DROPOUT),
    "roberta": transformers.RobertaConfig(**SMALL, **NO_DROPOUT),
    "deberta": transformers.DebertaV2Config(**SMALL),  # no fused kernel
}
TEXT_TO_TEXT = {
    "t5": transformers.T5Config(
        d_model=128,
        d_ff=320,
        num_layers=3,
        num_heads=4,
        d_kv=32,
        vocab_size=64,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    ),
    "bart": transformers.BartConfig(
        d_model=128,
        encoder_ffn_dim=320,
        decoder_ffn_dim=320,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        vocab_size=64,
        dropout=0.0,
    ),
}
CONFIGS = {
    **{name: (c, None, transformers.AutoModelForCausalLM) for name, c in CAUSAL.items()},
    **{
        name: (c, "classification", transformers.AutoModelForSequenceClassification)
        for name, c in LABELED.items()
    },
    **{
        name: (c, "seq2seq", transformers.AutoModelForSeq2SeqLM) for name, c in TEXT_TO_TEXT.items()
    },
}


def of_config(name, dtype):
    """A small model of a family, its kind and a batch of 4 x 64 tokens, of which one is padding."""
    config, kind, auto = CONFIGS[name]
    model = auto.from_config(config, dtype=getattr(torch, dtype))
    ids = torch.randint(3, 60, (4, 64))
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    labels = torch.zeros(4, dtype=torch.long) if kind == "classification" else ids
    return model, kind, {"input_ids": ids, "attention_mask": mask, "labels": labels}


def backward_bytes(batch):
    """The part of the activations that is made when the loss is differentiated."""
    return 2 * 4 * batch["labels"].numel() * 64 if batch["labels"].dim() == 2 else 0


TASK_TYPES = {None: "CAUSAL_LM", "classification": "SEQ_CLS", "seq2seq": "SEQ_2_SEQ_LM"}
SIZE = {"trainer": {"per_device_train_batch_size": 4}, "max_length": 64}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {}),
        ("bert", {"freeze_a": False, "bias": "all"}),
        ("bert", {"bias": "lora_only"}),
        ("t5", {}),
    ],
)
def test_the_parameters_that_train_are_those_of_the_attached_model(folder, name, fields):
    model, kind, batch = of_config(name, "float32")
    fields = fields | {"allocate_rank": False}
    dry = predict(ready(model, folder), kind, adapter=fields)
    ours, lora, full = dry.training
    assert full.trainable == sum(p.numel() for p in model.parameters())
    config = tlora.TLoraConfig(r=2, lora_alpha=2, task_type=TASK_TYPES[kind], **fields)
    adapted = tlora.get_tlora_model(model, config, [batch], progress=False)
    assert ours.trainable == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    if kind != "classification":
        stock = peft.LoraConfig(r=2, target_modules="all-linear", task_type=TASK_TYPES[kind])
        assert lora.trainable == peft.get_peft_model(adapted.unload(), stock).num_parameters(True)


@pytest.mark.filterwarnings("ignore:.*fused")  # experts are left out
@pytest.mark.parametrize(
    ("name", "dtype"), [("llama", "float32"), *((name, "bfloat16") for name in CONFIGS)]
)
def test_activations_are_within_a_third_of_those_that_autograd_keeps(folder, name, dtype):
    model, kind, batch = of_config(name, dtype)
    adapter = {"r": 8, "lora_alpha": 8}
    dry = predict(ready(model, folder), kind, dtype=dtype, adapter=adapter, **SIZE)
    task_type = TASK_TYPES[kind]
    names = [target.name for target in dry.targets]
    ways = {
        "tlora": tlora.TLoraConfig(r=8, lora_alpha=8, task_type=task_type),
        "lora": peft.LoraConfig(r=8, target_modules=names, task_type=task_type),
    }
    for found in dry.training[:2]:
        base = copy.deepcopy(model)
        if found.name == "tlora":
            adapted = tlora.get_tlora_model(base, ways["tlora"], [batch], progress=False)
        else:
            adapted = peft.get_peft_model(base, ways["lora"])
        kept = found.activations - backward_bytes(batch)
        assert 3 / 4 < kept / saved_bytes(adapted.train(), batch) < 4 / 3, found.name


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_activations_of_full_training_are_within_a_third(folder, name):
    model, kind, batch = of_config(name, "float32")
    full = predict(ready(model, folder), kind, **SIZE).training[2]
    kept = full.activations - backward_bytes(batch)
    assert 3 / 4 < kept / saved_bytes(model.train(), batch) < 4 / 3


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_activations_with_gradient_checkpointing_are_within_a_factor(folder, name):
    """Autograd keeps the layers' inputs; the layer that is run again comes on top."""
    model, kind, batch = of_config(name, "float32")
    full = predict(ready(model, folder), kind, **SIZE).training[2]
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    measured = saved_bytes(model, batch)
    model.gradient_checkpointing_disable()
    whole = saved_bytes(model, batch)
    kept = full.checkpointed - backward_bytes(batch)
    assert measured < kept < 4 / 3 * (measured + whole / 3)


@pytest.mark.parametrize(("name", "dtype"), [("llama", "bfloat16"), ("bert", "float32")])
def test_weights_adapter_and_optimizer_are_those_of_the_attached_model_to_the_byte(
    folder, name, dtype
):
    model, kind, batch = of_config(name, dtype)
    dry = predict(ready(model, folder), kind, dtype=dtype, adapter={"allocate_rank": False})
    config = tlora.TLoraConfig(r=2, lora_alpha=2, allocate_rank=False, task_type=TASK_TYPES[kind])
    assert dry.calibration.weights == byte_count(model.parameters())
    adapted = tlora.get_tlora_model(model, config, [batch], progress=False)
    widen(adapted)
    found = dry.training[0]
    assert found.weights == byte_count(adapted.parameters())
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert found.gradients == byte_count(trained)
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [t for each in optimizer.state.values() for n, t in each.items() if n != "step"]
    assert found.optimizer == byte_count(states)


def byte_count(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.filterwarnings("ignore:.*fused")  # experts are left out
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("qwen3", {}),
        ("t5", {}),
        ("mixtral", {}),
        ("llama", {"basis": "gradient-covariance"}),
    ],
)
def test_second_moments_are_those_of_a_calibration_to_the_byte(folder, name, fields):
    model, kind, batch = of_config(name, "bfloat16")
    dry = predict(ready(model, folder), kind, dtype="bfloat16", adapter=fields)
    config = tlora.TLoraConfig(r=2, lora_alpha=2, task_type=TASK_TYPES[kind], **fields)
    stats = tlora.calibrate(model, [batch], config, progress=False)
    moments = {id(m.moment): 4 * packed_numbers(m.d_in) for m in stats.modules.values()}
    gradients = 4 * sum(m.d_in * m.d_out for m in stats.modules.values()) if fields else 0
    assert dry.strategy.held == sum(moments.values()) + gradients


def test_llama_2_7b_has_the_figures_of_the_paper(folder):
    dry = predict(folder(LLAMA), adapter={"r": 128, "lora_alpha": 128}, max_length=512)
    ours, lora, full = dry.training
    assert ours.trainable == 174_063_616
    assert lora.trainable == 319_815_680
    assert full.trainable == 6_738_415_616
    assert dry.strategy.held / 2**30 == pytest.approx(10.57, abs=0.01)
    assert len(dry.targets) == 224
    assert len(set(dry.sources.values())) == 128


def test_fused_experts_are_named(folder):
    config = transformers.MixtralConfig(num_hidden_layers=2)
    config.architectures = ["MixtralForCausalLM"]
    dry = predict(folder(config), max_length=16)
    assert {m.name.rpartition(".")[2] for m in dry.targets} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    assert any("target_parameters=['experts.gate_up_proj'" in note for note in dry.notes)


@pytest.mark.parametrize(("dtype", "frozen"), [("float32", False), ("bfloat16", True)])
def test_named_experts_are_counted_as_the_attached_model_has_them(folder, dtype, frozen):
    model = moe.mixtral(hidden_size=64, intermediate_size=128, vocab_size=32)
    model = model.to(getattr(torch, dtype))
    adapter = {"r": 8, "lora_alpha": 8, "freeze_a": frozen, "target_parameters": moe.BOTH}
    dry = predict(ready(model, folder), dtype=dtype, adapter=adapter, **SIZE)
    ids = torch.randint(3, 30, (4, 64))
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    batch = {"input_ids": ids, "labels": ids, "attention_mask": mask}
    config = tlora.TLoraConfig(**adapter, allocate_rank=False)
    adapted = tlora.get_tlora_model(model, config, [batch], progress=False).train()

    assert dry.training[0].trainable == adapted.num_parameters(only_trainable=True)
    assert len(dry.targets) == 2 * (4 + 2 * moe.EXPERTS)


def test_a_model_without_a_head_for_the_task_is_refused(tiny_t5, folder):
    with pytest.raises(ConfigError, match="cannot be loaded: Unrecognized configuration"):
        predict(ready(tiny_t5(), folder))


def test_another_method_is_shown_with_the_options_it_shares(folder):
    path = folder(LLAMA | {"num_hidden_layers": 1})
    dry = predict(path, method="lora", adapter={"r": 4, "target_modules": ["q_proj"]})
    assert [m.name for m in dry.targets] == ["model.layers.0.self_attn.q_proj"]
    assert adapter_parameters(dry.targets, dry.ranks, frozen_a=False) == dry.training[1].trainable


def test_streaming_is_counted_and_said(folder, capsys):
    config = LLAMA | {"num_hidden_layers": 1}
    dry = predict(folder(config), adapter={"covariance": "streamed"})
    assert dry.strategy.passes == 4
    show(dry)
    said = " ".join(capsys.readouterr().out.split())
    assert "of 7 modules; it reads the samples 4 times and holds" in said


def test_a_checkpoint_that_is_quantized_already_is_said_not_to_be_counted(folder):
    named = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    dry = predict(folder(LLAMA | {"num_hidden_layers": 1} | named))
    assert any("savings are not counted" in note for note in dry.notes)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"trainer": {"per_device_train_batchsize": 4}}, "per_device_train_batch_size"),
        ({"adapter": {"target_modules": ["q_prj"]}}, "q_proj"),
    ],
)
def test_a_wrong_field_is_met_as_in_a_run(folder, fields, sentence):
    with pytest.raises(ConfigError, match=sentence):
        predict(folder(LLAMA | {"num_hidden_layers": 1}), **fields)


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        predict(str(tmp_path))
    with pytest.raises(ConfigError, match="model"):
        predict(None)


@pytest.mark.parametrize(
    ("size", "text"),
    [(1, "8 GiB"), (24 * GIB, "24 GiB"), (24 * GIB + 1, "32 GiB"), (10**13, "several GPUs")],
)
def test_what_it_fits_in_is_a_usual_memory(size, text):
    assert fits_in(size) == text


@pytest.mark.parametrize("flag", ["--dry_run", "--dry-run", "--dry-run=true"])
def test_the_command_reads_no_weights_and_writes_nothing(
    folder, flag, tmp_path, monkeypatch, capsys
):
    path = folder(LLAMA | {"num_hidden_layers": 2})
    weights = Path(path) / "model.safetensors"
    weights.write_bytes(b"not weights")
    monkeypatch.chdir(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    assert cli.main(["init", "--model", path, flag]) == 0
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before
    out = capsys.readouterr().out
    for word in (
        "q_proj",
        "tlora",
        "lora",
        "full",
        "second moments",
        "peak",
        "fits in",
        "AdamW states",
    ):
        assert word in out


def test_a_printed_configuration_serves_the_other_verbs(capsys):
    assert cli.main(["init", "--model", "m", "--dry_run", "--print_config"]) == 0
    assert "dry_run" not in capsys.readouterr().out
