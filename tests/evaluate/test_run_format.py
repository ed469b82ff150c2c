"""An evaluation asks in the format that its runs were trained in, unless told otherwise."""

import copy
import json
import pathlib

import pytest

from tlora.errors import ConfigError
from tlora.evaluate import evaluate
from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.evalfolder import EvalFolder
from tlora.evaluate.evaluated_models import resolve
from tlora.evaluate.run_format import as_prompt, settled
from tlora.tasks.dataconfig import DataConfig
from tlora.tasks.rendering import set_template
from tlora.training import train


@pytest.fixture(scope="session")
def run_of(config_in, tmp_path_factory):
    """Return the folder of a run of one step in a format."""
    made = {}

    def run(style, **data):
        if style not in made:
            fields = {"data": DataConfig(format=style, **data), "trainer": {"max_steps": 1}}
            made[style] = train.run(config_in(tmp_path_factory.mktemp("runs") / style, **fields))
        return str(made[style].path)

    return run


@pytest.fixture
def asked(run_of, other_sums, tmp_path):
    """Return an evaluation of runs, by their formats."""

    def config(*styles, **fields):
        given = {
            "models": [run_of(style) for style in styles],
            "tasks": ["jsonl"],
            "test_file": other_sums,
            "output_dir": str(tmp_path / "out"),
        }
        return EvalConfig(**given | fields)

    return config


def settled_on(config):
    return settled(config, resolve(config))


def test_rows_are_written_as_in_training(asked, run_of):
    assert settled_on(asked("raw")).data.format == "raw"
    assert settled_on(asked("alpaca")).data.format == "alpaca"
    run_of("chat", chat_template="chatml", system="Be brief.")
    data = settled_on(asked("chat")).data
    assert (data.format, data.system) == ("chat", "Be brief.")


def test_another_format_is_asked_for(asked):
    config = asked("raw", data=DataConfig(format="alpaca"))
    assert settled_on(config).data.format == "alpaca"


def test_runs_of_two_formats_are_evaluated_apart(asked):
    with pytest.raises(ConfigError, match=r"different formats \(raw: raw, alpaca: alpaca\)"):
        settled_on(asked("raw", "alpaca"))


def test_an_evaluation_in_the_alpaca_prompt_refuses_a_run_in_another(asked):
    fields = {"tasks": ["gsm8k-paper"], "test_file": None}
    with pytest.raises(ConfigError, match=r"gsm8k-paper asks in the Alpaca prompt.*\(raw: raw\)"):
        settled_on(asked("raw", **fields))
    config = asked("alpaca", **fields)
    assert settled_on(config).tasks == config.tasks
    told = asked("raw", **fields, data=DataConfig(format="alpaca"))
    assert settled_on(told) == told


def test_conversations_are_asked_in_the_form_of_training(asked, run_of):
    run_of("chat", chat_template="chatml", system="Be brief.")
    for style, prompt in (("chat", "template"), ("alpaca", "instruction"), ("raw", "auto")):
        config = asked(style, tasks=["mtbench"], test_file=None)
        assert settled_on(config).chat_prompt == prompt


def test_a_chat_run_is_asked_by_the_template_that_is_saved_with_it(asked, run_of, other_sums):
    run_of("chat", chat_template="chatml", system="Be brief.")
    config = asked("chat", limit=2)
    evaluate.run(config)
    (line, _) = EvalFolder(config.output_dir).read_samples("chat", "jsonl")
    row = json.loads(pathlib.Path(other_sums).read_text().splitlines()[0])
    assert line["prompt"] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert line["target"] == row["response"].strip()


def test_of_a_chat_the_last_answer_is_asked_for(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    set_template(tokenizer, "chatml")
    turns = [{"role": role, "content": role[0]} for role in ("user", "assistant") * 2]
    row = as_prompt({"messages": turns}, tokenizer)
    assert row["response"] == "a"
    assert row["prompt"].count("<|im_start|>assistant\n") == 2
    assert row["prompt"].endswith("<|im_start|>assistant\n")
    assert as_prompt({"prompt": "a", "response": "b"}, tokenizer) == {
        "prompt": "a",
        "response": "b",
    }
