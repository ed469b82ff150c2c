"""One row of the paper's tables from rows to JSON, by the command line, on models of two layers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import judge_server
from tlora.cli import VERBS, main
from tlora.parsing import parse
from tlora.training.trainers import LogCallback

FOLDER = Path(__file__).parents[2] / "benchmarks" / "paper"
TRAIN = (
    "--trainer.max_steps 2 --trainer.save_steps 1 --trainer.per_device_train_batch_size 2"
    " --trainer.gradient_accumulation_steps 1 --adapter.r 2 --adapter.lora_alpha 2"
    " --calibration.samples 4 --calibration.batch_size 2 --trainer.disable_tqdm true"
    " --trainer.use_cpu true --trainer.bf16 false"
)
EVAL = "--gen_kwargs max_gen_toks=4 --max_length 1000"
CHOICES = {
    "boolq": "true",
    "piqa": "solution1",
    "hellaswag": "ending1",
    "winogrande": "option1",
    **dict.fromkeys(("social_i_qa", "ARC-Easy", "ARC-Challenge", "openbookqa"), "answer1"),
}


@pytest.fixture
def run(script):
    return script("paper", "run")


def lines(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A few rows of each group, in the layout that the script's help describes."""
    folder = tmp_path_factory.mktemp("data")
    numbers = range(8)
    sums = [{"query": f"{n}+{n}?", "response": f"The answer is: {2 * n}"} for n in numbers]
    lines(folder / "train" / "math.jsonl", sums)
    lines(folder / "gsm8k" / "test.jsonl", [{"question": "1+1?", "answer": "2\n#### 2"}])
    lines(folder / "math" / "test.jsonl", [{"problem": "1+1?", "solution": r"\boxed{2}"}])
    lines(folder / "train" / "code.jsonl", [{"query": f"{n}?", "answer": "pass"} for n in numbers])
    program = {"entry_point": "f", "canonical_solution": "    return 1\n"}
    program |= {"task_id": "HumanEval/0", "prompt": "def f():\n"}
    check = "def check(candidate):\n    assert candidate() == 1\n"
    lines(folder / "humaneval" / "test.jsonl", [program | {"test": check}])
    problem = {"task_id": 11, "text": "a?", "code": "def f():\n    return 1"}
    tests = {"test_list": ["assert f() == 1"], "test_setup_code": "", "challenge_test_list": []}
    lines(folder / "mbpp" / "test.jsonl", [problem | tests])
    picks = [{"instruction": f"{n}?", "output": "the correct answer is true"} for n in numbers]
    lines(folder / "train" / "commonsense.jsonl", picks)
    for name, answer in CHOICES.items():
        asked = {"instruction": "a?", "input": "", "output": f"the correct answer is {answer}"}
        (folder / name).mkdir()
        (folder / name / "test.json").write_text(json.dumps([asked | {"answer": answer}]))
    chats = [{"instruction": f"say {n}", "output": str(n)} for n in numbers]
    lines(folder / "train" / "chat.jsonl", chats)
    question = {"question_id": 81, "category": "writing", "turns": ["a?", "b?"]}
    lines(folder / "mt_bench" / "question.jsonl", [question])
    reference = {"question_id": 101, "choices": [{"index": 0, "turns": ["a", "b"]}]}
    lines(folder / "mt_bench" / "reference_answer" / "gpt-4.jsonl", [reference])
    for task in ("cola", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "mnli"):
        for split, count in (("train", 8), ("dev", 4)):
            lines(folder / "glue" / task / f"{split}.jsonl", glue_rows(task, split, count))
    return folder


def glue_rows(task: str, split: str, count: int) -> list[dict]:
    """Rows with the columns of every task: each reads its own."""
    pairs = ("sentence1", "sentence2", "question1", "question2", "question", "sentence")
    columns = (*pairs, "premise", "hypothesis")
    return [
        {column: f"{split} {column} {n}" for column in columns} | {"label": n % 2}
        for n in range(count)
    ]


