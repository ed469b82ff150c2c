"""The statistics of `calibrate` against their definition, one sample at a time by autograd."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import support
from support import Toy, assert_agrees, one_at_a_time, toy_batch, toy_samples
from tlora import TLoraConfig, calibrate, get_tlora_model, plan
from tlora.errors import CalibrationError


def config(**fields: Any) -> TLoraConfig:
    return TLoraConfig(**({"r": 2, "lora_alpha": 2} | fields))


# --- numbers, family by family


@pytest.mark.parametrize("size", [2])
def test_padded_batches_give_what_the_samples_give_one_at_a_time(family, size):
    stats = calibrate(family.model, family.batches(size), config(**family.config))

    assert stats.samples == len(family.samples)
    assert len(stats) >= 6
    assert_agrees(stats, one_at_a_time(family.model, family.samples, stats.modules))


@pytest.mark.parametrize("name", ["llama-left", "t5"])
def test_a_sample_padded_to_a_fixed_length_gives_what_it_gives_without(family_of, name):
    family = family_of(name)
    batches = [support.padded([sample], family.side, length=12) for sample in family.samples]

    stats = calibrate(family.model, batches, config(**family.config))

    assert_agrees(stats, one_at_a_time(family.model, family.samples, stats.modules))


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("bert", ["classifier", "pooler.dense"]),
        ("vit", ["classifier"]),
        ("bert-regression", ["classifier", "pooler.dense"]),
    ],
)
def test_a_head_is_seen_once_a_sample(family_of, name, heads):
    family = family_of(name)

    stats = calibrate(family.model, family.batches(3), config(target_modules=heads))

    assert {module.tokens for module in stats.modules.values()} == {len(family.samples)}
    # One row a sample is its own mean, so nothing is left after centering.
    assert all(module.covariance().norm() == 0 for module in stats.modules.values())
    assert_agrees(stats, one_at_a_time(family.model, family.samples, stats.modules))


def test_without_an_attention_mask_every_token_is_real(family_of):
    family = family_of("gpt2-right")
    samples = support.causal_samples((6, 6, 6))
    batches = [support.padded(samples)]
    del batches[0]["attention_mask"]

    stats = calibrate(family.model, batches, config())

    assert_agrees(stats, one_at_a_time(family.model, samples, stats.modules))


def test_cross_attention_counts_the_tokens_of_the_encoder(family_of):
    family = family_of("t5")
    stats = calibrate(family.model, family.batches(5), config(**family.config))

    source = sum(s["input_ids"].shape[1] for s in family.samples)
    target = sum(s["labels"].shape[1] for s in family.samples)
    assert source != target
    cross = "decoder.block.1.layer.1.EncDecAttention"
    seen = {part: stats.modules[f"{cross}.{part}"].tokens for part in "qkvo"}
    assert seen == {"q": target, "k": source, "v": source, "o": target}


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_changes_nothing(family_of, guard):
    family = family_of("llama-right")
    batches = family.batches(2)
    expected = calibrate(family.model, batches, config())
    with guard():
        stats = calibrate(family.model, batches, config())

    for name, module in stats.modules.items():
        assert module.sensitivity == expected.modules[name].sensitivity > 0
        assert torch.equal(module.covariance(), expected.modules[name].covariance())


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_dropout_is_off(request, name):
    fixture, field = {
        "llama-right": ("tiny_llama", "attention_dropout"),
        "bert": ("tiny_bert_classifier", "hidden_dropout_prob"),
        "t5": ("tiny_t5", "dropout_rate"),
    }[name]
    model = request.getfixturevalue(fixture)(**{field: 0.5}).train()
    samples = {"llama-right": support.causal_samples, "bert": support.classified_samples}.get(
        name, support.translated_samples
    )()

    stats = calibrate(model, support.in_batches(samples, 2), config())

    assert_agrees(stats, one_at_a_time(model, samples, stats.modules))


def test_ablated_statistics_are_not_gathered(family_of):
    family = family_of("llama-right")
    plain = config(allocate_rank=False, allocate_scale=False)
    without_labels = [
        {key: value for key, value in batch.items() if key != "labels"}
        for batch in family.batches(2)
    ]
    forward_only = calibrate(family.model, without_labels, plain)
    backward_only = calibrate(family.model, family.batches(2), config(basis="random"))

    expected = one_at_a_time(family.model, family.samples, forward_only.modules)
    for name, want in expected.items():
        module = forward_only.modules[name]
        assert module.sensitivity is None
        assert support.distance(module.covariance(), want.covariance) < 1e-4
        assert backward_only.modules[name].moment is None
        assert backward_only.modules[name].sensitivity == pytest.approx(want.sensitivity, rel=1e-4)


# --- shapes of models


class TwiceForSequenceClassification(Toy):
    """Calls one module twice in a forward pass."""

    def encode(self, x: Tensor, **_: Any) -> Tensor:
        return self.first(self.first(x).tanh()).tanh()


class InPlaceForSequenceClassification(Toy):
    """Writes into the output of a target in place."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(8, 8)

    def encode(self, x: Tensor, **_: Any) -> Tensor:
        return self.second(self.first(x).relu_()).relu_()


