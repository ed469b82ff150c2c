"""A checkpoint counts when every file that its manifest names is what was written."""

import json
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import TrainingArguments

from tlora.errors import ArtifactError, ConfigError
from tlora.tasks.dataconfig import DataConfig
from tlora.training import train
from tlora.training.checkpoints import (
    MANIFEST,
    check_engine,
    damage,
    delete_old,
    guard_checkpoints,
    last_whole,
    rewind,
    seal,
)
from tlora.training.trainers import LogCallback

STATE = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
STATE += ("trainer_state.json", "global_step/shard_0.pt")


def write_files(folder, step):
    path = folder / f"checkpoint-{step}"
    (path / "global_step").mkdir(parents=True)
    save_file({"a": torch.ones(4)}, path / "adapter_model.safetensors")
    for name in STATE:
        if name.endswith((".pt", ".pth")):
            torch.save({"step": step}, path / name)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    for name in ("adapter_config.json", "README.md", "tokenizer.json"):
        (path / name).write_text("{}")
    return path


def write_checkpoint(folder, step):
    path = write_files(folder, step)
    seal(path)
    return path


def flip(file, place):
    """Flip a bit at a share of a file's length."""
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 4
    file.write_bytes(content)


def test_the_last_checkpoint_is_the_one_of_the_highest_step(tmp_path):
    assert last_whole(tmp_path) is None
    for step in (2, 10, 9):
        write_checkpoint(tmp_path, step)
    assert last_whole(tmp_path).name == "checkpoint-10"


def test_without_its_manifest_a_checkpoint_is_half_written(tmp_path):
    write_checkpoint(tmp_path, 2)
    half = write_files(tmp_path, 4)
    assert last_whole(tmp_path).name == "checkpoint-2"
    assert damage(half).startswith(f"{half / MANIFEST} is missing, so the run was stopped")


@pytest.mark.parametrize("place", [0, 0.3, 0.6, 1])
@pytest.mark.parametrize("name", [*STATE, MANIFEST])
def test_a_flipped_bit_is_found_and_its_file_named(tmp_path, name, place):
    write_checkpoint(tmp_path, 2)
    spoilt = write_checkpoint(tmp_path, 4)
    flip(spoilt / name, place)
    if name != MANIFEST:
        assert damage(spoilt) == f"{spoilt / name}: its content does not match its digest"
        assert last_whole(tmp_path).name == "checkpoint-2"
    elif place < 1:  # the last byte is the end of the line
        assert damage(spoilt) == f"{spoilt / name} is damaged"


@pytest.mark.parametrize("name", STATE)
def test_a_missing_and_a_cut_file_are_found(tmp_path, name):
    spoilt = write_checkpoint(tmp_path, 4)
    (spoilt / name).write_bytes((spoilt / name).read_bytes()[:-1])
    assert damage(spoilt) == f"{spoilt / name}: its content does not match its digest"
    (spoilt / name).unlink()
    assert damage(spoilt) == f"{spoilt / name} is missing"


def test_files_that_people_edit_may_be_edited(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 4)
    for name in ("adapter_config.json", "README.md", "tokenizer.json"):
        (checkpoint / name).write_text('{"mine": 1}')
    (checkpoint / "note.txt").write_text("new")
    assert damage(checkpoint) is None


def test_a_checkpoint_under_the_name_of_another_step_is_passed_over(tmp_path):
    write_checkpoint(tmp_path, 2).rename(tmp_path / "checkpoint-4")
    assert damage(tmp_path / "checkpoint-4").endswith("belongs to step 2")


def test_weights_alone_cannot_be_resumed_from(tmp_path, caplog):
    path = tmp_path / "checkpoint-2"
    path.mkdir()
    save_file({"a": torch.ones(4)}, path / "adapter_model.safetensors")
    seal(path)
    assert damage(path) is None
    assert rewind(tmp_path) is None
    assert "checkpoint-2 holds no optimizer state; the run starts over." in caplog.text


def test_rewinding_drops_what_lies_beyond_and_says_why(tmp_path, caplog):
    for step in (2, 4, 6, 8):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-8/scheduler.pt").unlink()
    flip(tmp_path / "checkpoint-6/optimizer.pt", 0.5)
    assert rewind(tmp_path).name == "checkpoint-4"
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["checkpoint-2", "checkpoint-4", "checkpoint-best"]
    first, second = (record.getMessage() for record in caplog.records)
    six = tmp_path / "checkpoint-6/optimizer.pt"
    assert first == (
        f"{six}: its content does not match its digest; the run resumes from checkpoint-4."
    )
    assert "checkpoint-8/scheduler.pt is missing; the run resumes from checkpoint-4." in second


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [(None, None, [2, 4, 10]), (2, None, [4, 10]), (1, 2, [2, 10]), (2, 2, [2, 10]), (5, 2, None)],
)
def test_the_oldest_checkpoints_beyond_the_limit_are_deleted(tmp_path, limit, best, kept):
    for step in (2, 4, 10):
        write_checkpoint(tmp_path, step)
    delete_old(tmp_path, limit, tmp_path / f"checkpoint-{best}" if best else None)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"checkpoint-{step}" for step in kept or [2, 4, 10]}


