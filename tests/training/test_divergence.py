"""A training that diverges stops, says at which step, and saves nothing of it."""

import math

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from tlora import cli
from tlora.errors import AdapterError, DivergenceError
from tlora.linalg.matrices import not_finite
from tlora.tasks.dataconfig import DataConfig
from tlora.training import divergence, initialize, train
from tlora.training.divergence import DivergenceCallback
from tlora.training.runfolder import RunFolder
from tlora.training.setup import settle

WILD = {"learning_rate": 1e30}


@pytest.fixture
def kinds(saved, tiny_llama, tiny_t5, tiny_bert_classifier, tmp_path):
    """Return the fields of a run by the kind of its task."""
    reviews = tmp_path / "train.tsv"
    reviews.write_text("sentence\tlabel\n" + "\n".join(f"film {n}\t{n % 2}" for n in range(12)))
    labeled = {"task": "sst2", "train_file": str(reviews)}
    return {
        "causal": lambda: {"model": saved(tiny_llama())},
        "seq2seq": lambda: {"model": saved(tiny_t5()), "data": DataConfig(kind="seq2seq")},
        "classification": lambda: {"model": saved(tiny_bert_classifier()), **labeled},
    }


@pytest.mark.parametrize("method", ["tlora", "full"])
@pytest.mark.parametrize("kind", ["causal", "seq2seq", "classification"])
def test_every_kind_of_task_stops_and_is_not_finished(config, kinds, kind, method):
    fields = {"method": method, "adapter": {}, "trainer": {**WILD, "save_steps": 1}}
    run = config(**kinds[kind](), **fields)
    with pytest.raises(DivergenceError, match="training diverged at step 2: ") as fault:
        train.run(run)
    assert fault.value.step == 2
    folder = RunFolder(run.output_dir)
    assert not folder.finished
    assert not folder.adapter.exists()
    for file in folder.checkpoints.rglob("*.safetensors"):
        assert not not_finite(load_file(file))


def test_the_command_fails_with_a_sentence_and_fails_again(config, llama_folder, sums, capsys):
    output = config().output_dir
    words = {"model": llama_folder, "train_file": sums, "output_dir": output, "adapter.r": 2}
    trainer = {"learning_rate": "1e30", "max_steps": 4, "save_steps": 1, "use_cpu": "true"}
    words |= {f"trainer.{name}": value for name, value in trainer.items()}
    argv = ["train"]
    argv += [str(word) for name, value in words.items() for word in (f"--{name}", value)]
    for again in ([], [], ["--resume"]):
        assert cli.main([*argv, *again]) == 1
        said = capsys.readouterr().err
        assert "tlora: training diverged at step 2: the loss is not finite" in said
        assert "lower learning rate (now 1e+30)" in said
        folder = RunFolder(output)
        assert not folder.finished
        assert not folder.adapter.exists()
        assert [path.name for path in folder.checkpoints.glob("checkpoint-*")] == ["checkpoint-1"]


