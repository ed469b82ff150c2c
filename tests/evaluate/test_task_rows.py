"""Rows of a task as an evaluation: equal to the letter, or read back by the task."""

from types import SimpleNamespace

import pytest
from datasets import Dataset
from lm_eval import evaluate
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs

from tlora.errors import ConfigError
from tlora.evaluate import evaluate as evaluation
from tlora.evaluate import run_format, task_rows
from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.evaluated_models import EvaluatedModel
from tlora.evaluate.harness_task import HarnessTask
from tlora.evaluate.preflight import replied_task
from tlora.evaluate.records import metrics, records
from tlora.evaluate.task_rows import scored_rows
from tlora.registry import TASKS
from tlora.tasks import source
from tlora.tasks.dataconfig import DataConfig

CAUSAL = EvaluatedModel("m", "base", "m", None, "causal")


class Says(LM):
    """Says what it is told to."""

    def __init__(self, replies):
        super().__init__()
        self.replies = replies

    def generate_until(self, requests):
        assert all(request.args[1]["max_gen_toks"] > 0 for request in requests)
        return self.replies

    def loglikelihood(self, requests):
        raise AssertionError

    loglikelihood_rolling = loglikelihood


def scored(name, lines, replies, tmp_path, **data):
    file = tmp_path / "rows.tsv"
    file.write_text("\n".join("\t".join(line) for line in lines) + "\n")
    config = EvalConfig(
        models=["m"], tasks=[name], test_file=str(file), data=DataConfig(**data), limit=2
    )
    rows = scored_rows(replied_task(config), config)
    task = task_rows.of_rows(name, rows, replied_task(config), SimpleNamespace(chat_template=None))
    found = evaluate(lm=Says(replies), task_dict={"tasks": {name: task}}, bootstrap_iters=0)
    lines = records(task, found["samples"][name])
    return metrics(found["results"][name]), [line["scores"] for line in lines]


def test_white_space_at_the_ends_of_a_reply_does_not_count(tmp_path):
    lines = [("prompt", "response"), ("a", "x y"), ("b", "z"), ("c", "z")]
    scores, items = scored("jsonl", lines, [" x y\n", "z.", "Z"], tmp_path)
    assert scores["exact_match"] == pytest.approx(1 / 3)
    assert scores["rouge1"] == pytest.approx(1.0)  # which lowers case and reads words alone
    assert 0 < scores["chrf"] < 100
    assert [item["exact_match"] for item in items] == [1.0, 0.0, 0.0]


def test_scores_of_all_rows_together_are_the_tasks_own(tmp_path):
    lines = [("sentence", "label"), *((f"s{n}", str(n % 2)) for n in range(6))]
    replies = ["unacceptable", " acceptable", "acceptable", "nonsense"]
    replies += ["unacceptable", "acceptable"]
    scores, items = scored("cola", lines, replies, tmp_path, kind="seq2seq")
    task = TASKS.load("cola")(DataConfig(kind="seq2seq"))
    targets = ["unacceptable", "acceptable"] * 3
    expected = task.reply_metrics(replies, targets)["matthews_correlation"]
    assert 0 < expected < 1
    assert scores == {
        "matthews_correlation": pytest.approx(expected),
        "accuracy": pytest.approx(4 / 6),
    }
    assert [item["accuracy"] for item in items] == [1, 1, 0, 0, 1, 1]
    assert [list(item) for item in items] == [["accuracy"]] * 6


def test_a_number_that_is_read_back_is_scored_with_the_others(tmp_path):
    lines = [("sentence1", "sentence2", "label")]
    lines += [(f"a{n}", f"b{n}", str(n)) for n in range(5)]
    replies = ["0.2", "1.0", "1.8", "3.4", "none"]
    scores, items = scored("stsb", lines, replies, tmp_path, kind="seq2seq")
    task = TASKS.load("stsb")(DataConfig(kind="seq2seq"))
    targets = [f"{n:.1f}" for n in range(5)]
    assert scores == pytest.approx(task.reply_metrics(replies, targets))
    assert items == [{}] * 5


@pytest.fixture
def hub(monkeypatch):
    """Ten rows of any dataset; what was asked for is noted."""
    asked = []

    def read(name, config, split):
        asked.append((name, config, split))
        rows = [{"sentence": f"s{n}", "label": n % 2, "prompt": f"{n}"} for n in range(10)]
        return Dataset.from_list([row | {"response": "r"} for row in rows])

    monkeypatch.setattr(source, "read_hub", read)
    return asked


def read(name, **data):
    config = EvalConfig(models=["m"], tasks=[name], data=DataConfig(**data))
    return [row["text"] for row in scored_rows(TASKS.load(name)(config.data), config, limited=True)]


