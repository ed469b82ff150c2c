"""What flags and files tell is said before anything slow is imported: a table of wrong commands."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "trl", "datasets", "lm_eval", "peft")
TRAIN = "train --model {}/model --train_file {}/rows.jsonl --output_dir {}/new"
COMPARE = (
    "compare --methods lora,tlora --learning_rates 1e-3 --model {}/model"
    " --train_file {}/rows.jsonl --test_file {}/rows.jsonl --output_dir {}/new"
)
EVAL = "eval {}/model --output_dir {}/new"

# The command, and what its one error says.
COMMANDS = (
    # Where the run is, and what it is made from.
    ("train --model {}/nowhere --train_file {}/rows.jsonl", "there is no folder '{}/nowhere'"),
    ("train --train_file {}/rows.jsonl", "`model` is missing"),
    ("train --model {}/empty --train_file {}/rows.jsonl", "{}/empty has no config.json"),
    ("train --model {}/rows.jsonl", "{}/rows.jsonl is a file; give the folder of a model"),
    (
        "train --model no/such --train_file {}/rows.jsonl",
        "no model of this name in the Hub's cache",
    ),
    (
        "train --model {}/model --train_file {}/empty",
        "{}/empty is a folder; give the path of a file",
    ),
    ("train --model {}/model", "no training rows; give --train_file or --data.dataset"),
    ("train --model {}/model --train_file {}/no.jsonl", "{}/no.jsonl: there is no such file"),
    ("train --model {}/model --train_file {}/rows.xml", "files of type '.xml' are not supported"),
    ("train --model {}/model --train_file {}/empty.csv", "{}/empty.csv: there are no rows"),
    (f"{TRAIN} --eval_file {{}}/no.csv", "{}/no.csv: there is no such file"),
    (f"{TRAIN} --data.eval_split test", "`data.eval_split` requires `data.dataset`"),
    (f"{TRAIN} --output_dir {{}}/rows.jsonl", "{}/rows.jsonl is a file; choose another"),
    (f"{TRAIN} --output_dir {{}}/model", "{}/model is not empty and holds no run"),
    (f"{TRAIN} --output_dir {{}}/rows.jsonl/run", "cannot be written to; choose another"),
    (f"{TRAIN} --calibration.cache {{}}/rows.jsonl/c", "cannot be written; give another file"),
    (f"{TRAIN} --preset nosuch", "there is no preset 'nosuch'"),
    # Columns.
    (
        f"{TRAIN} --data.prompt_column q",
        "`data.prompt_column` is 'q', but the rows have no such column",
    ),
    (f"{TRAIN} --data.prompt_template {{a}}", "has {a}, but the rows have no such column"),
    (f"{TRAIN} --data.kind classification", "`data.text_column` is missing"),
    # Method, task and trainer.
    (f"{TRAIN} --method tlroa", "there is no method 'tlroa'. Did you mean 'tlora'?"),
    (f"{TRAIN} --task nosuch", "there is no task 'nosuch'"),
    (f"{TRAIN} --task gsm8k --data.kind regression", "`data.kind` is 'regression', but this task"),
    (f"{TRAIN} --adapter.rank 4", "there is no option `rank`"),
    (f"{TRAIN} --adapter.r 0", "`r` is 0; give a whole number, 1 or more"),
    (f"{TRAIN} --trainer.learning_rte 1", "no field `learning_rte`. Did you mean 'learning_rate'?"),
    (f"{TRAIN} --trainer.learning_rate fast", "`learning_rate` is 'fast'; give a positive number"),
    (f"{TRAIN} --trainer.learning_rate -1", "`learning_rate` is -1; give a positive number"),
    (f"{TRAIN} --trainer.dataloader_num_workers -1", "give a whole number, 0 or more"),
    (f"{TRAIN} --adapter.task_type SEQ_CLS", "`task_type` is 'SEQ_CLS', but this task is"),
    (f"{TRAIN} --adapter.layers_to_transform 0", "needs `target_modules` as a list of names"),
    (f"{COMPARE} --trainer.per_device_train_batch_size 0", "give a whole number, 1 or more"),
    (f"{TRAIN} --trainer.fp16 maybe", "`fp16` is 'maybe'; give true or false"),
    (f"{TRAIN} --trainer.eval_strategy epoch", "`eval_strategy` is 'epoch', but there are no"),
    (f"{TRAIN} --data.guard nosuch", "there is no built-in evaluation 'nosuch'"),
    (f"{TRAIN} --data.guard humaneval-paper", "'humaneval-paper' has its own wording"),
    (f"{TRAIN} --data.guard gsm8k-paper --data.guard_dir {{}}", "has none of gsm8k/test.jsonl"),
    ("train --resume --output_dir {}/new", "there is no run in {}/new to resume"),
    # Initialization.
    ("init --model {}/nowhere --train_file {}/rows.jsonl", "there is no folder '{}/nowhere'"),
    ("init --dry_run --model {}/nowhere", "there is no folder '{}/nowhere'"),
    ("init --dry_run --model {}/model --trainer.lr 1", "there is no field `lr`"),
    # Comparison.
    (f"{COMPARE} --methods lora,nosuch", "there is no method 'nosuch'"),
    (f"{COMPARE} --adapter.nosuch 1", "there is no option `nosuch`"),
    (f"{COMPARE} --learning_rates []", "`learning_rates` is []"),
    (f"{COMPARE} --trainer.per_device_train_batch_size many", "is 'many'; give a whole number"),
    (f"{COMPARE} --task nosuch", "there is no task 'nosuch'"),
    (f"{COMPARE} --metric bleu", "`metric` is 'bleu', but the scores are 'loss', 'exact_match'"),
    (f"{COMPARE} --validation {{}}/no.jsonl", "{}/no.jsonl: there is no such file"),
    (f"{COMPARE} --test_file null", "there are no test rows; give --test_file"),
    (f"{COMPARE} --output_dir {{}}/model", "{}/model holds something else"),
    # Conversation.
    ("chat {}/nowhere", "there is no folder '{}/nowhere'"),
    ("chat {}/empty --prompt Hello", "{}/empty contains no model"),
    ("chat {}/model --prompt Hello --chat_template nosuch", "`data.chat_template` is 'nosuch'"),
    ("chat {}/model --prompt Hello --max_new_tokens 0", "give a whole number, 1 or more"),
    # Evaluation.
    (f"{EVAL} --tasks nosuch", "there is no task 'nosuch'. Run `tlora list evaluations`"),
    (f"{EVAL} --tasks gsm8k-papr", "Did you mean 'gsm8k-paper'?"),
    (f"{EVAL} --tasks gsm9k", "there is no task 'gsm9k'. Did you mean"),
    (f"{EVAL} --tasks humaneval-paper", "'humaneval-paper' runs programs written by the model"),
    (f"{EVAL} --tasks humaneval", "'humaneval' of lm-evaluation-harness runs programs"),
    (f"{EVAL} --tasks gsm8k-paper --data_dir {{}}", "{} has none of gsm8k/test.jsonl"),
    (f"{EVAL} --tasks jsonl", "'jsonl' is a training task; give --test_file"),
    (f"{EVAL} --tasks jsonl --test_file {{}}/no.jsonl", "{}/no.jsonl: there is no such file"),
    (f"{EVAL} --tasks sst2 --test_file {{}}/rows.jsonl", "'sst2' is a classification task"),
    (f"{EVAL} --tasks swag --data.prompt_column q", "no rows are given; add --test_file"),
    ("eval {}/empty --tasks swag", "{}/empty contains no model (config.json), adapter"),
    ("eval {}/gone --tasks swag", "there is no folder '{}/gone'"),
    ("eval ./gone --tasks swag", "there is no folder './gone'"),
    ("eval {}/adapter --tasks swag", "cannot read a model at '{}/base', the base of {}/adapter"),
    (
        "eval {}/model {}/model --tasks swag",
        "would all have the name 'model'; name them: NAME=PATH",
    ),
    ("eval {}/classifier --tasks gsm8k-paper", "'gsm8k-paper' is generative, but the models are"),
    (
        "eval {}/classifier {}/model --tasks swag",
        "classifiers cannot be evaluated together with generative models",
    ),
    (f"{EVAL} --tasks swag --backend vllm --quantization nf4", "do not apply to vLLM"),
    (f"{EVAL} --tasks mtbench --judge.url http://h/v1", "`judge.model` is missing"),
    (
        f"{EVAL} --tasks mtbench --judge.url http://h/v1 --judge.model j --judge.prompts {{}}/no",
        "not FastChat's prompts",
    ),
    (f"{EVAL} --tasks swag --output_dir {{}}/model", "{}/model holds something else"),
    # The rest.
    ("inspect {}/nowhere", "{}/nowhere: there is no such file"),
    ("inspect {}/model", "{}/model: there is no plan.safetensors"),
    (
        "inspect {}/model --against lora",
        "{}/model contains no comparison and no adapter; remove --against",
    ),
    ("demo --output_dir {}/model", "{}/model is not empty and holds no run"),
)

SCRIPT = """
import contextlib, io, json, sys
from tlora.cli import main
said = []
for argv in json.load(sys.stdin):
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = main(argv)
    said.append((code, err.getvalue(), [name for name in sys.argv[1:] if name in sys.modules]))
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with what the commands name."""
    here = tmp_path_factory.mktemp("early")
    (here / "rows.jsonl").write_text('{"prompt": "1+1=", "response": "2"}\n')
    (here / "rows.xml").write_text("<rows/>")
    (here / "empty.csv").touch()
    (here / "empty").mkdir()
    configs = {
        "model/config.json": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        "classifier/config.json": {"architectures": ["LlamaForSequenceClassification"]},
        "adapter/adapter_config.json": {"base_model_name_or_path": str(here / "base")},
    }
    for name, fields in configs.items():
        (here / name).parent.mkdir()
        (here / name).write_text(json.dumps(fields))
    return here


def spoken(commands):
    """Run commands in one fresh process; return (exit code, stderr, heavy modules) of each."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *HEAVY],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def filled(text, folder):
    return text.replace("{}", str(folder))


