"""LoRA-XS, MiCA and QA-LoRA against their definitions, computed densely in float64."""

import pytest
import torch
from safetensors.torch import load_file

from support import VOCABULARY, train
from tlora.adapter.freeze import lora_layers
from tlora.errors import ConfigError

DENSE = {"rtol": 1e-4, "atol": 1e-5}


def dense(layer, update, x):
    """(W + update) x in float64."""
    return (x.double() @ (layer.base_layer.weight.double() + update).T).float()


def check(layer, update):
    """The layer computes W x + update x, merged too."""
    x = torch.randn(2, 4, layer.in_features)
    with torch.no_grad():
        expected = dense(layer, update, x)
        torch.testing.assert_close(layer(x), expected, **DENSE)
        layer.merge()
        torch.testing.assert_close(layer(x), expected, **DENSE)
        layer.unmerge()


def test_lora_xs_trains_r_between_the_leading_singular_vectors(prepared_by, tiny_llama, batches):
    base = tiny_llama(initializer_range=0.2)
    weights = {n: m.weight.double() for n, m in base.named_modules() if n.endswith("_proj")}
    model = prepared_by("lora-xs", base, r=3, lora_alpha=6, sigma=1e-2).model
    train(model, batches[0], steps=3)
    found = {name.removeprefix("base_model.model."): layer for name, layer in lora_layers(model)}
    assert found.keys() == weights.keys()
    for name, layer in found.items():
        u, s, vh = torch.linalg.svd(weights[name])
        r = layer.lora_B["default"].core.double()
        # Singular vectors are given up to a sign, which the stored ones settle.
        signs = torch.diag((layer.lora_B["default"].left.double().T @ u[:, :3]).diagonal().round())
        assert signs.abs().equal(torch.eye(3, dtype=torch.float64))
        update = 6 / 3 * u[:, :3] @ signs @ r @ signs @ s[:3].diag() @ vh[:3]
        check(layer, update.detach())


def test_r_starts_as_it_is_told_and_nothing_else_moves(prepared_by, tiny_llama, batches):
    model = prepared_by("lora-xs", tiny_llama(initializer_range=0.2), r=4, sigma=0.5).model
    cores = torch.cat([layer.lora_B["default"].core.flatten() for _, layer in lora_layers(model)])
    assert cores.std().item() == pytest.approx(0.5, rel=0.2)
    fixed = [layer.lora_A["default"].weight.clone() for _, layer in lora_layers(model)]
    train(model, batches[0], steps=2)
    now = [layer.lora_A["default"].weight for _, layer in lora_layers(model)]
    assert all(map(torch.equal, now, fixed))
    still = prepared_by("lora-xs", tiny_llama(), r=4, sigma=0.0).model
    with torch.no_grad():
        assert torch.equal(still(**batches[0]).logits, tiny_llama()(**batches[0]).logits)


def test_mica_trains_a_on_the_minor_left_singular_vectors(prepared_by, tiny_llama, batches):
    base = tiny_llama(initializer_range=0.2)
    weights = {n: m.weight.double() for n, m in base.named_modules() if n.endswith("_proj")}
    model = prepared_by("mica", base, r=3, lora_alpha=6).model
    train(model, batches[0], steps=3)
    for name, layer in lora_layers(model):
        u, _, _ = torch.linalg.svd(weights[name.removeprefix("base_model.model.")])
        rank = min(layer.in_features, layer.out_features)
        minor = u[:, rank - 3 : rank]
        b, a = layer.lora_B["default"].weight.double(), layer.lora_A["default"].weight.double()
        torch.testing.assert_close(b @ b.T, minor @ minor.T, rtol=0, atol=1e-4)
        assert a.abs().max() > 0
        check(layer, (2 * minor @ minor.T @ b @ a).detach())


def test_qa_lora_pools_the_inputs_in_groups(prepared_by, tiny_llama, batches):
    model = prepared_by(
        "qa-lora", tiny_llama(initializer_range=0.2), r=2, lora_alpha=6, group_size=4
    )
    train(model.model, batches[0], steps=3)
    for _, layer in lora_layers(model.model):
        a, b = layer.lora_A["default"].grouped.double(), layer.lora_B["default"].weight.double()
        assert a.shape == (2, layer.in_features // 4)
        pool = (
            torch.eye(layer.in_features // 4, dtype=torch.float64).repeat_interleave(4, dim=1) / 4
        )
        check(layer, (6 / 2 * b @ a @ pool).detach())


def test_qa_loras_update_goes_into_the_zero_points(prepared_by, tiny_llama, batches):
    """W = scale (q - zero) a group: W + s B A is of the same q and scale, with other zeros."""
    model = prepared_by("qa-lora", tiny_llama(initializer_range=0.2), r=2, group_size=4).model
    train(model, batches[0], steps=3)
    for _, layer in lora_layers(model):
        update = layer.get_delta_weight("default").detach().double()
        groups = layer.base_layer.weight.double().reshape(len(update), -1, 4)
        low, high = groups.amin(dim=2, keepdim=True), groups.amax(dim=2, keepdim=True)
        scale = (high - low) / 15
        zero, q = -low / scale, ((groups - low) / scale).round()
        moved = zero - update.reshape(groups.shape)[..., :1] / scale
        expected = scale * (q - zero) + update.reshape(groups.shape)
        torch.testing.assert_close(scale * (q - moved), expected, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused(prepared_by, tiny_llama):
    for name in ("lora-xs", "mica"):
        with pytest.raises(
            ConfigError, match=r"`r` is too large for .*k_proj, which is 8 x 16; 9 of"
        ):
            prepared_by(name, tiny_llama(), r=9)
    with pytest.raises(ConfigError, match="`group_size` is 5, which does not divide the 16 inputs"):
        prepared_by("qa-lora", tiny_llama(), group_size=5)


@pytest.mark.parametrize("name", ["lora-xs", "edora", "mtlora", "xgblora", "pissa"])
def test_of_a_resized_embedding_only_the_trained_rows_are_saved(
    prepared_by, saved, tiny_llama, tmp_path, name
):
    path = saved(tiny_llama())
    model = tiny_llama()
    model.resize_token_embeddings(VOCABULARY + 8)
    model.name_or_path = model.config._name_or_path = path
    prepared = prepared_by(name, model, r=2, trainable_token_indices=[VOCABULARY, VOCABULARY + 1])
    prepared.save(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    rows = {key: len(value) for key, value in tensors.items() if "lora_" not in key}
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    assert rows == {key: 2}
