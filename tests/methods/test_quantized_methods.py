"""Every method on a quantized base: it trains there, or refuses in a sentence."""

import pytest

import quantized_bases
from tlora.errors import ConfigError
from tlora.registry import METHODS


@pytest.fixture(scope="module")
def folder(saved, tiny_llama):
    return saved(tiny_llama(hidden_size=64, intermediate_size=128, initializer_range=0.2))


WITHOUT_HQQ = {"adalora", "eva"}


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, form) for name in METHODS.names() for form in ("nf4", "hqq")),
        *((name, form) for name in ("tlora", "dora") for form in ("nf4-in-floats", "torchao")),
    ],
)
def test_a_method_trains_on_few_bits_unless_it_changes_the_base(
    prepared_by, folder, batches, name, form
):
    model = quantized_bases.load(folder, form)
    if METHODS.load(name).traits.changes_base or name == "mica":
        with pytest.raises(ConfigError, match=r"unquantized"):
            prepared_by(name, model)
        assert not any("lora" in key for key, _ in model.named_modules())
        return
    if form == "hqq" and name in WITHOUT_HQQ:
        with pytest.raises(ConfigError, match=r"stored by HQQ, and PEFT's .* nf4 or"):
            prepared_by(name, model)
        return
    prepared = prepared_by(name, model)
    prepared.model.train()(**batches[0]).loss.backward()
    trained = [p for p in prepared.model.parameters() if p.requires_grad]
    assert trained
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trained)


@pytest.mark.parametrize("name", ["dora", "adalora"])
def test_what_peft_cannot_do_on_8_bits_is_said(prepared_by, folder, name):
    with pytest.raises(ConfigError, match=r"q_proj is stored in 8 bits, and PEFT's .* nf4 or"):
        prepared_by(name, quantized_bases.int8(folder))
