"""What a pass of shapes says is what a pass of numbers does."""

import copy

import pytest
import torch
import transformers
from torch import nn

import tlora
from support import FAMILIES, Toy, in_batches, make_family, toy_samples
from tlora.calibration.batches import TokenLayout
from tlora.calibration.hooks import Record, recording
from tlora.calibration.shapes import Untraceable, forward_of
from tlora.calibration.targets import find_targets


# BART's classifier looks for the last token of each text, which only numbers tell.
@pytest.fixture(params=[name for name in FAMILIES if name != "bart-classifier"])
def family(request):
    return make_family(request.param, request.getfixturevalue)


def on_meta(model):
    return copy.deepcopy(model).to("meta")


def spec_of(batch):
    return {name: (tuple(value.shape), value.dtype) for name, value in batch.items()}


def partition(numbers):
    groups = {}
    for name, number in numbers.items():
        groups.setdefault(number, set()).add(name)
    return {frozenset(group) for group in groups.values()}


def shapes_of(model, batch, config, trained=False):
    empty = on_meta(model)
    return forward_of(empty, spec_of(batch), find_targets(empty, config), trained)


def test_modules_share_an_input_where_calibration_finds_that_they_do(family):
    config = tlora.TLoraConfig(**family.config)
    batches = family.batches(len(family.samples))
    found = shapes_of(family.model, batches[0], config)
    stats = tlora.calibrate(family.model, batches, config, progress=False)
    shared = {name: module.moment_id for name, module in stats.modules.items()}
    assert partition(found.sources) == partition(shared)


def kept_by_autograd(model, run, inputs=()):
    """Bytes of the storages that autograd saves while ``run`` runs, and of those of ``inputs``."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    for tensor in inputs:
        keep(tensor)
    del output
    return sum(storage.nbytes() for place, storage in kept.items() if place not in own)


def test_what_autograd_keeps_of_a_frozen_model_is_predicted_to_the_byte(family):
    config = tlora.TLoraConfig(**family.config)
    batch = in_batches(family.samples[:1], 1)[0]
    model = family.model.requires_grad_(False)
    found = shapes_of(model, batch, config)
    records = {target.name: Record(target) for target in find_targets(model, config)}
    layout = TokenLayout(1, None)
    with recording(model, records.values(), layout, True):
        saved = kept_by_autograd(model, lambda: model(**batch))
    # A real forward drops the masks of batches without padding, which shapes cannot tell.
    assert saved <= found.saved <= 1.1 * saved + 2000


def test_what_autograd_keeps_of_a_trained_model_is_predicted(family):
    config = tlora.TLoraConfig(**family.config)
    batch = in_batches(family.samples[:1], 1)[0]
    model = family.model.train()
    saved = kept_by_autograd(model, lambda: model(**batch))
    found = shapes_of(model, batch, config, trained=True)
    assert saved <= found.saved <= 1.1 * saved + 2000


def test_rows_are_those_of_the_batch(tiny_llama):
    ids = torch.zeros(3, 7, dtype=torch.long)
    found = shapes_of(tiny_llama(), {"input_ids": ids, "labels": ids}, tlora.TLoraConfig(r=2))
    assert set(found.rows.values()) == {21}
    assert found.logits == 21 * 160


def test_products_are_counted_as_written_down(tiny_llama):
    ids = torch.zeros(3, 7, dtype=torch.long)
    model = tiny_llama()
    found = shapes_of(model, {"input_ids": ids, "labels": ids}, tlora.TLoraConfig(r=2))
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    by_hand = sum(2 * 21 * m.in_features * m.out_features for m in linear)
    rotary = 2 * 2 * 3 * 7  # angle of each position: a product of a column and a row
    assert 0 <= found.weight_flops - by_hand <= rotary
    # 2 layers: q k and the weights times v, T x T for each of 4 heads of width 4, 3 samples.
    assert 0 <= found.attention_flops - 2 * 2 * 2 * 3 * 4 * 7 * 7 * 4 <= rotary


def test_the_layers_that_checkpointing_would_run_again_are_seen(tiny_llama):
    ids = torch.zeros(3, 7, dtype=torch.long)
    found = shapes_of(tiny_llama(), {"input_ids": ids, "labels": ids}, tlora.TLoraConfig(r=2))
    assert found.layers == 2
    assert found.boundaries == 2 * 3 * 7 * 16 * 4
    assert 0 < found.largest_layer < found.saved
    assert found.outside < found.saved - found.largest_layer


def test_fused_experts_run_without_numbers():
    config = transformers.MixtralConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(config)
    ids = ((2, 9), torch.long)
    found = forward_of(
        model, {"input_ids": ids, "labels": ids}, find_targets(model, tlora.TLoraConfig(r=2))
    )
    # Each token meets two experts of three 64 x 128 matrices, beside attention and the head.
    experts = 2 * 18 * 2 * 2 * 3 * 64 * 128
    attention = 2 * 2 * 18 * 64 * (64 + 32 + 32 + 64)
    assert found.weight_flops >= experts + attention
    assert found.weight_flops < 1.2 * (experts + attention)


def test_queries_keys_and_values_share_an_input(tiny_llama):
    ids = torch.zeros(3, 7, dtype=torch.long)
    found = shapes_of(tiny_llama(), {"input_ids": ids, "labels": ids}, tlora.TLoraConfig(r=2))
    assert len(found.sources) == 14
    assert len(partition(found.sources)) == 8


def test_a_classifier_that_searches_its_text_says_so(request):
    family = make_family("bart-classifier", request.getfixturevalue)
    with pytest.raises(Untraceable):
        shapes_of(family.model, family.batches(2)[0], tlora.TLoraConfig(**family.config))


class AsksForNumbers(Toy):
    def encode(self, x, **_):
        return self.first(x) if x.sum() > 0 else x


def test_a_forward_that_asks_for_numbers_says_so():
    batch = toy_samples((4,))[0]
    with pytest.raises(Untraceable, match="DataDependent"):
        shapes_of(AsksForNumbers(), batch, tlora.TLoraConfig(r=2))


def test_the_model_is_left_as_it_was(tiny_llama):
    model = on_meta(tiny_llama())
    ids = ((1, 4), torch.long)
    targets = find_targets(model, tlora.TLoraConfig(r=2))
    forward_of(model, {"input_ids": ids, "labels": ids}, targets)
    assert all(p.is_meta and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
