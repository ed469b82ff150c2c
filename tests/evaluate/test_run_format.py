"""An evaluation asks in the format that its runs were trained in, unless told otherwise."""

import copy
import json
import pathlib

import pytest

from tlora.errors import ArtifactError, ConfigError
from tlora.evaluate import evaluate
from tlora.evaluate.conversations import MtBench
from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.evalfolder import EvalFolder
from tlora.evaluate.evaluated_models import EvaluatedModel, resolve
from tlora.evaluate.run_format import _saved_template, as_prompt, settled
from tlora.tasks.dataconfig import DataConfig
from tlora.tasks.rendering import set_template
from tlora.training import train


@pytest.fixture(scope="session")
def run_of(config_in, tmp_path_factory):
    """Return the folder of a run of one step in a format."""
    made = {}

    def run(style, name="", **data):
        key = name or style
        if key not in made:
            fields = {"data": DataConfig(format=style, **data), "trainer": {"max_steps": 1}}
            made[key] = train.run(config_in(tmp_path_factory.mktemp("runs") / key, **fields))
        return str(made[key].path)

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
    with pytest.raises(
        ConfigError, match=r"data.format: .*different values \(raw: raw, alpaca: alpaca\)"
    ):
        settled_on(asked("raw", "alpaca"))


def test_an_evaluation_in_the_alpaca_prompt_refuses_a_run_in_another(asked):
    fields = {"tasks": ["gsm8k-paper"], "test_file": None}
    with pytest.raises(ConfigError, match=r"gsm8k-paper uses the Alpaca prompt.*\(raw: raw\)"):
        settled_on(asked("raw", **fields))
    config = asked("alpaca", **fields)
    assert settled_on(config).tasks == config.tasks
    told = asked("raw", **fields, data=DataConfig(format="alpaca"))
    assert settled_on(told) == told


def test_conversations_are_asked_in_the_form_of_training(asked, run_of):
    run_of("chat", chat_template="chatml", system="Be brief.")
    for style, prompt in (("chat", "template"), ("alpaca", "instruction"), ("raw", "raw")):
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


@pytest.fixture
def asked_turns(run_of, tmp_path):
    """Return an MT-Bench of one question, asked of runs and their base."""
    folder = tmp_path / "data" / "mt_bench"
    (folder / "reference_answer").mkdir(parents=True)
    question = {"question_id": 81, "category": "stem", "turns": ["3+4?", "And 5?"]}
    reference = {"question_id": 81, "choices": [{"turns": ["7", "9"]}]}
    (folder / "question.jsonl").write_text(json.dumps(question))
    (folder / "reference_answer" / "gpt-4.jsonl").write_text(json.dumps(reference))

    def config(*styles, **fields):
        given = {
            "models": [run_of(style) for style in styles],
            "tasks": ["mtbench"],
            "with_base": True,
            "data_dir": str(tmp_path / "data"),
            "output_dir": str(tmp_path / "out"),
            "gen_kwargs": {"max_gen_toks": 4, "do_sample": False},
        }
        return EvalConfig(**given | fields)

    return config


def rendered(config, model, task="mtbench", key="rendered"):
    return [line[key] for line in EvalFolder(config.output_dir).read_samples(model, task)]


def test_mtbench_asks_by_the_template_and_system_message_of_the_run(asked_turns, run_of):
    run_of("chat", chat_template="chatml", system="Be brief.")
    config = asked_turns("chat")
    evaluate.run(config)
    for model in ("base", "chat"):  # the base is compared in the same words
        first, second = rendered(config, model)
        assert first == (
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\n3+4?<|im_end|>\n<|im_start|>assistant\n"
        )
        assert second.startswith(first)
        assert second.endswith(
            "<|im_end|></s>\n<|im_start|>user\nAnd 5?<|im_end|>\n<|im_start|>assistant\n"
        )


def test_what_ends_a_turn_of_the_template_ends_a_reply(asked_turns, run_of, tiny_tokenizer):
    run_of("chat", chat_template="chatml", system="Be brief.")
    tokenizer, stops = copy.deepcopy(tiny_tokenizer), []
    set_template(tokenizer, "chatml")

    class Recorder:
        def generate_until(self, requests):
            stops.extend(request.args[1]["until"] for request in requests)
            return ["7"] * len(requests)

    lm = Recorder()
    lm.tokenizer = tokenizer
    MtBench("mtbench", settled_on(asked_turns("chat"))).evaluate(lm)
    assert stops == [["<|im_end|>"], ["<|im_end|>"]]


def test_mtbench_asks_a_run_on_bare_prompts_in_bare_prompts(asked_turns):
    config = asked_turns("raw")
    evaluate.run(config)
    first, second = rendered(config, "raw")
    assert first == "3+4?"
    assert second.startswith("3+4?\n\n") and second.endswith("\n\nAnd 5?")


def test_mtbench_takes_another_template(asked_turns):
    config = asked_turns("alpaca", data=DataConfig(format="chat", chat_template="zephyr"))
    evaluate.run(config)
    assert rendered(config, "alpaca")[0].startswith("<|user|>\n3+4?")


def test_the_base_of_a_run_is_asked_in_the_same_prompts(asked, run_of):
    run_of("chat", chat_template="chatml", system="Be brief.")
    config = asked("chat", limit=2, with_base=True)
    evaluate.run(config)
    prompts = rendered(config, "chat", "jsonl", "prompt")
    assert prompts == rendered(config, "base", "jsonl", "prompt")
    assert prompts[0].startswith("<|im_start|>system\nBe brief.")


def test_runs_of_two_templates_or_system_messages_are_evaluated_apart(asked, run_of):
    run_of("chat", chat_template="chatml", system="Be brief.")
    run_of("chat", "other", chat_template="zephyr", system="Be brief.")
    run_of("chat", "longer", chat_template="chatml", system="Be long.")
    with pytest.raises(ConfigError, match=r"data.chat_template: .*\(chat, other\); evaluate"):
        settled_on(asked("chat", "other"))
    with pytest.raises(ConfigError, match=r"data.system: .*\(chat: Be brief., longer: Be long.\)"):
        settled_on(asked("chat", "longer"))
    told = asked("chat", "other", data=DataConfig(chat_template="zephyr"))
    assert settled_on(told).data.chat_template == "zephyr"


def test_a_saved_template_that_is_no_text_is_damaged(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    evaluated = EvaluatedModel("tuned", "adapter", "base", str(tmp_path), "causal")
    with pytest.raises(ArtifactError, match=r"chat_template\.jinja: damaged"):
        _saved_template(evaluated)