@pytest.fixture
def asked(data, tmp_path):
    def words(row: str, base: str, *more: str) -> list[str]:
        flags = ["--base", base, "--data", str(data), "--out", str(tmp_path / "out")]
        return [row, *flags, "--train", TRAIN, "--eval", EVAL, *more]

    return words


@pytest.fixture
def wide_llama(saved, tiny_llama) -> str:
    return saved(tiny_llama(max_position_embeddings=1024))


def read(tmp_path: Path, row: str) -> dict:
    return json.loads((tmp_path / "out" / "results" / f"{row.replace('/', '-')}.json").read_text())


def test_every_row_is_commands_that_the_command_line_takes(run):
    for name, row in run.rows().items():
        commands = run.commands(run.arguments([name, "--print"]))
        assert len(commands) == (16 if row.group == "glue" else 2)
        for train, evaluate in zip(commands[::2], commands[1::2], strict=True):
            trained, asked = (
                parse(verb, VERBS[verb].record, words).record for verb, *words in (train, evaluate)
            )
            assert asked.models == [trained.output_dir]
            assert trained.model in ("meta-llama/Llama-2-7b-hf", "google-t5/t5-base")
        assert len(row.paper) == len(run.GROUPS[row.group].columns)


def test_the_list_has_every_row_and_those_that_are_not_run(run, capsys):
    assert run.main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [*run.rows(), "13B", "Llama-3-8B", "70B"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name a row; --list shows the rows."),
        (["math/tlore"], "no row 'math/tlore'. Did you mean 'math/tlora'? --list shows"),
        (["code/tlora"], "give --allow_code_execution"),
        (["math/tlora", "--data", "none"], "--data none: there is no such folder."),
        (["math/tlora", "--eval", "--gen_kwargs 'a"], "--eval cannot be split into words: No clo"),
    ],
)
def test_words_that_make_no_row_are_refused_before_anything_runs(run, words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(words, tlora=lambda command: pytest.fail(str(command)))
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_a_row_is_trained_evaluated_and_written_down(run, asked, wide_llama, tmp_path):
    assert run.main(asked("math/tlora", wide_llama), tlora=main) == 0
    found = read(tmp_path, "math/tlora")
    assert found["paper"] == {"GSM8K": 56.34, "MATH": 9.08}
    scores = found["scores"]
    assert found["ours"] == {
        "GSM8K": 100 * scores["gsm8k-paper"]["exact_match"],
        "MATH": 100 * scores["math-paper"]["exact_match"],
    }
    assert found["overridden"] == ["base", "data", "train", "eval"]
    assert found["trainings"][0]["config"]["model"] == wide_llama
    assert found["trainings"][0]["trainable_parameters"] > 0
    assert found["commands"][0].startswith("tlora train --preset paper-math --method tlora ")


def test_a_row_that_was_stopped_resumes(run, asked, wide_llama, tmp_path, monkeypatch):
    words = asked("math/lora", wide_llama)
    assert run.main([*words, "--out", str(tmp_path / "whole")], tlora=main) == 0

    def stop(self, args, state, control, **_):
        if state.global_step == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LogCallback, "on_save", stop, raising=False)
        assert run.main(words, tlora=main) == 130
    assert not (tmp_path / "out" / "results").exists()
    steps = []
    monkeypatch.setattr(
        LogCallback, "on_step_end", lambda self, args, state, *_, **__: steps.append(state)
    )
    assert run.main(words, tlora=main) == 0
    assert len(steps) == 1  # of two
    first = read(tmp_path, "math/lora")
    assert run.main(words, tlora=main) == 0
    assert len(steps) == 1
    assert read(tmp_path, "math/lora") | {"provenance": first["provenance"]} == first
    kept = [
        load_file(folder / "math" / "lora" / "adapter" / "adapter_model.safetensors")
        for folder in (tmp_path / "whole", tmp_path / "out")
    ]
    assert all(value.equal(kept[1][name]) for name, value in kept[0].items())


