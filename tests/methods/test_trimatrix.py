import pytest
import torch

from support import train
from tlora.adapter.freeze import lora_layers


def parts(layer):
    b = layer.lora_B["default"]
    return b.scale, b.left, b.core, layer.lora_A["default"].weight


def test_the_layer_adds_a_p_q_r_to_the_weight(prepared_by, tiny_llama, batches):
    model = prepared_by("trimatrix", tiny_llama(), r=3, scale=0.5).model
    train(model, batches[0], steps=3)
    for _, layer in lora_layers(model):
        a, p, q, r = parts(layer)
        assert q.abs().max() > 0
        assert a.item() != 0.5
        x = torch.randn(2, 4, layer.in_features)
        with torch.no_grad():
            expected = layer.base_layer(x) + x @ (a * p @ q @ r).T
            torch.testing.assert_close(layer(x), expected)
            layer.merge()
            torch.testing.assert_close(layer(x), expected)
            layer.unmerge()


def test_the_random_matrices_are_those_of_the_seed_and_stay(prepared_by, tiny_llama, batches):
    model = prepared_by("trimatrix", tiny_llama(), r=3).model
    again = prepared_by("trimatrix", tiny_llama(), r=3).model
    first = {name: [part.clone() for part in parts(layer)] for name, layer in lora_layers(model)}
    for name, layer in lora_layers(again):
        assert all(map(torch.equal, parts(layer), first[name]))
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    train(model, batches[0], steps=2)
    lefts = set()
    for name, layer in lora_layers(model):
        _, p, _, r = parts(layer)
        assert torch.equal(p, first[name][1])
        assert torch.equal(r, first[name][3])
        for drawn in (p, r):  # uniform up to 1 / sqrt(columns), as a Linear's weight
            assert drawn.std().item() == pytest.approx((3 * drawn.shape[1]) ** -0.5, rel=0.25)
        lefts.add(p.flatten()[0].item())
    assert len(lefts) == len(first)


def test_without_the_adapter_the_base_is_back(prepared_by, tiny_llama, batches):
    model = prepared_by("trimatrix", tiny_llama(), r=3).model
    train(model, batches[0], steps=2)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(**batches[0]).logits, tiny_llama()(**batches[0]).logits)