def test_the_rows_that_are_named_are_scored_the_first_or_drawn(hub):
    read("sst2")
    read("sst2", eval_split="test")
    read("sst2", dataset="mine", dataset_config="part", eval_split="dev")
    own = ("nyu-mll/glue", "sst2")
    assert hub == [(*own, "validation"), (*own, "test"), ("mine", "part", "dev")]
    assert read("sst2", max_eval_rows=3) == ["s0", "s1", "s2"]
    drawn = read("sst2", max_eval_rows=3, subset_seed=1)
    assert len(drawn) == 3
    assert drawn == read("sst2", max_eval_rows=3, subset_seed=1) != ["s0", "s1", "s2"]


def test_a_dataset_on_the_hub_is_one_task_of_prompts_and_responses(hub, monkeypatch):
    tokenizer = SimpleNamespace(chat_template=None)
    monkeypatch.setattr(run_format, "template_tokenizer", lambda *_: tokenizer)
    data = DataConfig(dataset="mine", eval_split="test", max_eval_rows=4)
    config = EvalConfig(models=["m"], tasks=["jsonl"], data=data)
    (task,) = evaluation.make_tasks(config, [CAUSAL]).values()
    assert task.items == 4
    assert hub == [("mine", None, "test")]


@pytest.mark.parametrize(
    ("fields", "data", "says"),
    [
        ({}, {}, "the task has no default dataset; give --test_file, or --data.dataset"),
        ({}, {"dataset": "mine"}, "the split of 'mine' to score is missing"),
        ({}, {"dataset_config": "a"}, "`data.dataset_config` requires `data.dataset`"),
        (
            {"test_file": "f.jsonl"},
            {"eval_split": "test"},
            "`data.eval_split` and --test_file both give the rows to score",
        ),
    ],
)
def test_rows_that_are_named_twice_or_not_are_refused(hub, fields, data, says):
    config = EvalConfig(models=["m"], tasks=["jsonl"], data=DataConfig(**data), **fields)
    with pytest.raises(ConfigError, match=says):
        scored_rows(TASKS.load("jsonl")(config.data), config)
    assert hub == []


def test_what_is_of_training_alone_is_refused():
    given = {"train_split": "dev", "loss_on": "all", "max_train_rows": 5, "overlap": "drop"}
    given |= {"guard": "gsm8k-paper", "guard_dir": "data"}
    with pytest.raises(ConfigError) as error:
        EvalConfig(models=["m"], tasks=["sst2"], data=DataConfig(**given))
    expected = {f"`data.{name}` only applies to training; remove it." for name in given}
    assert set(error.value.faults) == expected


def test_how_rows_are_read_is_refused_where_the_rows_are_an_evaluations():
    data = DataConfig(max_eval_rows=5)
    config = EvalConfig(models=["m"], tasks=["gsm8k-paper"], data=data)
    with pytest.raises(ConfigError, match=r"`data\.max_eval_rows` only applies to your own rows"):
        evaluation.make_tasks(config, [CAUSAL])


def test_labels_are_not_asked_as_text_unless_the_task_is(tmp_path):
    lines = [("sentence", "label"), ("s", "1")]
    with pytest.raises(
        ConfigError, match="'sst2' is a classification task, but the models are generative"
    ):
        scored("sst2", lines, ["positive"], tmp_path)


def test_what_the_user_says_of_generation_wins_over_the_task(tmp_path):
    given = {"max_new_tokens": 5, "temperature": 0.5}
    config = EvalConfig(models=["m"], tasks=["t"], gen_kwargs=given)
    task = task_rows.rows_task("t", [{"item": "0", "prompt": "p", "target": "long response"}])
    asked = HarnessTask(task, config)
    (request,) = (task.build_all_requests(), task.instances)[1]
    said = normalize_gen_kwargs(request.args[1])
    assert (said["max_gen_toks"], said["temperature"], said["do_sample"]) == (5, 0.5, True)
    assert (asked.items, asked.shots) == (1, 0)


def test_a_system_instruction_stands_a_blank_line_before_the_prompt(tmp_path):
    asked = []

    class Asked(Says):
        def generate_until(self, requests):
            asked.extend(request.args[0] for request in requests)
            return self.replies

    config = EvalConfig(models=["m"], tasks=["t"], system_instruction="Be brief.")
    task = task_rows.rows_task("t", [{"item": "0", "prompt": "p", "target": "r"}])
    answers = HarnessTask(task, config).evaluate(Asked(["r"]))
    assert asked == ["Be brief.\n\np"]
    perfect = {"exact_match": 1.0, "rouge1": 1.0, "rouge2": 0.0, "rougeL": 1.0, "chrf": 100.0}
    assert answers.scores == pytest.approx(perfect)