class FlatForSequenceClassification(Toy):
    """Flattens tokens to rows before its targets, and hands a keyword to one."""

    def encode(self, x: Tensor, **_: Any) -> Tensor:
        return self.first(input=x.flatten(0, 1)).tanh().view_as(x)


class RoutedForSequenceClassification(Toy):
    """A mixture of three experts; the third is never reached."""

    calls_idle_experts = False

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def choice(self, rows: Tensor) -> Tensor:
        return (rows[:, 0] > 1).long()

    def encode(self, x: Tensor, **_: Any) -> Tensor:
        rows = self.first(x).flatten(0, 1)
        mixed = torch.zeros_like(rows)
        chosen = self.choice(rows.detach() if x.shape[1] == 0 else x.flatten(0, 1))
        for index, expert in enumerate(self.experts):
            mine = (chosen == index).nonzero().flatten()
            if len(mine) or self.calls_idle_experts:
                mixed = mixed.index_add(0, mine, expert(rows[mine]).tanh())
        return mixed.view_as(x)


class IdleRoutedForSequenceClassification(RoutedForSequenceClassification):
    """Calls the experts that no token reached, on no rows."""

    calls_idle_experts = True


class FrozenStartForSequenceClassification(Toy):
    """Runs its first part without a graph, as models with a frozen tower do."""

    def encode(self, x: Tensor, **_: Any) -> Tensor:
        with torch.no_grad():
            return self.first(x).tanh()


class SummedLoss(Toy):
    """One label a sample, but a loss that is a sum: not to be guessed from outside."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, labels, reduction="sum")


class WeightedLoss(Toy):
    """Two-dimensional labels under a loss of its own."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (labels * (logits - labels) ** 2).mean() / labels.sum()


def agrees_in_batches(model: nn.Module, samples: list, batches: list, **fields: Any) -> None:
    stats = calibrate(model, batches, config(**fields))
    assert_agrees(stats, one_at_a_time(model, samples, stats.modules))


@pytest.mark.parametrize(
    "kind",
    [
        TwiceForSequenceClassification,
        InPlaceForSequenceClassification,
        FlatForSequenceClassification,
        RoutedForSequenceClassification,
        IdleRoutedForSequenceClassification,
        FrozenStartForSequenceClassification,
        SummedLoss,
    ],
)
@pytest.mark.parametrize("size", [1, 4])
def test_unusual_models_agree_too(kind, size):
    model, samples = support.seeded(kind), toy_samples()
    batches = [toy_batch(samples[i : i + size]) for i in range(0, len(samples), size)]
    agrees_in_batches(model, samples, batches)


def test_routed_rows_as_many_as_samples_are_not_taken_for_one_each():
    model = support.seeded(RoutedForSequenceClassification)
    samples = toy_samples((3, 3))
    for sample, chosen in zip(samples, ([1, 1, 0], [0, 0, 0]), strict=True):
        sample["inputs_embeds"][0, :, 0] = torch.tensor(chosen) * 4.0
    agrees_in_batches(model, samples, [toy_batch(samples)], target_modules=["experts.1"])


def test_labels_under_an_unknown_loss_agree():
    model, samples = support.seeded(WeightedLoss), toy_samples()
    generator = torch.Generator().manual_seed(5)
    for sample in samples:
        sample["labels"] = torch.rand(1, 3, generator=generator) + 0.1
    agrees_in_batches(model, samples, [toy_batch(samples)])


def test_padding_may_hold_anything():
    model, samples = support.seeded(FlatForSequenceClassification), toy_samples()
    agrees_in_batches(model, samples, [toy_batch(samples, fill=float("inf"))])


