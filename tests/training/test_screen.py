import logging
import os
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from transformers.trainer_callback import ProgressCallback

from tlora.training import screen, train
from tlora.training.screen import INTERVAL, ScreenCallback, trained_parameters
from tlora.verbconfig import no_bars_in_batch_jobs


class Memory:
    def so_far(self):
        return 3 * 2**30


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class Trainer:
    """As much of a trainer as the screen touches: a step is a second of ``tokens`` tokens."""

    def __init__(self, tokens=200, shows=True, processes=1):
        self.callbacks = [ProgressCallback] if shows else []
        self.args = SimpleNamespace(world_size=processes)
        self.training_step = lambda model, inputs, count=None: inputs["input_ids"].sum()
        self.batch = {
            "input_ids": torch.ones(2, tokens, dtype=torch.long),
            "attention_mask": torch.ones(2, tokens, dtype=torch.long),
        }
        self.batch["attention_mask"][1] = 0  # padding does not count

    def pop_callback(self, kind):
        return self.callbacks.pop() if kind in self.callbacks else None

    def add_callback(self, callback):
        self.callbacks.append(callback)


def shown(caplog, trainer, steps, evaluation=None, begin=0, logs=True):
    """Train ``steps`` steps of a second; an evaluation takes 1000 seconds."""
    clock, state = Clock(), transformers.TrainerState(max_steps=steps, global_step=begin)
    state.is_world_process_zero = True
    callback = ScreenCallback(Memory(), lines=True, clock=clock)
    callback.watch(trainer)
    with caplog.at_level(logging.INFO, "tlora"):
        callback.on_train_begin(None, state, None)
        for step in range(begin + 1, steps + 1):
            trainer.training_step(None, trainer.batch)
            clock.now += 1
            state.global_step = step
            callback.on_step_end(None, state, None)
            if logs:
                callback.on_log(None, state, None, logs={"loss": 1 / step, "learning_rate": 1e-3})
            if step == evaluation:
                clock.now += 1000
                callback.on_evaluate(None, state, None)
                callback.on_log(None, state, None, logs={"eval_loss": 0.5})
        callback.on_log(None, state, None, logs={"train_loss": 0.25})
        callback.on_train_end(None, state, None)
    return caplog.messages


def test_a_batch_job_gets_one_line_an_interval_and_a_summary(caplog):
    lines = shown(caplog, Trainer(), steps=35)
    steps = [int(line.split("/")[0].removeprefix("step ")) for line in lines[:-1]]
    assert steps == [1, 1 + INTERVAL, 1 + 2 * INTERVAL, 1 + 3 * INTERVAL, 35]
    assert lines[1] == (
        "step 11/35 (31%): loss 0.09091, lr 0.001, 200 tokens/s, peak memory 3.0 GiB, 0:00:24 left"
    )
    assert lines[-1].startswith("trained 35 steps in 0:00:35: loss 0.02857")
    assert not any("\r" in line for line in lines)


def test_an_evaluation_is_shown_at_once_and_its_time_is_none_of_the_training(caplog):
    lines = shown(caplog, Trainer(), steps=20, evaluation=3)
    assert "step 3/20 (15%): loss 0.3333, lr 0.001, eval loss 0.5, 200 tokens/s" in lines[1]
    assert lines[1].endswith("0:00:17 left")
    assert "eval loss 0.5" in lines[-1]


def test_a_run_too_short_for_a_line_still_tells_its_loss(caplog):
    lines = shown(caplog, Trainer(), steps=3, evaluation=3, logs=False)
    assert len(lines) == 2
    assert lines[-1].startswith("trained 3 steps in 0:00:03: loss 0.25, eval loss 0.5, ")


def test_a_resumed_run_counts_its_own_steps_and_a_group_all_its_processes(caplog):
    lines = shown(caplog, Trainer(processes=4), steps=20, begin=10)
    assert "800 tokens/s" in lines[0]
    assert lines[0].startswith("step 11/20") and lines[0].endswith("0:00:09 left")
    assert lines[-1].startswith("trained 10 steps in 0:00:10")


def test_a_trainer_that_shows_nothing_stays_quiet():
    trainer = Trainer(shows=False)
    step = trainer.training_step
    screen.show(trainer, Memory())
    assert trainer.callbacks == []
    assert trainer.training_step is step


def test_a_run_shows_both_losses_and_what_trains(config, other_sums, caplog, monkeypatch):
    seen = []
    count = screen._tokens
    monkeypatch.setattr(screen, "_tokens", lambda batch: seen.append(batch) or count(batch))
    trainer = {
        "disable_tqdm": False,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
    }
    with caplog.at_level(logging.INFO, "tlora"):
        folder = train.run(config(eval_file=other_sums, trainer=trainer))
    lines = [line for line in caplog.messages if line.startswith("step ")]
    assert any("eval loss" in line and "tokens/s" in line for line in lines)
    assert lines[-1].startswith("step 6/6 (100%): loss ")
    trained = folder.measured()["trainable_parameters"]
    assert any(line.startswith(f"{trained:,} of ") for line in caplog.messages)
    assert len(seen) == 6


@pytest.mark.parametrize("bias", ["none", "all"])
def test_what_trains_counts_heads_once_and_their_copies_never(tiny_llama, bias):
    base = transformers.LlamaForSequenceClassification(tiny_llama(attention_bias=True).config)
    total = sum(p.numel() for p in base.parameters())
    head = base.score.weight.numel()
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], task_type="SEQ_CLS", modules_to_save=["score"], bias=bias
    )
    biases = sum(p.numel() for n, p in base.named_parameters() if n.endswith(".bias"))
    model = peft.get_peft_model(base, config)
    adapter = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    parts = {"biases": biases * (bias == "all"), "adapter": adapter, "score": head}
    trained = sum(parts.values())
    text = trained_parameters(model)
    assert text.startswith(f"{trained:,} of {total + adapter:,} parameters train")
    said = dict(part.rsplit(" ", 1) for part in text.partition(": ")[2].split(", "))
    assert said == {name: f"{count:,}" for name, count in parts.items() if count}


@pytest.mark.parametrize("terminal", [False, True])
def test_loading_shows_bars_on_a_terminal_alone(monkeypatch, terminal):
    names = ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: terminal))
    no_bars_in_batch_jobs()
    assert [os.environ.get(name) for name in names] == [None if terminal else "1"] * 2


def test_a_model_that_trains_whole_is_all_of_itself(tiny_llama):
    model = tiny_llama()
    count = f"{sum(p.numel() for p in model.parameters()):,}"
    assert trained_parameters(model) == f"{count} of {count} parameters train (100.00%)"


def test_a_parameter_that_zero3_has_emptied_counts_whole():
    model = torch.nn.Linear(3, 2, bias=False)
    model.weight.ds_numel = model.weight.numel()
    model.weight.data = torch.empty(0)
    assert trained_parameters(model).startswith("6 of 6 parameters")