def test_what_flags_and_files_tell_is_said_before_anything_slow_is_imported(folder):
    before = sorted(folder.rglob("*"))
    found = spoken([filled(command, folder).split() for command, _ in COMMANDS])
    for (command, sentence), (code, said, loaded) in zip(COMMANDS, found, strict=True):
        assert filled(sentence, folder) in said, command
        assert code == 2, command
        assert loaded == [], command
    assert sorted(folder.rglob("*")) == before


def test_all_faults_come_in_one_error(folder):
    train = "train --model {}/gone --train_file {}/no.jsonl --eval_file {}/rows.xml --adapter.r 0"
    train += " --trainer.nosuch 1 --data.guard nosuch --output_dir {}/new"
    evaluation = "eval {}/gone --tasks nosuch --output_dir {}/model --judge.url http://h/v1"
    evaluation += " --judge.model j --judge.prompts {}/no"
    found = spoken([filled(command, folder).split() for command in (train, evaluation)])
    (code, said, loaded), (other_code, other, other_loaded) = found
    assert (code, loaded, other_code, other_loaded) == (2, [], 2, [])
    assert "\ntlora: run: 6 faults:\n" in said
    assert f"  - {folder}/no.jsonl: there is no such file" in said
    assert "  - trainer: there is no field `nosuch`." in said
    assert other.startswith("tlora: eval: 4 faults:\n")


def test_a_module_that_is_imported_is_seen(folder):
    argv = ["init", "--dry_run", "--model", str(folder / "model"), "--output_dir", "new"]
    ((_, _, loaded),) = spoken([argv])
    assert {"torch", "transformers"} <= {*loaded}
