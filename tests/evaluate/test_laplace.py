"""`tlora eval --laplace`: averaged predictions beside the plain ones, and how good each is."""

import json
import math
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from tlora.errors import ConfigError
from tlora.evaluate import evaluate, laplace, loading
from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.evalfolder import EvalFolder
from tlora.evaluate.evaluated_models import EvaluatedModel
from tlora.evaluations import catalog
from tlora.report import evaluation as report
from tlora.training import train
from tlora.training.runconfig import CalibrationConfig, RunConfig


def rows(path, count):
    lines = [
        f"{'bleak' if n % 3 else 'charming'} {'and ' * (n % 5)}end\t{n % 2}" for n in range(count)
    ]
    Path(path).write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, saved, tiny_bert_classifier):
    """A run of each method: its folder."""
    folder = tmp_path_factory.mktemp("runs")
    base = saved(tiny_bert_classifier().bert)
    made = {}
    for method in ("tlora", "lora", "mica", "lora-xs"):
        config = RunConfig(
            model=base,
            task="sst2",
            method=method,
            train_file=rows(folder / "train.tsv", 24),
            output_dir=str(folder / method),
            calibration=CalibrationConfig(samples=4),
            adapter={"r": 2, "target_modules": ["query", "value"]},
            trainer={"max_steps": 4, "learning_rate": 1e-2, "use_cpu": True, "disable_tqdm": True},
        )
        made[method] = str(train.run(config).path)
    return made


def labeled(runs, here, **fields):
    test = rows(here / "dev.tsv", 9)
    given = {"models": [runs["tlora"]], "tasks": ["sst2"], "test_file": test, "laplace": True}
    return EvalConfig(**given | fields)


def logits(model, batch):
    return model(**batch).logits


def test_of_a_classifier_odds_stand_beside_the_plain_ones(runs, here):
    folder = evaluate.run(labeled(runs, here))
    found = folder.read()
    assert [(each["name"], each["kind"]) for each in found["models"]] == [
        ("tlora", "adapter"),
        ("tlora-laplace", "laplace"),
    ]
    (task,) = found["tasks"]
    assert task["metrics"] == ["accuracy", "-nll", "-ece"]
    plain, averaged = (task["scores"][name] for name in ("tlora", "tlora-laplace"))
    assert plain["-nll"] != averaged["-nll"]
    for name, scores in task["scores"].items():
        lines = folder.read_samples(name, "sst2")
        nll = sum(line["scores"]["-nll"] for line in lines) / len(lines)
        assert scores["-nll"] == pytest.approx(nll)
        assert -1 <= scores["-ece"] <= 0
    assert "| sst2 | nll, lower is better |" in report.write("tlora-eval").text


def test_with_an_infinite_prior_precision_the_predictions_are_the_plain_ones(
    runs, here, monkeypatch
):
    monkeypatch.setattr(laplace, "evidence_precision", lambda *_: math.inf)
    found = evaluate.run(labeled(runs, here, models=[runs["lora"]])).read()
    scores = found["tasks"][0]["scores"]
    assert scores["lora-laplace"] == pytest.approx(scores["lora"], abs=1e-6)


def test_a_factor_that_its_run_froze_does_not_vary(runs):
    found = {}
    for method, path in runs.items():
        (evaluated,) = evaluate.evaluated_models.resolve(EvalConfig(models=[path], tasks=["sst2"]))
        model = loading.load(evaluated, EvalConfig(models=[path], tasks=["sst2"]), num_labels=2)
        found[method] = laplace.Laplace(evaluated, model, seed=0)._layers
    assert len(found["lora"]) == 2 * len(found["tlora"]) > 0
    assert found["lora-xs"].keys() == found["tlora"].keys()
    for method, part in (("tlora", "lora_B"), ("mica", "lora_A")):
        assert len(found[method]) == len(found["tlora"])
        assert all(name.endswith(part) for name in found[method])


def choice(here, with_training=True):
    items = [{"q": f"{n}+1=", "right": n % 2, "options": ["5", "7", "12"]} for n in range(6)]
    for name, some in (("test", items[:3]), ("train", items[3:])):
        (here / f"{name}.json").write_text(json.dumps(some))
    (here / "choice.yaml").write_text(
        "task: choice\ndataset_path: json\n"
        "dataset_kwargs: {data_files: {test: test.json, train: train.json}}\n"
        f"{'training_split: train' * with_training}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{q}}'\ndoc_to_choice: '{{options}}'\ndoc_to_target: right\n"
        "target_delimiter: ''\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )


@pytest.fixture
def choices(here, demo_adapter, monkeypatch):
    # The harness's index of 14,000 tasks takes seconds to read.
    none = TaskManager(include_defaults=False)
    monkeypatch.setattr(catalog, "_theirs", lambda: none)
    choice(here)
    return {"models": [demo_adapter], "tasks": ["./choice.yaml"], "laplace": True}


def test_of_choices_odds_stand_beside_the_plain_ones(choices, here, monkeypatch):
    (task,) = evaluate.run(EvalConfig(**choices, batch_size=1)).read()["tasks"]
    assert task["metrics"] == ["acc", "acc_norm", "-nll", "-ece"]
    plain, averaged = (task["scores"][name] for name in ("drawn", "drawn-laplace"))
    assert averaged["-nll"] != plain["-nll"]
    monkeypatch.setattr(laplace, "evidence_precision", lambda *_: math.inf)
    (task,) = evaluate.run(EvalConfig(**choices, output_dir="sure")).read()["tasks"]
    assert task["scores"]["drawn-laplace"] == pytest.approx(plain, abs=1e-5)
    assert task["scores"]["drawn"] == pytest.approx(plain, abs=1e-5)


def test_what_has_no_odds_is_refused(choices, runs, here, demo_file, demo_adapter):
    choice(here, with_training=False)
    cases = [
        (choices, "`laplace` does not support choice, which needs classes, or choices by"),
        (
            choices | {"tasks": ["jsonl"], "test_file": demo_file},
            "`laplace` does not support jsonl",
        ),
        (choices | {"backend": "vllm"}, "`laplace` needs gradients"),
        (choices | {"laplace": False, "train_file": "x"}, "`train_file` has no effect"),
    ]
    for fields, sentence in cases:
        with pytest.raises(ConfigError, match=sentence):
            evaluate.run(EvalConfig(**fields))
    base = EvaluatedModel("b", "laplace", "base", demo_adapter, "labeled")
    with pytest.raises(ConfigError, match="give --train_file"):
        laplace.training_rows(base, None, None)
    model = json.loads((Path(demo_adapter) / "adapter_config.json").read_text())
    with pytest.raises(ConfigError, match="`laplace` needs an adapter, but none is given"):
        evaluate.run(EvalConfig(**choices | {"models": [model["base_model_name_or_path"]]}))
    assert not EvalFolder("tlora-eval").exists
