"""Every type of adapter that PEFT registers: trained, saved, reloaded and merged, or refused."""

import dataclasses
import functools

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from running import logits, prepare
from trl.trainer import sft_trainer

from support import train
from tlora.adapter.peft_types import KNOWN
from tlora.errors import ConfigError
from tlora.flags import field_docs
from tlora.registry import METHODS

TYPES = sorted(each.value.lower() for each in PEFT_TYPE_TO_CONFIG_MAPPING)
REFUSED = [kind for kind in TYPES if kind in KNOWN and KNOWN[kind].refused]
TRAINED = [kind for kind in TYPES if kind not in REFUSED]
every_type = pytest.mark.parametrize("kind", TRAINED)

SMALL = {
    "r": 2,
    "n_frequency": 20,
    "theta_d_length": 32,
    "encoder_hidden_size": 16,
    **dict.fromkeys(("alpha", "num_subspaces", "gralora_k", "adapter_layers"), 2),
    **dict.fromkeys(("block_size", "oft_block_size", "boft_block_size", "group_size"), 4),
    **dict.fromkeys(("u", "effective_rank", "vector_length", "num_virtual_tokens"), 4),
    **dict.fromkeys(("num_vectors", "adapter_len"), 8),
}
"""Options for models of width 16."""
OWN = {
    "oft": {"r": 0},
    "supertuning": {"r": None},
    "trainable_tokens": {"token_indices": list(range(3, 60))},
    "adamss": {"r": 8},
}


def options_of(kind):
    record = METHODS.load(f"peft:{kind}").options
    given = {name: value for name, value in SMALL.items() if name in record.field_names()}
    return record(task_type="CAUSAL_LM", **given | OWN.get(kind, {}))


@pytest.fixture(scope="session")
def trained(tiny_llama, batches_of, tmp_path_factory):
    """Prepare, train and save a type, once."""

    @functools.cache
    def run(kind):
        base = tiny_llama(initializer_range=0.2)
        loaded = [(p, p.detach().clone()) for p in base.parameters()]
        batch = batches_of("llama")[0]
        prepared = prepare(f"peft:{kind}", base, options_of(kind), None)
        model = prepared.model
        found = {
            "state": {name: value.clone() for name, value in model.state_dict().items()},
            "trains": {n: p.numel() for n, p in model.named_parameters() if p.requires_grad},
            "start": logits(model, batch),
            "before": model(**batch).loss.item(),
        }
        train(model, batch, steps=10, lr=2e-2 if kind in ("boft", "osf", "oft") else 1e-1)
        found |= {"after": model.eval()(**batch).loss.item(), "trained": logits(model, batch)}
        found["folder"] = tmp_path_factory.mktemp(kind)
        prepared.save(found["folder"])
        same = all(torch.equal(p, value) for p, value in loaded)
        return found | {"base is kept": same, "batch": batch}

    return run


@every_type
def test_its_options_are_pefts_fields_with_their_help(kind):
    record = METHODS.load(f"peft:{kind}").options
    names = {field.name for field in dataclasses.fields(record)}
    assert names == field_docs(record).keys()
    assert all(field_docs(record).values())
    config = options_of(kind).config()
    assert config.peft_type.value.lower() == kind
    assert names - {"task_type"} <= {field.name for field in dataclasses.fields(config)}
    with pytest.raises(ConfigError, match="there is no option `modules_to_adapt`"):
        record(modules_to_adapt=1)


@every_type
def test_it_starts_as_its_table_says(trained, tiny_llama, kind):
    run = trained(kind)
    before = logits(tiny_llama(initializer_range=0.2), run["batch"])
    start = run["start"][:, -before.shape[1] :]  # learned tokens have logits too
    same = torch.allclose(start, before, rtol=1e-5, atol=1e-5)
    assert same == (METHODS.load(f"peft:{kind}").traits.start != "moved")


@every_type
def test_what_trains_is_its_own_and_is_counted(trained, kind):
    run = trained(kind)
    traits = METHODS.load(f"peft:{kind}").traits
    assert sum(run["trains"].values()) > 0
    assert all(any(part in name for part in traits.trains) for name in run["trains"])
    assert run["base is kept"]


@every_type
def test_steps_lower_the_loss_and_move_the_output(trained, kind):
    run = trained(kind)
    assert run["after"] < 0.995 * run["before"]
    assert (run["trained"] - run["start"]).abs().max() > 1e-3


@every_type
def test_peft_reads_it_onto_the_loaded_base(trained, tiny_llama, kind):
    run = trained(kind)
    files = {path.name for path in run["folder"].iterdir()}
    assert files == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    again = peft.PeftModel.from_pretrained(tiny_llama(initializer_range=0.2), run["folder"])
    torch.testing.assert_close(logits(again, run["batch"]), run["trained"], rtol=1e-4, atol=1e-4)


@every_type
def test_peft_merges_it_or_cannot_as_the_table_says(trained, tiny_llama, kind):
    run = trained(kind)
    again = peft.PeftModel.from_pretrained(tiny_llama(initializer_range=0.2), run["folder"])
    if METHODS.load(f"peft:{kind}").traits.merges:
        merged = again.merge_and_unload().eval()
        torch.testing.assert_close(
            logits(merged, run["batch"]), run["trained"], rtol=1e-4, atol=1e-4
        )
    else:
        with pytest.raises((NotImplementedError, ValueError, AttributeError)):
            again.merge_and_unload()