class Toy(nn.Module):
    """A line through points, and a parameter that the loss does not see."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.ones(1))
        self.spare = nn.Parameter(torch.zeros(2))

    def forward(self, x, labels):
        return {"loss": (self.slope * x - labels).square().mean()}


class Skipping:
    """What the loss scaler of fp16 makes of gradients that overflow: the step is skipped."""

    def __init__(self, model, steps):
        self.model, self.steps, self.step = model, steps, 0

    def __call__(self, parameters, max_norm, norm_type=2):
        self.step += 1
        if self.step not in self.steps:
            return nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        for parameter in self.model.parameters():
            parameter.grad = None
        return torch.tensor(math.inf)


@pytest.fixture
def toy(tmp_path):
    """Train a toy for eight steps; some are skipped, or see a row that is not finite."""

    def run(skipped=(), bad_row=None, callbacks=(), **fields):
        rows = [{"x": torch.tensor([float(n)]), "labels": torch.tensor([1.0])} for n in range(8)]
        if bad_row is not None:
            rows[bad_row]["labels"] = torch.tensor([math.nan])
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "toy"),
            max_steps=8,
            per_device_train_batch_size=1,
            train_sampling_strategy="sequential",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **({"logging_strategy": "no", "save_strategy": "no"} | fields),
        )
        model = Toy()
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[*callbacks])
        trainer.accelerator.clip_grad_norm_ = Skipping(model, skipped)
        DivergenceCallback().watch(trainer)
        trainer.train()
        return trainer.state.global_step

    return run


@pytest.mark.parametrize("skipped", [(), (1,), (3, 4), (1, 3, 5, 7), (1, 2, 4, 5, 7, 8)])
def test_steps_that_recover_do_not_stop_a_training(toy, skipped, monkeypatch):
    monkeypatch.setattr(divergence, "RECOVERY_STEPS", 3)
    assert toy(skipped) == 8


@pytest.mark.parametrize("fields", [{}, {"logging_strategy": "steps", "logging_steps": 1}])
@pytest.mark.parametrize("skipped", [(2, 4, 5, 6), (4, 5, 6, 7, 8), (4, 5, 6, 7)])
def test_as_many_bad_steps_in_a_row_stop_it_at_the_first(toy, skipped, fields, monkeypatch):
    monkeypatch.setattr(divergence, "RECOVERY_STEPS", 3)
    monkeypatch.setattr(divergence, "READ_STEPS", 2)
    with pytest.raises(
        DivergenceError, match=r"diverged at step 4: the gradient norm is not finite\. Start"
    ):
        toy(skipped, **fields)


def test_sixteen_halvings_of_a_loss_scale_are_allowed():
    assert divergence.RECOVERY_STEPS > 16


def test_a_training_without_a_good_step_has_diverged(toy):
    with pytest.raises(DivergenceError, match="diverged at step 1: the gradient norm"):
        toy(range(1, 9))


def test_a_training_that_ends_on_a_bad_loss_has_diverged(toy):
    with pytest.raises(
        DivergenceError, match=r"diverged at step 8: the loss is not finite\. Start"
    ):
        toy((8,), bad_row=7)
    assert toy((3,), bad_row=2) == 8


@pytest.mark.parametrize("row", [0, 3, 7])
def test_the_step_is_exact_wherever_it_is_read(toy, row):
    said = rf"step {row + 1}: the loss is not finite and 1 of 2 trained tensors are not finite"
    with pytest.raises(DivergenceError, match=said):
        toy(bad_row=row)


class Spoil(transformers.TrainerCallback):
    """Makes a weight that no loss depends on infinite."""

    def on_optimizer_step(self, args, state, control, model, **_):
        model.spare.data[0] = -math.inf


@pytest.mark.parametrize("strategy", ["steps", "epoch", "no"])
def test_weights_are_checked_before_they_are_saved_although_the_loss_is_finite(
    toy, tmp_path, strategy
):
    with pytest.raises(DivergenceError, match=r"at step \d: 1 of 2 trained tensors are not finite"):
        toy(callbacks=[Spoil()], save_strategy=strategy, save_steps=4)
    assert not [*tmp_path.rglob("checkpoint-*")]


def test_a_last_step_that_only_the_evaluation_shows_to_be_wild_is_not_finished(config, other_sums):
    wild = {"learning_rate": 1e37, "max_steps": 1}
    for _ in range(2):
        with pytest.raises(
            DivergenceError, match=r"diverged by step 1, the last: the loss on the evaluation rows"
        ) as fault:
            train.run(config(eval_file=other_sums, trainer=wild))
        assert fault.value.step == 1
        folder = RunFolder(config().output_dir)
        assert not folder.finished
        assert not folder.adapter.exists()
        assert not folder.metrics.exists()


def test_an_adapter_that_is_not_finite_is_not_written(config, tmp_path):
    setup = settle(config())
    prepared = initialize.adapt(setup, "cpu")
    frozen = next(p for n, p in prepared.model.named_parameters() if "lora_A" in n)
    assert not frozen.requires_grad
    frozen.data[0, 0] = math.nan
    with pytest.raises(AdapterError, match=r"1 of 28 tensors are not finite \(.*lora_A"):
        initialize.save_adapter(prepared, setup, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_the_losses_of_a_run_are_logged_as_they_are(config):
    setup = settle(config())
    assert not initialize.training_arguments(setup, "unused").logging_nan_inf_filter
