"""MTLoRA against its definition, computed densely in float64."""

import typing

import peft
import pytest
import torch

from support import train
from tlora.adapter.freeze import lora_layers
from tlora.checks import hints
from tlora.methods.mtlora import MtLoraOptions

T = {
    "shim": lambda c, _: c,
    "icfm": lambda c, _: c @ c.mT,
    "ctcm": lambda c, d: c @ d,
    "dtsm": lambda c, d: c + d,
}
PAIRS = ("ctcm", "dtsm")
every_structure = pytest.mark.parametrize(
    "structure", typing.get_args(hints(MtLoraOptions)["structure"])
)


def parts(layer):
    """A, B, C, and D or None."""
    b = layer.lora_B["default"]
    return layer.lora_A["default"].weight, b.up, b.core_c, getattr(b, "core_d", None)


@every_structure
def test_the_layer_adds_s_b_t_a_to_the_weight(
    prepared_by, tiny_llama, batches, tmp_path, structure
):
    options = {"r": 3, "lora_alpha": 6, "structure": structure}
    prepared = prepared_by("mtlora", tiny_llama().double(), **options)
    model = prepared.model
    starts = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    train(model, batches[0], steps=4)
    assert not any(torch.equal(p, starts[n]) for n, p in model.named_parameters() if n in starts)
    for _, layer in lora_layers(model):
        a, b, c, d = parts(layer)
        m, width = layer.base_layer.weight.shape
        trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
        assert trained == 3 * (m + width) + (2 if structure in PAIRS else 1) * 3**2
        t = T[structure](c, d)
        if structure == "icfm":
            torch.testing.assert_close(t, t.mT, rtol=0, atol=1e-15)
            assert torch.linalg.eigvalsh(t).min() > -1e-15
        x = torch.randn(2, 4, width, dtype=torch.float64)
        with torch.no_grad():
            expected = x @ (layer.base_layer.weight + 6 / 3 * b @ t @ a).mT
            torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    prepared.save(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_llama().double(), tmp_path)
    with torch.no_grad():
        expected = model(**batches[0]).logits
        moved = expected - tiny_llama().double()(**batches[0]).logits
        assert moved.abs().max() > 1e-4
        torch.testing.assert_close(again(**batches[0]).logits, expected, rtol=0, atol=1e-12)
        merged = again.merge_and_unload()(**batches[0]).logits
        torch.testing.assert_close(merged, expected, rtol=0, atol=1e-12)


@every_structure
def test_with_t_the_identity_it_is_lora_to_the_bit(prepared_by, tiny_llama, batches, structure):
    found = []
    for name, options in (("lora", {}), ("mtlora", {"structure": structure})):
        model = prepared_by(name, tiny_llama(), r=3, **options).model
        torch.manual_seed(7)
        factors = []
        for _, layer in lora_layers(model):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            if name == "mtlora":
                a, b, c, d = parts(layer)
                torch.nn.init.eye_(c)
                if d is not None:
                    torch.nn.init.eye_(d) if structure == "ctcm" else torch.nn.init.zeros_(d)
            torch.nn.init.normal_(b)
            factors += [a, b]
        output = model(**batches[0])
        output.loss.backward()
        found.append([output.logits, *factors, *(factor.grad for factor in factors)])
    assert all(map(torch.equal, *found))


@every_structure
def test_the_start_draws_all_but_b_as_torch_draws_a_linear(prepared_by, tiny_llama, structure):
    model = prepared_by("mtlora", tiny_llama(), r=8, structure=structure).model
    cores = []
    for _, layer in lora_layers(model):
        a, b, *drawn = parts(layer)
        assert not b.any()
        cores += [core for core in drawn if core is not None]
        for matrix in (a, *cores[-1:]):
            bound = matrix.shape[1] ** -0.5
            assert 0.8 * bound < matrix.abs().max() <= bound
    assert len({core.flatten()[0].item() for core in cores}) == len(cores)
    entries = torch.cat([core.flatten() for core in cores])
    assert entries.std().item() == pytest.approx((3 * 8) ** -0.5, rel=0.1)
    assert entries.mean().item() == pytest.approx(0, abs=0.03)
