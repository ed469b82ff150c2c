"""A classifier's adapter carries its labels: PEFT's and transformers' own loaders name classes."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
import transformers

from tlora.evaluate.class_order import class_names
from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.evaluated_models import EvaluatedModel
from tlora.tasks.dataconfig import DataConfig
from tlora.training import train

TEXTS = [f"{word} {n}" for n in range(4) for word in ("good", "bad", "so so")]


@pytest.fixture(scope="module", params=["bert", "llama"])
def run(request, config_in, tmp_path_factory, saved, tiny_bert_classifier, tiny_llama):
    folder = tmp_path_factory.mktemp("classes")
    rows = [{"text": text, "label": text.rstrip(" 0123")} for text in TEXTS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny_bert_classifier() if request.param == "bert" else tiny_llama(pad_token_id=None)
    data = DataConfig(kind="classification", text_column="text", label_column="label")
    fields = {"model": saved(model), "train_file": str(folder / "rows.jsonl"), "data": data}
    return train.run(config_in(folder / "run", **fields, trainer={"max_steps": 4}))


def test_pefts_own_loader_names_the_classes(run):
    fields = json.loads((run.adapter / "classifier.json").read_text())
    fields["id2label"] = {int(n): name for n, name in fields["id2label"].items()}
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.adapter)
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        run.adapter, ignore_mismatched_sizes=True, **fields
    ).eval()
    assert model.config.id2label == {0: "bad", 1: "good", 2: "so so"}
    model.config.pad_token_id = tokenizer.pad_token_id
    batch = tokenizer(TEXTS[:3], return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits

    classify = transformers.pipeline(
        "text-classification", model=model, tokenizer=tokenizer, device="cpu"
    )
    found = classify(TEXTS[:3], batch_size=3)
    names = [model.config.id2label[n] for n in expected.argmax(dim=1).tolist()]
    assert [each["label"] for each in found] == names
    scores = expected.softmax(dim=1).max(dim=1).values
    assert [each["score"] for each in found] == pytest.approx(scores.tolist(), abs=1e-5)


def test_an_evaluation_reads_them_without_the_run(run, tmp_path):
    adapter = shutil.copytree(run.adapter, tmp_path / "adapter")
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = EvaluatedModel("a", "adapter", base, str(adapter), "labeled")
    config = EvalConfig(models=[str(adapter)], tasks=["jsonl"])
    assert class_names(model, config) == ["bad", "good", "so so"]


def test_an_adapter_of_a_language_model_has_no_such_file(config, sums):
    assert not (train.run(config()).adapter / "classifier.json").exists()