def test_a_module_that_is_never_reached_has_no_statistics_but_stays():
    model = support.seeded(RoutedForSequenceClassification)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # routing may pass an expert by
        stats = calibrate(model, [toy_batch(toy_samples())], config(exclude_modules=["head"]))
    idle = stats.modules["experts.2"]

    assert (idle.sensitivity, idle.tokens, idle.samples) == (0.0, 0, 4)
    assert idle.covariance().shape == (8, 8)
    assert idle.covariance().norm() == 0
    assert plan(model, stats, config(exclude_modules=["head"])).modules["experts.2"].rank >= 1


def test_another_module_that_is_never_reached_is_named(tiny_llama):
    model = tiny_llama()
    model.model.spare = torch.nn.Linear(16, 16)
    said = "model.spare ran in no calibration batch"
    batches = [support.padded(support.causal_samples())]
    with pytest.warns(UserWarning, match=said):
        calibrate(model, batches, config())
    with pytest.warns(UserWarning, match=said):
        get_tlora_model(model, config(), batches)


def test_where_the_loss_depends_on_no_target_the_sensitivities_are_zero():
    model = support.seeded(RoutedForSequenceClassification)
    stats = calibrate(model, [toy_batch(toy_samples())], config(target_modules=["experts.2"]))

    assert stats.modules["experts.2"].sensitivity == 0.0


def test_windows_of_a_real_model_agree():
    swin = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4
    )
    model = support.seeded(lambda: transformers.SwinForImageClassification(swin))
    generator = torch.Generator().manual_seed(6)
    images = torch.randn(3, 3, 16, 16, generator=generator)
    batch = {"pixel_values": images, "labels": torch.tensor([0, 1, 1])}
    samples = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(3)]
    agrees_in_batches(model, samples, [batch])


# --- who shares a second moment


def test_modules_that_read_one_tensor_share_one_moment(family_of):
    family = family_of("llama-right")
    stats = calibrate(family.model, family.batches(2), config())

    layer = "model.layers.1."
    of = {name.removeprefix(layer): m.moment for name, m in stats.modules.items() if layer in name}
    assert of["self_attn.q_proj"] is of["self_attn.k_proj"] is of["self_attn.v_proj"]
    assert of["mlp.gate_proj"] is of["mlp.up_proj"]
    assert len({id(moment) for moment in of.values()}) == 4
    assert len({id(m.moment) for m in stats.modules.values()}) == 8
    assert len({m.moment_id for m in stats.modules.values()}) == 8


