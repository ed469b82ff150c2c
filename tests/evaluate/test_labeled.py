"""A trained classifier's scores are those that its training ended with, whatever the batch."""

import json
import random
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers

from tlora.errors import AdapterError, ConfigError
from tlora.evaluate import evaluate
from tlora.evaluate.class_order import order_of
from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.evalfolder import EvalFolder
from tlora.report import evaluation as report
from tlora.tasks.dataconfig import DataConfig
from tlora.training import train
from tlora.training.runconfig import CalibrationConfig, RunConfig

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
    text = report.write("out32").text
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {task} | {own[0]} |"))
    assert line.endswith(": tie) |")
    assert "no interval" not in text
    lines, alone = (EvalFolder(name).read_samples("run", task) for name in ("out32", "out1"))
    values = [[line.pop("predicted") for line in made] for made in (lines, alone)]
    assert values[0] == pytest.approx(values[1], abs=1e-6)
    assert lines == alone
    if "accuracy" in found[1]["metrics"]:
        right = [line["scores"]["accuracy"] for line in lines]
        assert right == [float(line["reply"] == line["target"]) for line in lines]
        assert sum(right) / 21 == pytest.approx(found[32]["scores"]["run"]["accuracy"])
        assert len({line["target"] for line in lines}) == 2
    assert [line["item"] for line in lines] == [str(n) for n in range(21)]


@pytest.mark.parametrize("method", ["tlora", "full"])
def test_a_pooler_that_the_base_lacks_trains_and_is_saved(
    method, saved, tiny_bert_classifier, here, caplog
):
    """DeBERTa and many sentence encoders come without one; it would be drawn anew at each load."""
    body = tiny_bert_classifier().bert
    body.pooler = None
    options = {"adapter": {}} if method == "full" else {}
    run, dev, metrics = trained("sst2", saved(body), here, method=method, **options)
    noted = [r.message for r in caplog.records if "trains in full and is saved" in r.message]
    assert [("bert.pooler.dense" in message) for message in noted] == [True] * (method != "full")
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = EvalConfig(models=[run], tasks=["sst2"], test_file=dev, output_dir=f"out{seed}")
        (task,) = evaluate.run(config).read()["tasks"]
        ((name, scores),) = task["scores"].items()
        assert scores["accuracy"] == pytest.approx(metrics["accuracy"])
    one, two = (EvalFolder(f"out{seed}").read_samples(name, "sst2") for seed in (1, 2))
    assert one == two


ADALORA = {"init_r": 4, "target_r": 2, "target_modules": "all-linear"}


def test_an_adapter_of_adalora_is_labeled_by_its_logits(encoder, here):
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


def test_what_cannot_be_labeled_is_refused(saved, tiny_bert_classifier, here):
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
        assert f"{texts!r} is generative" in refused(tasks=[texts])
    assert "Did you mean 'sst2'" in refused(tasks=["sst3"])
    assert "--test_file gives the rows of one task" in refused(tasks=["sst2", "cola"])
    named = DataConfig(kind="classification", label_names=["bad", "good"])
    assert "no default dataset" in refused(tasks=["jsonl"], test_file=None, data=named)


COLUMNS = {"kind": "classification", "text_column": "text", "label_column": "label"}


def reviews(path, count, labels=("pos", "neg")):
    draw = random.Random(count)
    lines = []
    for number in range(count):
        label = labels[number % len(labels)]
        said = "charming" if label == "pos" else "bleak"
        lines.append({"text": " ".join([*draw.choices(WORDS[4:], k=4), said]), "label": label})
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def run_of_reviews(base, folder, name, names, method="lora"):
    """Train on reviews until they are told apart."""
    config = RunConfig(
        model=base,
        train_file=reviews(folder / "train.jsonl", 64),
        data=DataConfig(**COLUMNS, label_names=names),
        output_dir=str(folder / name),
        method=method,
        adapter={"r": 4, "modules_to_save": ["word_embeddings", "classifier"]}
        if method == "lora"
        else {},
        trainer={
            "max_steps": 60,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
        },
    )
    return str(train.run(config).path)