class Trainer:
    """The methods of a trainer that are guarded, writing what transformers' do."""

    def __init__(self, folder, limit=1):
        self.args = TrainingArguments(
            output_dir=str(folder), save_total_limit=limit, hub_token="hf_secret", use_cpu=True
        )
        self.state = types.SimpleNamespace(global_step=2, best_model_checkpoint=None)
        self.accelerator = types.SimpleNamespace(wait_for_everyone=lambda: None)
        self.seen, self.loaded = None, False

    def _save(self, output_dir):
        torch.save(self.args, f"{output_dir}/training_args.bin")

    _push_from_checkpoint = _save

    def _save_checkpoint(self, model, trial):
        folder = write_files(Path(self.args.output_dir), self.state.global_step)
        self.seen = self.args.save_total_limit
        self._save(folder)
        self._push_from_checkpoint(folder)

    def _load_best_model(self):
        self.loaded = True


def test_a_trainer_seals_before_it_deletes_and_pickles_no_arguments(tmp_path):
    trainer = Trainer(tmp_path)
    guard_checkpoints(trainer, lambda: "mine")
    for step in (2, 4):
        trainer.state.global_step = step
        trainer._save_checkpoint(None, None)
        # The old ones are deleted afterwards, not by the trainer itself.
        assert trainer.seen is None
        assert trainer.args.save_total_limit == 1
        (left,) = tmp_path.iterdir()
        assert damage(left, "mine") is None
        assert damage(left, "other") == f"{left / MANIFEST} belongs to another run"
        assert left.name == f"checkpoint-{step}"
        assert not [*left.rglob("training_args*")]
        assert all(b"hf_secret" not in f.read_bytes() for f in left.rglob("*") if f.is_file())


def test_a_damaged_best_checkpoint_is_not_loaded(tmp_path):
    trainer = Trainer(tmp_path)
    guard_checkpoints(trainer, lambda: "mine")
    best = write_checkpoint(tmp_path, 2)
    seal(best, "mine")
    trainer.state.best_model_checkpoint = "where/the/run/was/checkpoint-2"
    trainer._load_best_model()
    assert trainer.loaded
    assert trainer.state.best_model_checkpoint == str(best)
    trainer.loaded = False
    flip(best / "adapter_model.safetensors", 0.9)
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors: its content does not"):
        trainer._load_best_model()
    assert not trainer.loaded


@pytest.fixture
def stopped_at(config, monkeypatch):
    """Start a run that Ctrl-C stops after a step; after the last one, before the adapter is saved.

    Returns what makes the same run again.
    """

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    def start(step, **fields):
        again = lambda name="cut": train.run(config(name, **fields))  # noqa: E731
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if step is None:
                patch.setattr(train, "save_adapter", interrupt)
            else:
                on_step_begin = lambda self, args, state, control, **_: (  # noqa: E731
                    interrupt() if state.global_step == step else None
                )
                patch.setattr(LogCallback, "on_step_begin", on_step_begin)
            again()
        return again

    return start


def ends(folder):
    """Return a run's final weights, scores and last logged step, and its checkpoints."""
    [file] = folder.adapter.glob("*model.safetensors")
    scores = json.loads(folder.metrics.read_text())
    log = [json.loads(line) for line in folder.log.read_text().splitlines()]
    left = {path.name for path in folder.checkpoints.glob("checkpoint-*")}
    return file.read_bytes(), scores, max(line["step"] for line in log), left


@pytest.mark.parametrize("method", ["tlora", "lora", "adalora", "full"])
def test_from_the_checkpoint_of_its_last_step_a_run_takes_no_further_step(
    stopped_at, other_sums, method
):
    # At a rate that does not fall to zero, a further step changes the weights.
    trainer = {"lr_scheduler_type": "constant", "max_steps": 4, "load_best_model_at_end": False}
    options = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1} if method == "adalora" else {}
    again = stopped_at(None, method=method, adapter=options, trainer=trainer, eval_file=other_sums)
    assert ends(again()) == ends(again("whole"))


@pytest.mark.parametrize("ended", [False, True])
def test_early_stopping_counts_on_and_a_stopped_training_stays_so(stopped_at, config, ended):
    trainer = {"learning_rate": 2.0, "max_steps": 40, "eval_steps": 2, "save_steps": 2}
    data = DataConfig(format="raw", val_size=8)
    fields = {"data": data, "early_stopping": 2, "trainer": trainer}
    whole = ends(train.run(config("whole", **fields)))
    # At which step it stops is not the same on every machine.
    assert 4 < whole[2] < 40
    again = stopped_at(None if ended else whole[2] - 2, **fields)
    assert ends(again()) == whole


def test_a_checkpoint_of_deepspeed_fits_deepspeed_and_its_number_of_processes(tmp_path):
    for process in range(2):
        (tmp_path / f"rng_state_{process}.pth").touch()
    check_engine(tmp_path, deepspeed=False, processes=3)
    with pytest.raises(ConfigError, match=r"written without DeepSpeed.*launch without DeepSpeed"):
        check_engine(tmp_path, deepspeed=True, processes=2)
    (tmp_path / "latest").touch()
    check_engine(tmp_path, deepspeed=True, processes=2)
    for deepspeed, processes in ((True, 3), (False, 2)):
        with pytest.raises(ConfigError, match=r"by DeepSpeed.*with DeepSpeed and 2 processes"):
            check_engine(tmp_path, deepspeed, processes)
