"""A chain equals training each link on weights that hold the links before it."""

import dataclasses
import types

import pytest
import torch
import transformers
from safetensors.torch import load_file

import quantized_bases
from support import causal_samples, classified_samples, in_batches
from tlora.adapter.chain import finished_links, merged_base
from tlora.adapter.freeze import lora_layers
from tlora.errors import ConfigError
from tlora.registry import METHODS

STEPS, LENGTH = 5, 3
SHARES = [2, 2, 1]
"""Steps of each link: the next one starts after step 2, where 2 x 3 // 5 = 1, and after 4."""


@pytest.fixture
def batches():
    return in_batches(causal_samples((9, 8, 10, 7, 12, 6)), 3)


def prepared_by(name, model, batches, **options):
    method = METHODS.load(name)()
    torch.manual_seed(5)
    record = method.options(**{"task_type": "CAUSAL_LM", "r": 2, "length": LENGTH} | options)
    return method.prepare(model, record, batches)


class Starts(transformers.TrainerCallback):
    """Notes A of each link as it starts, and how much of the optimizer's state there then is."""

    def __init__(self):
        self.seen, self.states = [], []

    def on_train_begin(self, args, state, control, model=None, **_):
        layers = lora_layers(model.base_model.model)
        self.seen.append({n: la.lora_A["default"].newest.detach().clone() for n, la in layers})

    def on_step_end(self, args, state, control, model=None, optimizer=None, **_):
        if finished_links(model) == len(self.seen):
            self.on_train_begin(args, state, control, model)
            self.states.append(len(optimizer.state))


def train(prepared, batch, folder, steps=STEPS, callbacks=(), **fields):
    rows = [{key: value[i] for key, value in batch.items()} for i in range(len(batch["labels"]))]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=len(rows),
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
        **fields,
    )
    trainer = transformers.Trainer(
        model=prepared.model,
        args=arguments,
        train_dataset=rows,
        callbacks=[*prepared.callbacks, *callbacks],
    )
    trainer.train()