@every_type
def test_it_is_prepared_the_same_from_the_same_seed(trained, tiny_llama, kind):
    again = prepare(f"peft:{kind}", tiny_llama(initializer_range=0.2), options_of(kind), None)
    state = again.model.state_dict()
    expected = trained(kind)["state"]
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, state[name]) for name, value in expected.items())


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_says_why(kind):
    with pytest.raises(ConfigError) as caught:
        METHODS.load(f"peft:{kind}")
    assert KNOWN[kind].refused in str(caught.value)


@pytest.mark.parametrize("kind", ["poly", "multitask_prompt_tuning"])
def test_types_of_many_tasks_do_not_run_on_rows(tiny_llama, batches_of, kind):
    config = peft.get_peft_config(
        {"peft_type": kind.upper(), "task_type": "CAUSAL_LM"}
        | ({"target_modules": "all-linear"} if kind == "poly" else {"num_virtual_tokens": 4})
    )
    model = peft.get_peft_model(tiny_llama(), config)
    with pytest.raises(ValueError, match="task_ids"):
        model(**batches_of("llama")[0])


def test_cpt_needs_the_logits_that_trl_does_not_form(tiny_llama, batches_of):
    ids = {"cpt_token_ids": [5, 6], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]}
    config = peft.CPTConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, **ids)
    model = peft.get_peft_model(tiny_llama(), config)
    batch = batches_of("llama")[0]
    assert model(**batch).loss.requires_grad
    sft_trainer.add_fused_lm_head(model.get_base_model(), outputs=("log_probs",))
    with pytest.raises(AttributeError, match="logits"):
        model(**batch, fused_lm_head=True)


def test_xlora_without_trained_adapters_is_the_base(tiny_llama, batches_of):
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=16)
    model = peft.get_peft_model(tiny_llama(use_cache=False), config)
    loss = model(**batches_of("llama")[0]).loss
    assert not loss.requires_grad
    assert torch.equal(loss, tiny_llama()(**batches_of("llama")[0]).loss)


def test_nothing_but_the_method_prunes_adalora(tiny_llama, batches_of):
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=4, target_r=1, total_step=5, target_modules="all-linear"
    )
    model = peft.get_peft_model(tiny_llama(), config)
    train(model, batches_of("llama")[0], steps=6)
    diagonals = [p for name, p in model.named_parameters() if "lora_E" in name]
    assert all((p != 0).all() for p in diagonals)


def test_ia3_scales_the_inputs_of_feedforward_modules_alone(tiny_llama):
    method = METHODS.load("peft:ia3")
    options = method.options(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"])
    model = method().prepare(tiny_llama(), options, None).model
    sizes = {
        name.split(".")[-3]: p.numel() for name, p in model.named_parameters() if "ia3" in name
    }
    assert sizes == {"k_proj": 8, "down_proj": 32}  # outputs, and inputs


def test_just_the_named_modules_are_adapted(tiny_llama):
    method = METHODS.load("peft:vera")
    options = method.options(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], layers_to_transform=1
    )
    model = method().prepare(tiny_llama(), options, None).model
    adapted = {n.partition(".vera_lambda")[0] for n, p in model.named_parameters() if "lambda" in n}
    assert adapted == {"base_model.model.model.layers.1.self_attn.q_proj"}


def test_wrong_options_are_one_error(tiny_llama):
    record = METHODS.load("peft:vera").options
    with pytest.raises(ConfigError) as caught:
        record(r="many", d_initial="few")
    assert {fault.split("`")[1] for fault in caught.value.faults} == {"r", "d_initial"}
    with pytest.raises(ConfigError, match=r"PEFT refuses these options: .*layers_to_transform"):
        record(layers_pattern=["layers"])
    with pytest.raises(ConfigError, match="`num_virtual_tokens` is missing"):
        METHODS.load("peft:prompt_tuning").options()
    with pytest.raises(ConfigError, match="`init_lora_weights` is 'pissa'"):
        METHODS.load("peft:lora").options(init_lora_weights="pissa")


def test_an_unknown_type_has_a_suggestion():
    with pytest.raises(ConfigError, match=r"PEFT has no type 'veera'. Did you mean 'vera'\?"):
        METHODS.load("peft:veera")


def test_a_type_that_is_not_in_the_table_works(tiny_llama, monkeypatch):
    from tlora.methods.anypeft import method_of

    monkeypatch.delitem(KNOWN, "vera")
    method = method_of.__wrapped__("vera")
    assert method.traits.arxiv is None
    assert method.traits.learning_rates.source.startswith("LoRA's")
    options = method.options(task_type="CAUSAL_LM", r=2)
    assert any(
        p.requires_grad for p in method().prepare(tiny_llama(), options, None).model.parameters()
    )


def test_a_base_is_counted_without_what_peft_adds(tiny_llama):
    from tlora.methods.learningrates import base_parameters

    for kind in ("vera", "prompt_tuning", "hra"):
        model = prepare(f"peft:{kind}", tiny_llama(), options_of(kind), None).model
        assert base_parameters(model) == base_parameters(tiny_llama())
