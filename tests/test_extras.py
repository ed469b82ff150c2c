"""A verb whose extra is missing says what to install, before anything is loaded."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch

from tlora import AdapterPlan, TLoraConfig, cli, extras
from tlora.adapter.plan import ModulePlan
from tlora.demo import summary
from tlora.errors import ConfigError


@pytest.fixture
def without(monkeypatch):
    """Make modules impossible to find, as on a machine where they are not installed."""

    class Blocked:
        names: tuple[str, ...] = ()

        def find_spec(self, name, path=None, target=None):
            if name in self.names:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    blocked = Blocked()
    monkeypatch.setattr(sys, "meta_path", [blocked, *sys.meta_path])

    def block(*names):
        blocked.names = names
        for name in names:
            monkeypatch.delitem(sys.modules, name, raising=False)

    return block


RUN = ["--model", "nowhere"]
COMPARE = ["--methods", "lora", "--learning_rates", "1e-3"]
EVAL = ["./m", "--tasks", "gsm8k-paper"]


@pytest.mark.parametrize(
    ("argv", "module", "extra"),
    [
        (["demo"], "trl", "train"),
        (["init", *RUN], "datasets", "train"),
        (["init", *RUN, "--dry_run"], "rich", "train"),
        (["train", *RUN], "trl", "train"),
        (["train", *RUN], "yaml", "train"),
        (["compare", *COMPARE], "scipy", "compare"),
        (["inspect", "nowhere"], "jinja2", "train"),
        (["eval", *EVAL], "lm_eval", "eval"),
    ],
)
def test_one_sentence_says_what_to_install(argv, module, extra, without, capsys, monkeypatch):
    def fail(config):
        raise AssertionError("the verb ran")

    verb = cli.VERBS[argv[0]]
    monkeypatch.setitem(cli.VERBS, verb.name, dataclasses.replace(verb, run=fail))
    without(module)
    assert cli.main(argv) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.endswith(f": {module} is not installed; run {extras.install(extra)}.\n")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "module", "extra"),
    [
        (["train", *RUN, "--quantization", "nf4"], "bitsandbytes", "quantized"),
        (["init", *RUN, "--quantization", "nf4", "--dry_run"], "bitsandbytes", "quantized"),
        (["compare", *COMPARE, "--quantization", "int8"], "bitsandbytes", "quantized"),
        (["compare", *COMPARE, "--engine", "ray"], "ray", "ray"),
        (["eval", *EVAL, "--quantization", "int8"], "bitsandbytes", "quantized"),
        (["eval", *EVAL, "--judge.url", "http://h/v1", "--judge.model", "j"], "openai", "judge"),
    ],
)
def test_what_a_field_asks_for_is_said_with_the_other_faults(
    argv, module, extra, without, capsys, tmp_path
):
    without(module)
    assert cli.main([*argv, "--output_dir", str(tmp_path / "new"), "--model", "./nowhere"]) == 2
    said = capsys.readouterr().err
    assert f"{module} is not installed; run {extras.install(extra)}.\n" in said
    assert re.search(r"there is no (folder|model, run or adapter) '\./", said)


@pytest.mark.parametrize("argv", [["--version"], ["train", "--help"], ["list"], ["list", "tasks"]])
def test_what_only_tells_needs_no_extra(argv, without, capsys):
    without(*extras.MODULES["judge"], *extras.MODULES["quantized"])
    assert cli.main(argv) == 0
    assert capsys.readouterr().err == ""


def test_a_plan_is_inspected_without_what_only_a_comparison_needs(without, tmp_path, capsys):
    module = ModulePlan("q", 4, 3, 2, 1.0, torch.eye(2, 4), 0.9, 1.0, "exact")
    AdapterPlan({"q": module}, TLoraConfig()).save(tmp_path)
    without("scipy", "sklearn")
    assert cli.main(["inspect", str(tmp_path)]) == 0
    assert "captured energy: mean 0.900, lowest 0.900" in capsys.readouterr().out
    table = Path(__file__).parents[1] / "benchmarks" / "quality" / "base-ledger"
    assert cli.main(["inspect", str(table)]) == 2
    assert "inspect: scipy, sklearn are not installed; run" in capsys.readouterr().err


def test_all_that_is_missing_is_named(without):
    without("scipy", "sklearn")
    assert extras.missing("train") == []
    assert extras.missing("compare") == ["scipy", "sklearn"]
    with pytest.raises(ConfigError, match="compare: scipy, sklearn are not installed; run"):
        extras.require("compare", where="compare")


def test_the_demo_ends_without_a_page_where_nothing_can_make_it(without):
    without("scipy")
    command = '`pip install ".[compare]"` in the checkout of tlora'
    assert summary.page(Path("run")) == f"no page; run {command}"


def test_the_modules_are_those_of_the_extras_in_pyproject():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    imported = {"pyyaml": "yaml", "scikit_learn": "sklearn", "antlr4_python3_runtime": "antlr4"}
    for extra, modules in extras.MODULES.items():
        listed = re.search(rf"^{extra} = \[(.*?)\](?: +#.*)?$", section, re.MULTILINE | re.DOTALL)[
            1
        ]
        names, inner = set(), set()
        for requirement in re.findall(r'"([^"]+)"', listed):
            if more := re.fullmatch(r"tlora\[(\w+)\]", requirement):
                inner |= {*extras.MODULES[more[1]]}
            else:
                name = re.match(r"[\w-]+", requirement)[0].lower().replace("-", "_")
                names.add(imported.get(name, name))
        assert {*modules} == names | inner, extra