def merged_by_hand(model, batch, starts, scale, trains_a):
    """Train each link by itself on dense weights, and add s B A to them; return the weights."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = 0
    for start, share in zip(starts, SHARES, strict=True):
        link = {}
        for name, a in start.items():
            b = torch.zeros(len(weights[f"{name}.weight"]), len(a), dtype=a.dtype)
            link[name] = (a.clone().requires_grad_(trains_a), b.requires_grad_())
        moving = [part for pair in link.values() for part in pair if part.requires_grad]
        optimizer = torch.optim.AdamW(moving, weight_decay=0.0)
        for _ in range(share):
            parts = {
                f"{n}.weight": weights[f"{n}.weight"] + scale * b @ a for n, (a, b) in link.items()
            }
            loss = torch.func.functional_call(model, weights | parts, (), dict(batch)).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(moving, 1.0)
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / STEPS)  # one schedule for all
            optimizer.step()
            step += 1
        with torch.no_grad():
            for name, (a, b) in link.items():
                weights[f"{name}.weight"] += scale * b @ a
    return weights


@pytest.mark.parametrize(
    ("name", "link", "trains_a"),
    [("xgblora", "lora", True), ("rac-lora", "lora-fa", False), ("rac-lora", "tlora", False)],
)
def test_it_equals_merging_each_link_into_dense_weights(
    tiny_llama, batches, tmp_path, name, link, trains_a
):
    model = tiny_llama(initializer_range=0.2).double()
    fresh = tiny_llama(initializer_range=0.2).double()
    starts = Starts()
    prepared = prepared_by(name, model, batches, link=link, lora_alpha=3.0)
    train(prepared, batches[0], tmp_path / "trainer", callbacks=[starts])
    assert starts.states == [0, 0]
    prepared.save(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    expected = merged_by_hand(fresh, batches[0], starts.seen, 1.5, trains_a)
    base = dict(fresh.named_parameters())
    for module in starts.seen[0]:
        a, b = (saved[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        assert a.shape[0] == b.shape[1] == 2 * LENGTH
        weight = f"{module}.weight"
        change = (expected[weight] - base[weight]).detach()
        assert change.norm() > 1e-3 * base[weight].norm()
        torch.testing.assert_close(1.5 * b @ a, change, rtol=1e-6, atol=1e-9)


class Counted:
    """Batches that count how often they are read."""

    def __init__(self, batches):
        self.batches, self.reads = batches, 0

    def __iter__(self):
        self.reads += 1
        return iter(self.batches)


def test_the_calibration_batches_are_read_once(tiny_llama, batches, tmp_path):
    counted = Counted(batches)
    prepared = prepared_by("rac-lora", tiny_llama(), counted, link="tlora")
    assert counted.reads == 1
    train(prepared, batches[0], tmp_path, steps=LENGTH)
    assert finished_links(prepared.model) == LENGTH - 1
    assert counted.reads == 1


def test_a_calibrated_link_goes_by_the_weights_with_the_links_before_it(
    tiny_llama, batches, tmp_path
):
    starts = Starts()
    prepared = prepared_by("rac-lora", tiny_llama(initializer_range=0.2), batches, link="tlora")
    train(prepared, batches[0], tmp_path, steps=LENGTH, callbacks=[starts])
    # Undo the last link, which has trained since: what it started from is the merged rest.
    for _, layer in lora_layers(prepared.model):
        torch.nn.init.zeros_(layer.lora_B["default"].newest)
    method = METHODS.load("tlora")()
    with merged_base(prepared.model) as base:
        merged = {name: p.detach().clone() for name, p in base.named_parameters()}
    plain = tiny_llama(initializer_range=0.2)
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    plain.load_state_dict(merged)
    assert not torch.equal(
        merged["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"]
    )
    options = method.options(
        task_type="CAUSAL_LM", r=2, lora_alpha=1, allocate_rank=False, allocate_scale=False
    )
    plan = method.plan(plain, options, batches)
    for name, module in plan.modules.items():
        torch.testing.assert_close(starts.seen[-1][name], module.lora_A, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(starts.seen[0][name], module.lora_A, atol=1e-3)


def test_merging_the_base_for_a_look_leaves_the_model_as_it_was(tiny_llama, batches):
    model = prepared_by("xgblora", tiny_llama(), batches).model
    for _, layer in lora_layers(model):
        torch.nn.init.ones_(layer.lora_B["default"].newest)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    inputs = {key: value for key, value in batches[0].items() if key != "labels"}
    expected = model.eval()(**inputs).logits
    with pytest.raises(KeyError), merged_base(model) as base:
        torch.testing.assert_close(base(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
        raise KeyError
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(model(**inputs).logits, expected)


def test_peft_merges_every_link_of_a_model_as_it_trains(tiny_llama, batches, tmp_path):
    prepared = prepared_by("xgblora", tiny_llama(initializer_range=0.2), batches)
    train(prepared, batches[0], tmp_path, steps=LENGTH)
    inputs = {key: value for key, value in batches[0].items() if key != "labels"}
    expected = prepared.model.eval()(**inputs).logits
    merged = prepared.model.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_dropout_meets_the_newest_link_alone(tiny_llama, batches):
    prepared = prepared_by("rac-lora", tiny_llama(), batches, lora_dropout=0.9)
    layer = next(layer for _, layer in lora_layers(prepared.model)).train()
    a = layer.lora_A["default"]
    a.finished.normal_()
    x = torch.randn(4, a.newest.shape[1])
    z = layer.lora_A["default"](layer.lora_dropout["default"](x))
    torch.testing.assert_close(z[:, 2:], x @ a.finished.T)
    assert not torch.allclose(z[:, :2], x @ a.newest.T)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"link": "lroa"}, "`link` 'lroa': there is no method 'lroa'. Did you mean"),
        ({"link": "pissa"}, "`link` is 'pissa', which is not a plain LoRA beside W"),
        ({"link": "mica"}, "`link` is 'mica', which is not a plain LoRA beside W that trains B"),
        ({"link": "dora"}, "`link` is 'dora', which is not a plain LoRA beside W"),
        ({"link": "eva"}, "`link` is 'eva', which cannot start again from a model during"),
        ({"link": "lora", "link_options": {"rr": 1}}, "`link` 'lora': there is no option `rr`"),
        ({"link": "dylora"}, "`link` is 'dylora', which is not a plain LoRA beside W"),
        ({"link": "loraplus"}, "`link` is 'loraplus', which brings an optimizer"),
        ({"link": "lora-rite"}, "`link` is 'lora-rite', which brings an optimizer"),
        ({"link": "lora-fa", "link_options": {"projected": True}}, "which brings an optimizer"),
        (
            {"link": "tlora", "link_options": {"scale_rule": "released", "allocate_scale": True}},
            "`link` is 'tlora', which has `allocate_scale`",
        ),
        (
            {"link": "tlora", "link_options": {"target_parameters": ["experts.down_proj"]}},
            "`link` is 'tlora', which has `target_parameters`",
        ),
    ],
)
@pytest.mark.parametrize("name", ["xgblora", "rac-lora"])
def test_what_is_no_link_is_refused_with_the_other_options(name, fields, fault):
    with pytest.raises(ConfigError, match=fault):
        METHODS.load(name).options(**fields)


def test_a_run_of_fewer_steps_than_links_is_refused_before_it_trains(tiny_llama, batches, tmp_path):
    prepared = prepared_by("xgblora", tiny_llama(), batches, length=4)
    with pytest.raises(ConfigError, match="more than the run's optimizer steps"):
        train(prepared, batches[0], tmp_path, steps=3)
    matrices = (p for n, p in prepared.model.named_parameters() if ".lora_B." in n)
    assert not any(matrix.any() for matrix in matrices)


def test_as_many_steps_as_links_train_a_link_a_step(tiny_llama, batches, tmp_path):
    starts = Starts()
    prepared = prepared_by("xgblora", tiny_llama(), batches, length=3)
    train(prepared, batches[0], tmp_path, steps=3, callbacks=[starts])
    assert len(starts.seen) == 3
    prepared.save(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert {len(a) for name, a in saved.items() if "lora_A" in name} == {6}


def test_other_shares_than_the_links_have_had_are_refused(tiny_llama, batches, tmp_path):
    prepared = prepared_by("rac-lora", tiny_llama(), batches)
    train(prepared, batches[0], tmp_path)
    with pytest.raises(
        ConfigError, match="2 links are finished, and after 0 of 9 steps it should be 0"
    ):
        train(prepared, batches[0], tmp_path, steps=9)


def test_deepspeed_is_refused(tiny_llama, batches):
    *_, chain = prepared_by("rac-lora", tiny_llama(), batches).callbacks
    with pytest.raises(ConfigError, match="DeepSpeed trains copies of the adapter"):
        chain.on_train_begin(types.SimpleNamespace(deepspeed="zero2.json"), None, None)


def test_whether_a_is_frozen_follows_the_link():
    options = METHODS.load("rac-lora").options
    assert options().freeze_a
    assert options(link="tlora").freeze_a
    assert not options(link="lora").freeze_a
    assert not options(link="tlora", link_options={"freeze_a": False}).freeze_a
    assert dataclasses.asdict(options())["link"] == "lora-fa"


@pytest.mark.parametrize("model", ["tiny_gpt2", "tiny_bert_classifier"])
def test_it_calibrates_again_with_transposed_weights_and_with_a_new_head(model, request, tmp_path):
    samples = classified_samples if "classifier" in model else causal_samples
    batches = in_batches(samples((9, 8, 10, 7, 12, 6)), 3)
    kind = "SEQ_CLS" if "classifier" in model else "CAUSAL_LM"
    base = request.getfixturevalue(model)(initializer_range=0.2)
    prepared = prepared_by("rac-lora", base, batches, link="tlora", task_type=kind)
    starts = Starts()
    train(prepared, batches[0], tmp_path, steps=LENGTH, callbacks=[starts])
    assert len(starts.seen) == LENGTH
    inputs = {key: value for key, value in batches[0].items() if key != "labels"}
    expected = prepared.model.eval()(**inputs).logits
    with merged_base(prepared.model) as merged:
        torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_calibrated_link_is_refused_where_nothing_can_be_merged(saved, tiny_llama, batches):
    folder = saved(tiny_llama(hidden_size=64, intermediate_size=128))
    with pytest.raises(ConfigError, match=r"the base is quantized.*choose the link lora or"):
        prepared_by("rac-lora", quantized_bases.load(folder, "nf4"), batches, link="tlora")
    with pytest.raises(ConfigError, match="rows of the embedding train too"):
        prepared_by("rac-lora", tiny_llama(), batches, link="tlora", trainable_token_indices=[1])
