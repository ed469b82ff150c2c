"""What a run settles of its rows: how long they are, how they are written, when it stops."""

import json
import logging

import pytest

from tlora.errors import ConfigError
from tlora.tasks.dataconfig import DataConfig
from tlora.training import train
from tlora.training.setup import settle


@pytest.fixture
def llama_of(tiny_llama, saved):
    return lambda positions: saved(tiny_llama(max_position_embeddings=positions))


@pytest.mark.parametrize(
    ("positions", "asked", "length"), [(64, None, 64), (4096, None, 256), (64, 32, 32)]
)
def test_rows_are_as_long_as_the_model_holds(llama_of, config, positions, asked, length):
    # The tokenizer says 256.
    data = DataConfig(format="raw", max_length=asked)
    setup = settle(config(model=llama_of(positions), data=data, adapter={"r": 2}))
    assert setup.record()["data"]["max_length"] == length
    assert setup.task.data.max_length == length


def test_a_run_records_the_format_that_it_settled_on(config, caplog):
    with caplog.at_level(logging.INFO):
        setup = settle(config(data=DataConfig()))
    assert setup.record()["data"]["format"] == "alpaca"
    assert "reading 24 rows as prompts and responses, formatted as Alpaca prompts." in caplog.text
    assert "with trained tokens in «»: Below is an instruction" in caplog.text


def test_a_chat_template_by_name_is_saved_with_the_adapter(config, tmp_path):
    file = tmp_path / "chats.jsonl"
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    file.write_text(json.dumps({"conversations": turns}) + "\n")
    data = DataConfig(chat_template="chatml")
    folder = train.run(config(train_file=str(file), data=data, trainer={"max_steps": 1}))
    assert "<|im_start|>" in (folder.adapter / "chat_template.jinja").read_text()
    saved = folder.config()["data"]
    assert (saved["format"], saved["chat_template"]) == ("chat", "chatml")


def test_a_run_that_gets_no_better_stops_and_keeps_its_best_checkpoint(config, caplog):
    # At this rate the loss rises from the second evaluation on.
    trainer = {"learning_rate": 2.0, "max_steps": 40, "eval_steps": 2, "save_steps": 2}
    data = DataConfig(format="raw", val_size=8)
    with caplog.at_level(logging.INFO):
        folder = train.run(config(data=data, early_stopping=2, trainer=trainer))
    log = [json.loads(line) for line in (folder.path / "log.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in log if "eval_loss" in line}
    best = min(losses, key=losses.get)
    assert max(line["step"] for line in log) == best + 4 < 40
    scores = json.loads(folder.metrics.read_text())
    assert scores["loss"] == pytest.approx(losses[best], rel=1e-4)
    said = f"checkpoint-{best}: evaluation loss {losses[best]:.4g}."
    assert f"kept the best checkpoint, {said}" in caplog.text


def test_a_model_that_reads_one_text_and_writes_another_is_told_its_kind(config, tiny_t5, saved):
    with pytest.raises(
        ConfigError, match=r"\(t5\) is an encoder-decoder; give --data\.kind seq2seq"
    ):
        settle(config(model=saved(tiny_t5())))
