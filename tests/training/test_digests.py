"""What a run reads from files is known by its content: rows, models, templates, settings."""

import dataclasses
import json
from pathlib import Path

import pytest

from tlora.errors import ConfigError
from tlora.evaluations.names import expanded
from tlora.tasks.dataconfig import DataConfig
from tlora.training import train
from tlora.training.digests import inputs_of
from tlora.training.resume import continued, merge_saved
from tlora.training.runconfig import RunConfig
from tlora.training.runfolder import RunFolder

TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}\n{% endfor %}"
GUARDED = {"question": "1+1?", "answer": "#### 2"}


def edited(file: Path) -> None:
    file.write_text(file.read_text() + " ")


@pytest.fixture(scope="module")
def templated(config_in, tmp_path_factory):
    """A finished run of one step whose chat template is a file."""
    folder = tmp_path_factory.mktemp("templated")
    file = folder / "chat.jinja"
    file.write_text(TEMPLATE)
    data = DataConfig(format="chat", chat_template=str(file), loss_on="all")
    train.run(config_in(folder / "run", data=data, trainer={"max_steps": 1}))
    return file, RunFolder(folder / "run")


def test_a_resumed_run_notices_an_edited_chat_template(templated):
    file, folder = templated
    again = RunConfig(output_dir=str(folder.path), resume=True)
    assert continued(again, folder, "train") is None
    edited(file)
    with pytest.raises(ConfigError) as caught:
        continued(again, folder, "train")
    file.write_text(TEMPLATE)
    assert caught.value.faults == (
        f"`data.chat_template`, {file}, has changed since the run was started; restore it,"
        " or start a new run in another --output_dir.",
    )


def test_a_chat_template_may_move(templated, tmp_path):
    file, folder = templated
    data = DataConfig(chat_template=str(file.rename(tmp_path / "moved.jinja")))
    again = RunConfig(output_dir=str(folder.path), resume=True, data=data)
    try:
        assert continued(again, folder, "train") is None
        with pytest.raises(ConfigError, match=r"is missing; .* new path by --data.chat_template"):
            continued(dataclasses.replace(again, data=DataConfig()), folder, "train")
        moved = {"data.chat_template": str(data.chat_template)}
        saved = RunConfig.from_dict(folder.config())
        merged = merge_saved(again, saved, moved)
        assert merged == dataclasses.replace(
            saved,
            resume=True,
            data=dataclasses.replace(saved.data, chat_template=data.chat_template),
        )
    finally:
        (tmp_path / "moved.jinja").rename(file)


def test_settings_of_engines_and_guarded_questions_are_inputs_too(config, tmp_path):
    engine, questions = tmp_path / "zero.json", tmp_path / "gsm8k" / "test.jsonl"
    engine.write_text("{}")
    questions.parent.mkdir()
    questions.write_text(json.dumps(GUARDED))
    assert expanded(["gsm8k-paper"]) == ["gsm8k-paper"]
    data = DataConfig(format="raw", guard="gsm8k-paper", guard_dir=str(tmp_path))
    given = config(data=data, trainer={"deepspeed": str(engine)})
    before = inputs_of(given)
    for name, file in (("trainer.deepspeed", engine), ("data.guard_dir", questions)):
        edited(file)
        after = inputs_of(given)
        assert [field for field in after if after[field] != before[field]] == [name]
        before = after
    named = config(data=DataConfig(format="chat", chat_template="chatml"))
    assert set(inputs_of(named)) == {"train_file", "model"}
