"""`tlora inspect` of any LoRA: numbers against dense products, and the page."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import pytest
import torch
from browsing import WIDE, overhanging

from served import SERVED, Saved, change_config, change_weights, dense, save
from tlora import cli
from tlora.adapter.saved import Factors, read_lora
from tlora.errors import ConfigError
from tlora.exporters.updates import effective_rank, overlap
from tlora.verbconfig import InspectConfig


@pytest.fixture
def own(tmp_path) -> Saved:
    """An adapter in a folder of its own."""
    return save(SERVED["llama"], tmp_path)


def inspected(saved, *words):
    """Run `tlora inspect`; return the numbers of the page."""
    assert cli.main(["inspect", str(saved.adapter), *map(str, words)]) == 0
    return json.loads((saved.adapter.parent / "adapter.inspect.json").read_text())


def test_norms_and_spectra_are_those_of_the_dense_products(own, capsys):
    before = sorted(path.name for path in own.adapter.iterdir())
    numbers = inspected(own)
    for name, update in dense(read_lora(own.adapter)).items():
        found = numbers["modules"][name]
        values = torch.linalg.svdvals(update)[: found["rank"]]
        assert found["norm"] == pytest.approx(float(update.norm()), rel=1e-9)
        assert found["singular_values"] == pytest.approx(values.tolist(), rel=1e-9, abs=1e-12)
        shares = values / values.sum()
        assert found["effective_rank"] == pytest.approx(
            math.exp(-float((shares * shares.log()).sum())), rel=1e-9
        )
        assert found["bytes"] == 4 * found["rank"] * sum(update.shape)
    assert sorted(path.name for path in own.adapter.iterdir()) == before
    assert "norm of the whole update" in capsys.readouterr().out


@pytest.mark.parametrize("by", ["layer", "projection"])
def test_a_line_may_be_a_layer_or_a_projection(own, by, capsys):
    numbers = inspected(own, "--by", by)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    ranks = sum(module["rank"] for module in numbers["modules"].values())
    assert f" {ranks} " in next(line for line in lines if line.startswith("all"))
    assert any(line.startswith("1 " if by == "layer" else "q_proj ") for line in lines)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_the_effective_rank_of_equal_singular_values_is_their_number(count):
    assert effective_rank(torch.tensor([2.0] * count + [0.0, 0.0])) == pytest.approx(count)
    assert effective_rank(torch.zeros(3)) == 0


def test_row_spaces_overlap_by_their_principal_angles():
    turned = math.radians(30)
    a = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    b = torch.tensor([[1.0, 0, 0], [0, math.cos(turned), math.sin(turned)]])
    share, angle = overlap(Factors(a, torch.eye(2), 1.0), Factors(b, 3 * torch.eye(2), 1.0))
    assert share == pytest.approx((1 + math.cos(turned) ** 2) / 2)
    assert angle == pytest.approx(30)
    assert overlap(Factors(a, torch.zeros(2, 2), 1.0), Factors(b, torch.eye(2), 1.0)) == (0.0, 0.0)


def test_two_adapters_differ_where_one_scale_was_changed(own, tmp_path):
    other = shutil.copytree(own.adapter, tmp_path / "other")
    fields = json.loads((other / "adapter_config.json").read_text())
    key = next(key for key in fields["alpha_pattern"] if "0" in key and "v_proj" in key)
    scales = fields["alpha_pattern"]
    change_config(other, alpha_pattern={**scales, key: scales[key] * 3})
    for name, found in inspected(own, "--against", other)["modules"].items():
        wrong = name == "model.layers.0.self_attn.v_proj"
        assert found["difference"] == pytest.approx(2.0 if wrong else 0.0, abs=1e-9)
        assert found["overlap"] == pytest.approx(1)
        assert found["angle"] == pytest.approx(0, abs=1e-4)


def test_an_update_has_a_cosine_of_one_with_itself(own):
    for found in inspected(own, own.adapter)["modules"].values():
        assert found["cosine"] == pytest.approx(1)
        assert found["leading"] == pytest.approx(1)


def test_cosines_and_leading_subspaces_are_those_of_the_dense_updates(own, tmp_path):
    other = shutil.copytree(own.adapter, tmp_path / "other")

    def turn(weights):
        for n, key in enumerate(weights):
            noise = torch.randn(weights[key].shape, generator=torch.Generator().manual_seed(n))
            weights[key] += noise * weights[key].std()

    change_weights(other, turn)
    one, two = (dense(read_lora(folder)) for folder in (own.adapter, other))
    for name, found in inspected(own, other)["modules"].items():
        pair = [one[name], two[name]]
        dot = (pair[0] * pair[1]).sum() / pair[0].norm() / pair[1].norm()
        assert found["cosine"] == pytest.approx(float(dot), abs=1e-9)
        assert 0 < abs(found["cosine"]) < 1
        values, rows = zip(*[torch.linalg.svd(update)[1:] for update in pair], strict=True)
        count = round(min(map(effective_rank, values)))
        shared = (rows[0][:count] @ rows[1][:count].T).square().sum() / count
        assert found["leading"] == pytest.approx(float(shared), rel=1e-6)


def test_an_update_of_zero_has_no_cosine(own, tmp_path):
    other = shutil.copytree(own.adapter, tmp_path / "other")
    change_weights(other, lambda weights: [w.zero_() for key, w in weights.items() if "_B" in key])
    found = inspected(own, other)["modules"]
    assert {module["cosine"] for module in found.values()} == {None}


def test_what_is_inspected_or_compared_is_refused_in_a_sentence(own, tmp_path, capsys):
    assert cli.main(["inspect", str(own.base)]) == 2
    assert "no plan.safetensors and no adapter" in capsys.readouterr().err
    other = save(SERVED["gpt2"], tmp_path / "gpt2").adapter
    assert cli.main(["inspect", str(own.adapter), "--against", str(other)]) == 2
    assert "have no adapted module in common" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"\.html file"):
        InspectConfig(path="x", output="page")


@pytest.mark.browser
def test_the_page_shows_maps_and_spectra(own, tmp_path, browser):
    page = tmp_path / "page.html"
    assert cli.main(["inspect", str(own.adapter), "--output", str(page)]) == 0
    tab = browser.new_page(viewport=WIDE)
    tab.goto(page.as_uri())
    assert tab.locator("table.map").count() == 4
    assert tab.locator("svg").count() >= 1
    assert overhanging(tab) == []
    tab.close()


def test_layers_are_in_the_order_of_the_model(tmp_path):
    llama = SERVED["llama"]
    kind = dataclasses.replace(llama, fields=llama.fields | {"num_hidden_layers": 11})
    saved = save(kind, tmp_path, targets=["q_proj"], rank_pattern={}, alpha_pattern={})
    names = [*read_lora(saved.adapter).keys]
    assert [int(name.split(".")[2]) for name in names] == [*range(11)]
