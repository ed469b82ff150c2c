import pytest
import torch
from trl.trainer import utils

from tlora.training import train
from tlora.training.trainers import score_labels_alone


@pytest.fixture
def as_installed(monkeypatch):
    """TRL as it is installed, whatever was trained before; changes of it end with the test."""
    gathers = utils._use_triton
    monkeypatch.setattr(utils, "_use_triton", getattr(gathers, "__wrapped__", gathers))


@pytest.fixture
def losses(as_installed, tiny_llama, monkeypatch):
    """Return a function: (loss, gradient of the embeddings, positions scored) of one batch."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [4, 3, 9, 8, 6, 2]])
    labels = ids.clone()
    labels[0, :4] = labels[1, :5] = -100
    scored = []
    inner = utils._ChunkedLogProbFunction.apply

    class Spy:
        @staticmethod
        def apply(hidden, *rest):
            scored.append(hidden.shape[0])
            return inner(hidden, *rest)

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Spy)

    def measured():
        torch.manual_seed(0)
        model = tiny_llama()
        outputs = ("log_probs", "entropy", "is_top1")
        utils.add_fused_lm_head(model, outputs=outputs)
        loss = model(input_ids=ids, labels=labels, fused_lm_head=True).loss
        loss.backward()
        return loss.item(), model.get_input_embeddings().weight.grad, scored.pop()

    return measured


def test_on_a_cpu_only_positions_with_labels_are_scored_and_the_loss_is_the_same(losses):
    loss, gradient, _ = losses()
    score_labels_alone()
    labeled, gradient_of_labeled, scored = losses()
    assert scored == 3
    assert labeled == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(gradient_of_labeled, gradient)


def test_a_second_call_changes_nothing(as_installed):
    score_labels_alone()
    first = utils._use_triton
    score_labels_alone()
    assert utils._use_triton is first


def test_a_trl_without_the_name_is_left_as_it_is(as_installed, monkeypatch):
    monkeypatch.delattr(utils, "_use_triton")
    score_labels_alone()
    assert not hasattr(utils, "_use_triton")


def test_a_run_on_a_cpu_scores_labels_alone(as_installed, config):
    train.run(config(trainer={"max_steps": 1, "save_strategy": "no", "use_cpu": True}))
    assert utils._use_triton(torch.device("cpu"))