@pytest.fixture(scope="module")
def runs(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reviews")
    return [
        run_of_reviews(encoder, folder, "given", ["pos", "neg"]),
        run_of_reviews(encoder, folder, "sorted", None),
        run_of_reviews(encoder, folder, "whole", ["pos", "neg"], method="full"),
    ]


def accuracy(folder, **fields):
    fields = {"data": DataConfig(**COLUMNS), "tasks": ["jsonl"], "output_dir": folder} | fields
    (task,) = evaluate.run(EvalConfig(**fields)).read()["tasks"]
    return {name: found["accuracy"] for name, found in task["scores"].items()}


def test_upper_and_lower_case_are_one_unless_they_tell_classes_apart():
    assert order_of(["B", "a"], ["A", "b"]) == [1, 0]
    assert order_of(["a", "A"], ["A", "a"]) == [1, 0]
    assert order_of(["a", "A"], ["a", "b"]) is None
    assert order_of(["a"], ["a", "b"]) is None


def test_each_run_keeps_the_order_of_classes_that_it_learned(runs, here):
    recorded = json.loads(Path(runs[1], "run.json").read_text())["config"]["data"]["label_names"]
    assert recorded == ["neg", "pos"]
    right = {"given": 1.0, "sorted": 1.0, "whole": 1.0}
    assert accuracy("both", models=runs, test_file=reviews("test.jsonl", 12)) == right
    # Rows of one class alone tell no order.
    ones = reviews("ones.jsonl", 6, labels=("pos",))
    assert accuracy("one", models=runs, test_file=ones) == right
    replies = [line["reply"] for line in EvalFolder("one").read_samples("given", "jsonl")]
    assert replies == ["pos"] * 6
    data = DataConfig(**COLUMNS, label_names=["pos", "neg"])
    assert accuracy("said", models=runs[:1], test_file=ones, data=data) == {"given": 1.0}
    with pytest.raises(
        ConfigError, match="pos, neg differs from the class order sorted was trained with"
    ):
        accuracy("wrong", models=runs[1:2], test_file=ones, data=data)
    assert not Path("wrong").exists()


def test_an_adapter_without_a_record_of_its_classes_needs_them_named(runs, here):
    shutil.copytree(f"{runs[0]}/adapter", "alone")
    Path("alone/classifier.json").unlink()
    Path("alone/digests.json").unlink()
    test = reviews("test.jsonl", 20)
    with pytest.raises(ConfigError, match="list the classes in the order of training") as error:
        accuracy("out", models=["alone"], test_file=test)
    assert "data.label_names" in str(error.value)
    for names, share in ((["pos", "neg"], 1.0), (["neg", "pos"], 0.0)):
        data = DataConfig(**COLUMNS, label_names=names)
        found = accuracy("-".join(names), models=["alone"], test_file=test, data=data)
        assert found == {"alone": share}


@pytest.fixture
def classifier(saved, tiny_bert_classifier):
    """Save a classifier with these names of its outputs, the head's rows in the order ``rows``."""

    def make(names, rows=None):
        model = tiny_bert_classifier(num_labels=len(names))
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: number for number, name in enumerate(names)}
        if rows is not None:
            with torch.no_grad():
                for value in model.classifier.parameters():
                    value.copy_(value[rows].clone())
        return saved(model)

    return make


MNLI = ["entailment", "neutral", "contradiction"]


def labels_of(path, name, task="mnli", **data):
    lines = ["premise\thypothesis\tlabel"]
    lines += [f"{a} {b}\t{b}\t{n % 3}" for n, (a, b) in enumerate(pairwise(WORDS))]
    Path("mnli.tsv").write_text("\n".join(lines) + "\n")
    config = EvalConfig(
        models=[f"m={path}"],
        tasks=[task],
        test_file="mnli.tsv",
        output_dir=name,
        data=DataConfig(**data),
    )
    evaluate.run(config)
    return [line["reply"] for line in EvalFolder(name).read_samples("m", task)]


def test_a_checkpoints_own_order_of_the_tasks_classes_is_followed(classifier, here):
    plain = labels_of(classifier(["LABEL_0", "LABEL_1", "LABEL_2"]), "plain")
    rows = [2, 0, 1]
    shuffled = classifier([MNLI[row].upper() for row in rows], rows)
    assert labels_of(shuffled, "shuffled") == plain
    # Rows in another order under names that say nothing are others' classes, so the above shows it.
    silent = classifier(["LABEL_0", "LABEL_1", "LABEL_2"], rows)
    assert labels_of(silent, "silent") != plain
    names = [MNLI[row] for row in rows]
    assert labels_of(silent, "said", label_names=names) == plain


def test_a_checkpoint_of_other_classes_is_refused(classifier, here):
    other = classifier(["negative", "neutral", "positive"])
    with pytest.raises(ConfigError) as error:
        labels_of(other, "out")
    assert (
        "m has the classes negative, neutral, positive, but the task has"
        " entailment, neutral, contradiction"
    ) in str(error.value)
    assert not Path("out").exists()
    assert labels_of(other, "said", label_names=MNLI) == labels_of(classifier(MNLI), "plain")
    # Rows of your own take the classes that the first checkpoint names.
    models = [f"one={classifier(['neg', 'pos'])}", f"two={classifier(['pos', 'neg'], [1, 0])}"]
    scores = accuracy("own", models=models, test_file=reviews("test.jsonl", 12))
    assert scores["one"] == scores["two"]


def test_rows_longer_than_the_table_of_positions_are_cut_and_counted(
    saved, tiny_bert_classifier, here, caplog
):
    base = saved(tiny_bert_classifier(max_position_embeddings=12).bert)
    run, dev, _ = trained("sst2", base, here)
    found = []
    for length in (12, 64):
        data = DataConfig(max_length=length)
        config = EvalConfig(
            models=[run], tasks=["sst2"], test_file=dev, data=data, output_dir=f"out{length}"
        )
        (task,) = evaluate.run(config).read()["tasks"]
        found.append((task["scores"], task["truncated"]["run"]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    texts = [line.split("\t")[0] for line in Path(dev).read_text().splitlines()[1:]]
    longer = sum(len(tokenizer(text)["input_ids"]) > 12 for text in texts)
    assert longer > 0
    assert found[0] == found[1] == (found[0][0], longer)
    assert f"truncated {longer} prompts of sst2 that exceed the model's" in caplog.text