def test_commonsense_is_the_mean_of_eight_and_chat_waits_for_a_judge(
    run, asked, wide_llama, tmp_path, monkeypatch
):
    assert run.main(asked("commonsense/dora", wide_llama), tlora=main) == 0
    found = read(tmp_path, "commonsense/dora")
    assert len(found["scores"]) == 8
    each = [next(iter(scored.values())) for scored in found["scores"].values()]
    assert found["ours"] == {"average": pytest.approx(100 * sum(each) / 8)}
    words = asked("chat/lora", wide_llama)
    assert run.main(words, tlora=main) == 0
    assert read(tmp_path, "chat/lora")["ours"] == {"MT-Bench": None}
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with judge_server.running() as judge:
        judge.script = [judge_server.says(f"Rating: [[{grade}]]") for grade in (4, 7)]
        graded = f"{EVAL} --judge.url {judge.url} --judge.model judge --judge.concurrency 1"
        assert run.main([*words, "--eval", graded], tlora=main) == 0
    assert read(tmp_path, "chat/lora")["ours"] == {"MT-Bench": 5.5}


def test_programs_are_run_where_it_is_allowed(run, asked, wide_llama, tmp_path):
    words = asked("code/tlora", wide_llama, "--allow_code_execution")
    assert run.main(words, tlora=main) == 0
    found = read(tmp_path, "code/tlora")
    assert found["ours"] == {"HumanEval": 0.0, "MBPP": 0.0}
    assert "--allow_code_execution" in found["commands"][1]


def test_glue_is_the_mean_of_its_tasks_on_t5(run, asked, saved, tiny_t5, tmp_path, monkeypatch):
    for task in ("qnli", "qqp", "rte", "sst2"):  # four do: each kind of label and of metric
        monkeypatch.delitem(run.GLUE, task)
    monkeypatch.setitem(run.GROUPS["glue"].columns, "average", ",".join(run.GLUE))
    words = asked("glue/tlora", saved(tiny_t5()))
    words[words.index(EVAL)] = ""
    assert run.main(words, tlora=main) == 0
    found = read(tmp_path, "glue/tlora")
    assert list(found["scores"]) == list(run.GLUE)
    assert len(found["trainings"]) == 4
    assert 0 <= found["ours"]["average"] <= 100


def test_several_metrics_of_a_task_count_by_their_mean(run):
    glue = run.GROUPS["glue"]
    scores = {name: dict.fromkeys(metrics, 0.5) for name, metrics in run.GLUE.items()}
    scores["mrpc"] = {"accuracy": 0.1, "f1": 0.3}
    assert run._figure(glue, "average", scores) == pytest.approx(100 * (7 * 0.5 + 0.2) / 8)


def test_the_shell_script_hands_its_words_on():
    done = subprocess.run(
        [FOLDER / "run.sh", "glue/lora", "--print"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[0] == (
        "tlora train --preset paper-glue --method lora --task cola --output_dir runs/glue/lora/cola"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_command_that_runs_come_to_its_end(run, number, tmp_path, monkeypatch):
    started, ended = tmp_path / "started", tmp_path / "ended"
    job = (
        "import pathlib, sys, time\n"
        f"try:\n    pathlib.Path({str(started)!r}).touch()\n    time.sleep(300)\n"
        "except KeyboardInterrupt:\n    time.sleep(1)\n"
        f"    pathlib.Path({str(ended)!r}).touch()\n    sys.exit(130)\n"
    )
    children = []

    def popen(command, real=subprocess.Popen):
        children.append(real([sys.executable, "-c", job]))
        return children[0]

    def send():
        while not started.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)
        if number == signal.SIGINT:  # which a terminal sends to both
            children[0].send_signal(number)

    monkeypatch.setattr(subprocess, "Popen", popen)
    sender = threading.Thread(target=send)
    sender.start()
    assert run.by_process([]) == 130
    sender.join()
    assert ended.exists()
