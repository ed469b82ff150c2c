"""The last lines of a training name only what fits the run."""

import json

import pytest

from tlora.training import closing
from tlora.training.runfolder import RunFolder


@pytest.fixture
def folder(tmp_path):
    made = RunFolder(tmp_path / "my run")
    made.adapter.mkdir(parents=True)
    made.config = lambda: {"task": "jsonl", "data": {"kind": "causal"}}
    return made


@pytest.mark.parametrize(
    ("fields", "verbs"),
    [
        ({}, ["chat", "eval", "export"]),
        ({"use_dora": True}, ["chat", "eval"]),
        ({"bias": "all"}, ["chat", "eval"]),
        ({"peft_type": "VERA"}, ["chat", "eval"]),
        ({"task_type": "SEQ_2_SEQ_LM"}, ["chat", "eval"]),
        ({"task_type": "SEQ_CLS", "modules_to_save": ["score"]}, ["chat", "eval"]),
    ],
)
def test_the_next_commands_are_those_that_take_the_adapter(folder, fields, verbs):
    saved = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none"} | fields
    (folder.adapter / "adapter_config.json").write_text(json.dumps(saved))
    commands = closing.next_commands(folder).removeprefix("Next: ").split(" · ")
    assert [command.split()[:2] for command in commands] == [["tlora", verb] for verb in verbs]
    assert all(f" '{folder.path}'" in command for command in commands)
    assert commands[1].endswith(" --with_base --test_file FILE")


@pytest.mark.parametrize(
    "config",
    [
        {"task": "gsm8k", "data": {}},
        {"task": "jsonl", "data": {"kind": "classification"}},
        {"task": "jsonl", "data": {"prompt_column": "question"}},
    ],
)
def test_an_evaluation_that_needs_more_flags_is_not_suggested(folder, config):
    saved = {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
    (folder.adapter / "adapter_config.json").write_text(json.dumps(saved))
    folder.config = lambda: config
    assert "tlora eval" not in closing.next_commands(folder)


def test_a_run_without_an_adapter_has_no_next_commands(folder):
    assert closing.next_commands(folder) == ""


def test_scores_are_one_sentence(folder):
    assert closing.held_out(folder) == ""
    scores = {"loss": 0.49712, "entropy": 1.2, "mean_token_accuracy": 0.894, "epoch": 2.0}
    folder.metrics.write_text(json.dumps(scores))
    folder.measured = lambda: {"held_out_rows": 6}
    assert closing.held_out(folder) == ("On the 6 held-out rows: loss 0.497, token accuracy 0.894.")
