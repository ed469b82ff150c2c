"""A task as text to text: the trainer generates, the task reads the replies back."""

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tlora.compare import compare
from tlora.compare.compareconfig import CompareConfig
from tlora.errors import DataError
from tlora.evaluate import evaluate
from tlora.evaluate.evalconfig import EvalConfig
from tlora.tasks.dataconfig import DataConfig
from tlora.training import train
from tlora.training.arguments import texts, training_arguments
from tlora.training.setup import settle

WORDS = ["<pad>", "<unk>", "</s>", "sst2", "sentence:", "negative", "positive", "good", "bad"]
WORDS += ["stsb", "sentence1:", "sentence2:", *(f"{n / 5:.1f}" for n in range(26))]
WORDS += [f"film{n}" for n in range(32)]


def word_tokenizer(words):
    """A token a word, closed by </s>, as T5's tokenizer closes a text."""
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )


@pytest.fixture
def t5(tiny_t5, tmp_path):
    """Save a T5 whose words are these."""

    def save(words):
        folder = tmp_path / "t5"
        tiny_t5(vocab_size=len(WORDS), d_model=32).save_pretrained(folder)
        word_tokenizer(words).save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture
def reviews(tmp_path):
    """Rows to train on and rows to evaluate on; each film is good or bad, film30 is mislabeled."""
    files = {"train_file": tmp_path / "train.tsv", "eval_file": tmp_path / "dev.tsv"}
    for file, films in zip(files.values(), (range(20), range(20, 32)), strict=True):
        lines = [
            f"film{n} {'good' if n % 3 else 'bad'}\t{int(n % 3 > 0 or n == 30)}" for n in films
        ]
        file.write_text("sentence\tlabel\n" + "\n".join(lines))
    return {name: str(file) for name, file in files.items()}


def generated(folder, base, prompts, new_tokens):
    """What the run's adapter replies, loaded by PEFT alone, a prompt at a time."""
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(model, folder.adapter).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder.adapter)
    replies = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = model.generate(input_ids=ids, max_new_tokens=new_tokens)
        replies.append(tokenizer.decode(out[0], skip_special_tokens=True))
    return replies


def test_a_run_is_scored_by_the_replies_that_its_adapter_gives(config, t5, reviews):
    base = t5(WORDS)
    trainer = {
        "max_steps": 30,
        "per_device_train_batch_size": 20,
        "per_device_eval_batch_size": 5,
        "learning_rate": 0.03,
        "save_strategy": "no",
    }
    run = config(
        model=base,
        task="sst2",
        data=DataConfig(kind="seq2seq"),
        method="lora",
        adapter={"r": 8, "modules_to_save": ["lm_head"]},
        trainer=trainer,
        **reviews,
    )
    folder = train.run(run)
    rows = [line.split("\t") for line in Path(reviews["eval_file"]).read_text().splitlines()[1:]]
    replies = generated(folder, base, [f"sst2 sentence: {text}" for text, _ in rows], 3)
    right = [
        reply == ("positive" if label == "1" else "negative")
        for reply, (_, label) in zip(replies, rows, strict=True)
    ]
    metrics = json.loads(folder.metrics.read_text())
    assert metrics["accuracy"] == pytest.approx(sum(right) / len(right))
    assert 0.5 < metrics["accuracy"] < 1  # more than the rarer word; not what the rows say
    assert metrics["loss"] > 0
    evaluation = evaluate.run(
        EvalConfig(
            models=[str(folder.path)],
            tasks=["sst2"],
            data=DataConfig(kind="seq2seq"),
            test_file=reviews["eval_file"],
            output_dir=str(folder.path.with_name("evaluation")),
        )
    )
    (found,) = evaluation.read()["tasks"]
    assert found["scores"][folder.path.name] == {"accuracy": pytest.approx(metrics["accuracy"])}
    lines = evaluation.read_samples(folder.path.name, "sst2")
    assert [line["reply"] for line in lines] == replies
    assert [line["scores"]["accuracy"] for line in lines] == right


