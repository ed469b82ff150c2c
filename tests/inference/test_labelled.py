"""A trained classifier's scores are those that its training ended with, whatever the batch."""

import json
import random
import shutil
from pathlib import Path

import pytest

from tlora.errors import AdapterError, ConfigError
from tlora.evalconfig import EvalConfig
from tlora.evalfolder import EvalFolder
from tlora.report import evaluation as report
from tlora.runconfig import CalibrationConfig, DataConfig, RunConfig
from tlora.stages import evaluate, train

WORDS = ("a", "charming", "bleak", "affecting", "journey", "desperate", "often", "and")


def rows(path, columns, label, count):
    draw = random.Random(count)
    lines = ["\t".join([*columns, "label"])]
    for _ in range(count):
        texts = [" ".join(draw.choices(WORDS, k=draw.randint(4, 12))) for _ in columns]
        lines.append("\t".join([*texts, str(label(texts))]))
    Path(path).write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def encoder(saved, tiny_bert_classifier):
    """The body alone, as an encoder is published: its head is the task's."""
    return saved(tiny_bert_classifier().bert)


TASKS = {
    "sst2": (("sentence",), lambda texts: int("bleak" not in texts[0])),
    "cola": (("sentence",), lambda texts: int("and" in texts[0])),
    "stsb": (("sentence1", "sentence2"), lambda texts: len(texts[0]) / 25),
}


def trained(task, base, folder, **method):
    columns, label = TASKS[task]
    dev = rows(folder / "dev.tsv", columns, label, 21)
    config = RunConfig(
        model=base,
        task=task,
        train_file=rows(folder / "train.tsv", columns, label, 64),
        eval_file=dev,
        output_dir=str(folder / "run"),
        calibration=CalibrationConfig(samples=4),
        **{"adapter": {"r": 4, "target_modules": "all-linear"}} | method,
        trainer={"max_steps": 8, "learning_rate": 1e-3, "use_cpu": True, "disable_tqdm": True},
    )
    run = train.run(config)
    return str(run.path), dev, json.loads(run.metrics.read_text())


@pytest.mark.parametrize("task", ["cola", "stsb"])
def test_the_scores_are_those_that_training_ended_with(task, encoder, here):
    run, dev, metrics = trained(task, encoder, here)
    found = {}
    for size in (1, 32):
        evaluate.run(
            EvalConfig(
                models=[run],
                with_merged=True,
                tasks=[task],
                test_file=dev,
                batch_size=size,
                output_dir=f"out{size}",
            )
        )
        found[size] = EvalFolder(f"out{size}").read()["tasks"][0]
        assert found[size]["items"] == 21
    own = [name for name in metrics if name not in ("loss", "epoch")]
    assert found[1]["metrics"][: len(own)] == own
    for size in (1, 32):
        for name in ("run", "run-merged"):
            scores = found[size]["scores"][name]
            expected = pytest.approx({n: metrics[n] for n in own}, abs=1e-4)
            assert {n: scores[n] for n in own} == expected
    assert task in report.write("out32").text
    lines = EvalFolder("out32").read_samples("run", task)
    assert lines == EvalFolder("out1").read_samples("run", task)
    if "accuracy" in found[1]["metrics"]:
        right = [line["scores"]["accuracy"] for line in lines]
        assert right == [float(line["reply"] == line["target"]) for line in lines]
        assert sum(right) / 21 == pytest.approx(found[32]["scores"]["run"]["accuracy"])
        assert len({line["target"] for line in lines}) == 2
    assert [line["item"] for line in lines] == [str(n) for n in range(21)]


ADALORA = {"init_r": 4, "target_r": 2, "target_modules": "all-linear"}


def test_an_adapter_of_adalora_is_labelled_by_its_logits(encoder, here):
    run, dev, metrics = trained("sst2", encoder, here, method="adalora", adapter=ADALORA)
    config = EvalConfig(models=[run], tasks=["sst2"], test_file=dev)
    (task,) = evaluate.run(config).read()["tasks"]
    assert task["scores"]["run"]["accuracy"] == pytest.approx(metrics["accuracy"])
    part = EvalConfig(models=[run], tasks=["sst2"], test_file=dev, limit=0.5, output_dir="part")
    assert evaluate.run(part).read()["tasks"][0]["items"] == 11


def test_a_classifier_without_its_head_is_refused(encoder, here):
    shutil.copytree(encoder, "headless")
    config = here / "headless/config.json"
    fields = json.loads(config.read_text()) | {"architectures": ["BertForSequenceClassification"]}
    config.write_text(json.dumps(fields))
    dev = rows(here / "dev.tsv", *TASKS["cola"], 5)
    with pytest.raises(AdapterError, match="headless has no trained classifier"):
        evaluate.run(EvalConfig(models=["headless"], tasks=["cola"], test_file=dev))


def test_what_cannot_be_labelled_is_refused(saved, tiny_bert_classifier, here):
    classifier = saved(tiny_bert_classifier())
    columns, label = TASKS["sst2"]
    dev = rows(here / "dev.tsv", columns, label, 5)

    def refused(**fields):
        given = {"models": [classifier], "tasks": ["sst2"], "test_file": dev}
        with pytest.raises(ConfigError) as error:
            evaluate.run(EvalConfig(**given | fields))
        assert not Path("tlora-eval").exists()
        return str(error.value)

    for texts in ("gsm8k", "gsm8k-paper", "mtbench"):
        assert f"{texts!r} asks for text" in refused(tasks=[texts])
    assert "Did you mean 'sst2'" in refused(tasks=["sst3"])
    assert "--test_file is of one task" in refused(tasks=["sst2", "cola"])
    assert "no rows of its own" in refused(
        tasks=["jsonl"], test_file=None, data=DataConfig(kind="classification")
    )