class ForkedForSequenceClassification(Toy):
    """Feeds two modules the same tensor, or with ``apart`` two."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8)

    def encode(self, x: Tensor, apart: bool = False, **_: Any) -> Tensor:
        other = 2 * x.roll(1, dims=-1) if apart else x
        return self.first(x) * self.second(other) + self.third(other)


def test_modules_that_shared_part_when_they_read_different_tensors():
    model, samples = support.seeded(ForkedForSequenceClassification), toy_samples()
    samples = [s | {"apart": i in (1, 2)} for i, s in enumerate(samples)]

    def batch(part: list[support.Sample]) -> support.Sample:
        return toy_batch(part) | {"apart": part[0]["apart"]}

    fields = config(exclude_modules=["head"])
    stats = calibrate(model, [batch(samples[:1]), batch(samples[1:3]), batch(samples[3:])], fields)

    assert_agrees(stats, one_at_a_time(model, samples, stats.modules))
    assert stats.modules["second"].moment is stats.modules["third"].moment
    assert stats.modules["first"].moment is not stats.modules["second"].moment


# --- memory


class _Peak(TorchDispatchMode):
    """The most storages of at least ``numel`` numbers, made inside, that were alive at once."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.peak, self._alive = numel, 0, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        old = {
            value.untyped_storage()._cdata
            for value in tree_leaves((args, kwargs))
            if isinstance(value, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.untyped_storage().nbytes() >= 4 * self.numel:
                storage = value.untyped_storage()
                if storage._cdata not in old:
                    self._alive[storage._cdata] = StorageWeakRef(storage)
        self._alive = {k: ref for k, ref in self._alive.items() if not ref.expired()}
        self.peak = max(self.peak, len(self._alive))
        return result


def test_never_more_than_a_few_weight_gradients_are_alive(tiny_llama):
    model = tiny_llama(hidden_size=64, intermediate_size=64, num_hidden_layers=4)
    # One sample at a time: no activation is as large as a weight.
    batches = support.causal_samples()
    with _Peak(64 * 64) as seen:
        stats = calibrate(model, batches, config(basis="random"))
    assert len(stats) == 28
    assert 1 <= seen.peak <= 3

    with _Peak(64 * 64) as reference:
        model(**batches[0]).loss.backward()
    assert reference.peak >= 20


# --- faults, each named where it is


def test_no_samples(tiny_llama):
    with pytest.raises(CalibrationError, match="gave no sample"):
        calibrate(tiny_llama(), iter([]), config())


def test_no_loss(family_of):
    family = family_of("llama-right")
    [batch] = family.batches(5)
    del batch["labels"]
    with pytest.raises(CalibrationError) as caught:
        calibrate(family.model, [batch], config())
    assert "LlamaForCausalLM returned no single loss" in str(caught.value)
    assert "['attention_mask', 'input_ids']" in str(caught.value)


def test_a_loss_of_several_numbers():
    class Unreduced(Toy):
        def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(
                logits.repeat(2, 1), labels.repeat(2), reduction="none"
            )

    with pytest.raises(CalibrationError, match="Unreduced returned no single loss"):
        calibrate(Unreduced(), toy_samples(), config())


@pytest.mark.parametrize("size", [1, 3])
def test_a_loss_that_is_not_finite_names_the_sample(size):
    class BrokenForSequenceClassification(Toy):
        """Finite activations, but a NaN loss where a sample's first number is 9."""

        def encode(self, x: Tensor, **_: Any) -> Tensor:
            marked = (x[:, :1, :1] == 9).to(x.dtype)
            return self.first(x) / (1 - marked) - self.first(x) / (1 - marked)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            # A plain dict, not a ModelOutput.
            return dict(super().forward(*args, **kwargs))

    model, samples = (
        support.seeded(BrokenForSequenceClassification),
        toy_samples((3, 3, 3, 3, 3, 3)),
    )
    samples[4]["inputs_embeds"][0, 0, 0] = 9.0
    batches = [toy_batch(samples[i : i + size]) for i in range(0, 6, size)]
    with pytest.raises(CalibrationError, match=r"the loss of sample 4 \(counted from 0\) is nan"):
        calibrate(model, batches, config(target_modules=["first"]))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", ["llama-left", "t5"])
def test_a_sample_without_labels_is_named(family_of, name, size):
    family = family_of(name)
    family.samples[3]["labels"][:] = -100
    with pytest.raises(CalibrationError, match=r"sample 3 \(counted from 0\) has no label"):
        calibrate(family.model, family.batches(size), config())


@pytest.mark.parametrize(("size", "value"), [(1, float("inf")), (4, float("nan"))])
def test_activations_that_are_not_finite_name_module_and_sample(size, value):
    model = support.seeded(FlatForSequenceClassification)
    samples = toy_samples()
    samples[2]["inputs_embeds"][0, 1, 3] = value
    batches = [toy_batch(samples[i : i + size]) for i in range(0, 4, size)]
    with pytest.raises(CalibrationError, match="first: its input is not finite on sample 2 "):
        calibrate(model, batches, config())


def test_a_gradient_that_is_not_finite_names_the_module():
    class SteepForSequenceClassification(Toy):
        def encode(self, x: Tensor, **_: Any) -> Tensor:
            return (0 * self.first(x)).sqrt()

    model = support.seeded(SteepForSequenceClassification)
    with pytest.raises(CalibrationError, match="first: the gradient of the loss is not finite"):
        calibrate(model, toy_samples(), config(target_modules=["first"]))


def test_a_model_on_meta(tiny_llama):
    model = tiny_llama().to("meta")
    with pytest.raises(CalibrationError, match=r"model\.embed_tokens\.weight is on `meta`"):
        calibrate(model, support.causal_samples(), config())


def test_a_mask_with_holes_where_rows_are_routed_is_refused():
    model, samples = support.seeded(RoutedForSequenceClassification), toy_samples((4,))
    samples[0]["attention_mask"][0, 1] = 0
    with pytest.raises(CalibrationError, match=r"sample 0: its rows .* give it without padding"):
        calibrate(model, samples, config(target_modules=["experts.0"]))
