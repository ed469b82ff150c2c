import io
import re

import pytest
import torch
from rich.console import Console

from tlora import AdapterPlan, ModulePlan, TLoraConfig
from tlora.report import heatmap, tables
from tlora.report.heatmap import OUTSIDE, Grid, split

LLAMA = [
    f"model.layers.{layer}.{name}"
    for layer in range(3)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
]
BERT = [
    f"bert.encoder.layer.{layer}.{name}"
    for layer in range(2)
    for name in ("attention.self.query", "attention.output.dense", "output.dense")
]
T5 = [
    f"{stack}.block.{layer}.layer.0.SelfAttention.q"
    for stack in ("encoder", "decoder")
    for layer in range(2)
]


def plan_of(names, energy=0.5, sensitivity=1e-6):
    modules = {
        name: ModulePlan(
            name=name,
            d_in=4,
            d_out=10,
            rank=index + 1,
            scale=1.0 + index,
            lora_A=torch.zeros(index + 1, 4),
            captured_energy=energy,
            sensitivity=sensitivity,
            solver="exact",
        )
        for index, name in enumerate(names)
    }
    return AdapterPlan(modules, TLoraConfig(r=4))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.up_proj", ("model.layers", 3, "mlp.up_proj")),
        ("transformer.h.11.attn.c_attn", ("transformer.h", 11, "attn.c_attn")),
        ("lm_head", ("", None, "lm_head")),
        ("classifier.0", ("", None, "classifier.0")),
    ],
)
def test_a_name_is_split_at_its_first_number(name, expected):
    assert split(name) == expected


def test_llama_is_laid_out_in_layers_and_short_projections():
    grid = Grid.of(plan_of(LLAMA).modules)
    assert grid.rows == ["0", "1", "2"]
    assert grid.columns == ["q_proj", "v_proj", "down_proj"]
    assert grid.cells["1", "v_proj"].name == LLAMA[4]


def test_stacks_are_told_apart_and_a_head_stands_outside():
    grid = Grid.of(plan_of([*T5, "lm_head"]).modules)
    assert grid.rows == [
        "encoder.block.0",
        "encoder.block.1",
        "decoder.block.0",
        "decoder.block.1",
        OUTSIDE,
    ]
    assert len(grid.cells) == 5


def test_the_page_shows_each_value_in_its_place(tmp_path):
    text = heatmap.save(plan_of(LLAMA), tmp_path / "plan.html").read_text(encoding="utf-8")
    titles = re.findall("<h2>(.*)</h2>", text)
    assert titles == ["rank", "scale", "sensitivity", "captured energy"]
    rank = heatmap.heat_map("rank", {n: i + 1 for i, n in enumerate(LLAMA)}, "{}")
    assert rank["texts"]["1", "v_proj"] == "5"
    assert rank["shares"]["2", "down_proj"] == 1.0
    assert rank["same"] is None
    assert text.count(">5</td>") == 1
    assert heatmap.heat_map("rank", dict.fromkeys(LLAMA, 4), "{}")["same"] == "4"


def test_what_was_not_measured_has_no_map(tmp_path):
    plan = plan_of(LLAMA, energy=None, sensitivity=None)
    text = heatmap.save(plan, tmp_path / "plan.html").read_text(encoding="utf-8")
    assert re.findall("<h2>(.*)</h2>", text) == ["rank", "scale"]


def text_of(plan, by, width=120):
    console = Console(width=width, record=True, file=io.StringIO())
    tables.show(plan, by=by, console=console)
    return [line.split() for line in console.export_text().splitlines() if line.strip()]


def test_the_table_has_a_line_per_module_and_the_total():
    lines = text_of(plan_of(LLAMA), "module")
    assert len(lines) == 2 + 9 + 1
    assert lines[3] == ["model.layers.0.self_attn.v_proj", "2", "2.000", "1.00e-06", "0.5000", "20"]
    assert lines[-1] == ["all", "45", "5.000", "1.00e-06", "0.5000", "450"]


def test_groups_sum_ranks_and_average_the_rest():
    lines = text_of(plan_of(LLAMA), "layer")
    assert lines[2] == ["0", "3", "6", "2.000", "1.00e-06", "0.5000", "60"]
    lines = text_of(plan_of(LLAMA), "projection")
    assert lines[3] == ["v_proj", "3", "15", "5.000", "1.00e-06", "0.5000", "150"]


def test_what_was_not_measured_is_a_dash():
    assert text_of(plan_of(LLAMA, energy=None, sensitivity=None), "layer")[2][4:6] == ["-", "-"]
