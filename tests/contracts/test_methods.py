"""What every registered method promises, held against what it does."""

import contextlib
import dataclasses
import json
import re

import pytest
import torch
from running import PUBLIC_RUNS, RUNS, logits, prepare, small_options
from safetensors.torch import load_file

from tlora.adapter import rite
from tlora.errors import ConfigError
from tlora.flags import field_docs
from tlora.registry import METHODS

NAMES = METHODS.names()
every_method = pytest.mark.parametrize("name", NAMES)
every_run = pytest.mark.parametrize(("name", "kind"), RUNS)
every_public_run = pytest.mark.parametrize(("name", "kind"), PUBLIC_RUNS)


@every_method
def test_it_says_what_it_is(name):
    traits = METHODS.load(name).traits
    assert traits.title
    assert re.fullmatch(r"\d{4}\.\d{4,5}", traits.arxiv)
    assert 2018 < traits.year < 2100
    assert f"20{traits.arxiv[:2]}" == str(traits.year)
    assert "Source:" in METHODS.load(name).__doc__
    assert traits.arxiv in METHODS.load(name).__doc__


@every_method
def test_every_option_has_its_help_and_an_unknown_one_a_suggestion(name):
    record = METHODS.load(name).options
    names = {field.name for field in dataclasses.fields(record)}
    assert names == field_docs(record).keys()
    assert record(task_type="SEQ_CLS").task_type == "SEQ_CLS"
    for option in names:
        with pytest.raises(ConfigError, match=f"there is no option `{option}s`.*'{option}'"):
            record(**{f"{option}s": 1})


@every_method
def test_options_out_of_range_are_reported_together(name):
    record = METHODS.load(name).options
    wrong = {}
    for field in dataclasses.fields(record):
        if isinstance(field.default, (int, float)):
            wrong[field.name] = "many"
    if wrong:
        with pytest.raises(ConfigError) as caught:
            record(**wrong)
        assert {fault.split("`")[1] for fault in caught.value.faults} == wrong.keys()


@every_run
def test_the_output_at_the_start_is_the_base_models(ran, batches_of, name, kind):
    run = ran(name, kind)
    before = logits(run.base, batches_of(kind)[0])
    if run.traits.start == "identical":
        assert torch.equal(run.start, before)
    elif run.traits.start == "moved":
        assert 0 < (run.start - before).abs().max() < before.abs().max()
    else:
        torch.testing.assert_close(run.start, before, rtol=1e-5, atol=1e-5)


@every_run
def test_what_it_says_trains_and_nothing_else(ran, name, kind):
    run = ran(name, kind)
    own = {key: size for key, size in run.trains.items() if "modules_to_save" not in key}
    for part in run.traits.trains:
        assert any(part in key for key in own)
    assert all(any(part in key for part in run.traits.trains) for key in own)
    assert run.with_gradient <= run.trains.keys()


@every_run
def test_other_optimizers_take_over_what_it_says(ran, name, kind):
    run = ran(name, kind)
    own = getattr(run.options, "own_optimizer", False)
    assert own == (run.prepared.optimizer is not None)
    if "lora_B" not in run.traits.trains:
        return
    refusal = contextlib.nullcontext() if run.traits.plain else pytest.raises(ConfigError)
    with refusal:
        rite._factors(run.prepared.model)


@every_run
def test_the_base_weights_are_left_alone_where_that_is_promised(ran, name, kind):
    run = ran(name, kind)
    after = _base_weights(run.prepared.model.state_dict())
    loaded = run.base.state_dict()
    assert after.keys() == loaded.keys()
    same = all(torch.equal(value, loaded[key]) for key, value in after.items())
    assert same == (not run.traits.changes_base)
    if run.traits.leaves == "adapter":
        prepared = _base_weights(run.at_start)
        assert all(torch.equal(value, prepared[key]) for key, value in after.items())


def _base_weights(state):
    """The base's own weights in a PeftModel's state, by their names in the base model."""
    found = {}
    for key, value in state.items():
        if "lora_" in key or "modules_to_save" in key or "ranknum" in key:
            continue
        name = key.removeprefix("base_model.model.")
        found[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = value
    return found


@every_run
def test_no_hook_and_no_gradient_is_left_on_the_model(ran, name, kind):
    assert ran(name, kind).leftovers == []


@every_run
def test_ten_steps_lower_the_loss(ran, name, kind):
    losses = ran(name, kind).losses
    assert len(losses) == 10
    assert sum(losses[-3:]) < 0.99 * sum(losses[:3])


@every_public_run
def test_what_is_saved_is_a_plain_folder(ran, name, kind):
    run = ran(name, kind)
    files = {path.name for path in run.folder.iterdir()}
    if run.traits.leaves == "model":
        assert {"config.json", "model.safetensors"} <= files
        return
    assert files == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((run.folder / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    rank = getattr(run.options, "r", None)
    found = "DoRA" if config["use_dora"] else config["peft_type"]
    expected = {"r": rank, "2 r": 2 * (rank or 0), "r_i": config["r"]}
    saved, _, words = run.traits.saved.partition(" of rank ")
    assert (found.lower(), config["r"]) == (saved.lower(), expected.get(words, config["r"]))
    stems = r"lora_(A|B)\.weight|lora_magnitude_vector|lora_(A|B|E)|classifier\.(weight|bias)"
    tensors = load_file(run.folder / "adapter_model.safetensors")
    assert all(re.search(rf"\.({stems})$", key) for key in tensors)
    assert any("classifier" in key for key in tensors) == (kind == "bert")


@every_public_run
def test_peft_alone_reads_it_onto_the_original_base(ran, read_by_peft, name, kind):
    run = ran(name, kind)
    assert (run.trained - run.start).abs().max() > 0.01
    torch.testing.assert_close(read_by_peft[f"{name}-{kind}"], run.trained, rtol=1e-4, atol=1e-4)


@every_public_run
def test_peft_alone_merges_it(ran, read_by_peft, name, kind):
    torch.testing.assert_close(
        read_by_peft[f"{name}-{kind}.merged"], ran(name, kind).trained, rtol=1e-4, atol=1e-4
    )


class _Unread:
    """Batches that must not be looked at."""

    def __iter__(self):
        raise AssertionError("the batches were read")


@every_method
def test_it_reads_the_batches_only_where_it_says_so(make_model, batches_of, name):
    method = METHODS.load(name)()
    options = small_options(method, "CAUSAL_LM")
    if method.traits.reads == "nothing":
        prepare(name, make_model("llama"), options, _Unread())
    else:
        with pytest.raises(AssertionError, match="the batches were read"):
            prepare(name, make_model("llama"), options, _Unread())


@every_run
def test_a_resumed_run_is_prepared_the_same(ran, make_model, batches_of, tmp_path, name, kind):
    from tlora.training.runfolder import RunFolder

    run = ran(name, kind)
    folder = RunFolder(tmp_path / "run")
    folder.start({"seed": 5}, "train", run.prepared.plan)
    plan = folder.saved_plan()
    assert (plan is None) == (run.prepared.plan is None)
    batches = batches_of(kind) if plan is None else _Unread()
    again = prepare(name, make_model(kind), run.options, batches, plan)
    state = again.model.state_dict()
    assert state.keys() == run.at_start.keys()
    assert all(torch.equal(state[key], value) for key, value in run.at_start.items())
    trains = {n: p.numel() for n, p in again.model.named_parameters() if p.requires_grad}
    assert trains == run.trains
    assert [type(c) for c in again.callbacks] == [type(c) for c in run.prepared.callbacks]