def test_evaluations_reply_greedily_whatever_the_checkpoint_asks(config, t5, reviews, tmp_path):
    base = t5(WORDS)
    wishes = {"min_new_tokens": 3, "repetition_penalty": 9.0, "num_beams": 2}

    def scored(name, **trainer):
        folder = train.run(
            config(
                model=base,
                task="sst2",
                data=DataConfig(kind="seq2seq"),
                method="full",
                adapter={},
                trainer={"max_steps": 20, "learning_rate": 0.01, "eval_strategy": "steps"}
                | {"eval_steps": 10, "save_strategy": "no", "per_device_train_batch_size": 20}
                | trainer,
                output_dir=str(tmp_path / name),
                **reviews,
            )
        )
        lines = [json.loads(line) for line in folder.log.read_text().splitlines()]
        kept = transformers.GenerationConfig.from_pretrained(folder.adapter)
        found = [line["eval_accuracy"] for line in lines if "eval_accuracy" in line]
        return found, {wish: getattr(kept, wish) for wish in wishes}

    plain, _ = scored("plain")
    assert len(plain) == 3
    assert plain[-1] > 0.5
    own = transformers.GenerationConfig.from_pretrained(base)
    own.update(**wishes)
    own.save_pretrained(base)
    assert scored("wishes") == (plain, wishes)


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({}, (True, 4)),
        ({"generation_max_length": 9}, (True, 9)),  # what the user says of generation counts
    ],
)
def test_a_reply_may_be_longer_than_any_response(config, t5, reviews, tmp_path, trainer, expected):
    data = DataConfig(kind="seq2seq")
    run = config(model=t5(WORDS), task="sst2", data=data, trainer=trainer, **reviews)
    arguments = training_arguments(settle(run), tmp_path)
    assert (arguments.predict_with_generate, arguments.generation_max_length) == expected


def test_padding_is_no_part_of_a_text():
    tokenizer = word_tokenizer(WORDS)
    ids = np.array([[0, 5, 2, -100], [7, 8, 2, 0], [2, -100, -100, -100]])
    assert texts(tokenizer, ids) == ["negative", "good bad", ""]


def test_a_task_that_reads_no_replies_does_not_generate(config, saved, tiny_t5, tmp_path):
    run = config(model=saved(tiny_t5()), data=DataConfig(kind="seq2seq"))
    assert not training_arguments(settle(run), tmp_path).predict_with_generate


def test_a_tokenizer_that_loses_a_label_is_refused_before_anything_is_written(config, t5, reviews):
    lossy = [word if word != "positive" else "other" for word in WORDS]
    run = config(model=t5(lossy), task="sst2", data=DataConfig(kind="seq2seq"), **reviews)
    with pytest.raises(DataError, match="the tokenizer turns a row's label into ''"):
        train.run(run)
    assert not Path(run.output_dir).exists()


def test_a_comparison_knows_the_scores_of_replies(t5, tmp_path):
    files = tmp_path / "train.tsv", tmp_path / "test.tsv"
    for file, films in zip(files, (range(12), range(12, 24)), strict=True):
        lines = [f"film{n}\tfilm{n} good\t{n % 6}" for n in films]
        file.write_text("sentence1\tsentence2\tscore\n" + "\n".join(lines))
    config = CompareConfig(
        model=t5(WORDS),
        task="stsb",
        data=DataConfig(kind="seq2seq"),
        train_file=str(files[0]),
        test_file=str(files[1]),
        validation=4,
        methods=["lora"],
        learning_rates=[1e-3],
        trainer={"use_cpu": True},
    )
    setup = compare.check(config)
    assert compare.score_names(setup) == ["pearson", "spearmanr", "loss"]
    assert compare.identify(config, setup).better == "higher"
