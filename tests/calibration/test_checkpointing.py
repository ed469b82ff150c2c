"""Models that are told to recompute activations: the same statistics, and the switch stays on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import support
from support import Toy, toy_batch, toy_samples
from tlora import TLoraConfig, calibrate
from tlora.errors import CalibrationError

CONFIG = TLoraConfig(r=2)


def assert_same(left: Any, right: Any) -> None:
    assert list(left) == list(right)
    for name, module in left.modules.items():
        other = right.modules[name]
        assert module.sensitivity == other.sensitivity > 0, name
        assert module.tokens == other.tokens, name
        assert torch.equal(module.covariance(), other.covariance()), name


@pytest.mark.parametrize(("name", "reentrant"), [("llama-right", False), ("t5", True)])
def test_a_transformers_model_in_training_mode(family_of, name, reentrant):
    plain, model = family_of(name), family_of(name).model.train()
    fields = TLoraConfig(**plain.config)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    switched = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]

    stats = calibrate(model, plain.batches(2), fields)

    assert_same(stats, calibrate(plain.model, plain.batches(2), fields))
    assert switched
    assert all(module.gradient_checkpointing for module in switched)
    assert all(module.training for module in model.modules())


class CheckpointedForSequenceClassification(Toy):
    """Recomputes a block whenever its switch is on, in eval mode too, as timm's models do."""

    reentrant = False

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.second = nn.Linear(8, 8)

    def block(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()).tanh()

    def encode(self, x: Tensor, **_: Any) -> Tensor:
        if not self.grad_checkpointing:
            return self.block(x)
        return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=self.reentrant)


class ReentrantForSequenceClassification(CheckpointedForSequenceClassification):
    """The same by the older way, which runs the first pass without gradient."""

    reentrant = True


KINDS = [CheckpointedForSequenceClassification, ReentrantForSequenceClassification]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_a_switch_that_works_in_eval_mode_too(kind):
    batches = [toy_batch(toy_samples())]
    expected = calibrate(support.seeded(kind), batches, CONFIG)
    model = support.seeded(kind)
    model.grad_checkpointing = True

    assert_same(calibrate(model, batches, CONFIG), expected)

    assert model.grad_checkpointing


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_a_switch_is_refused_not_measured_wrongly(kind):
    class Always(kind):
        @property
        def grad_checkpointing(self) -> bool:
            return True

        @grad_checkpointing.setter
        def grad_checkpointing(self, _: bool) -> None:
            pass

    Always.__name__ = kind.__name__
    model = support.seeded(Always)
    with pytest.raises(CalibrationError, match=r"first: the model checkpoints its activations in"):
        calibrate(model, [toy_batch(toy_samples())], CONFIG)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_checkpointed_block_behind_a_target_is_measured():
    # Its input carries the graph already, so that recomputing it gives what it gave.
    class Behind(CheckpointedForSequenceClassification):
        def encode(self, x: Tensor, **_: Any) -> Tensor:
            hidden = self.first(x).tanh()
            if not self.training and self.always:
                return torch.utils.checkpoint.checkpoint(self.late, hidden, use_reentrant=False)
            return self.late(hidden)

        def late(self, x: Tensor) -> Tensor:
            return self.second(x).tanh()

    Behind.__name__ = "BehindForSequenceClassification"
    batches, models = [toy_batch(toy_samples())], []
    for always in (False, True):
        models.append(support.seeded(Behind))
        models[-1].always = always
    plain, checkpointed = (calibrate(model, batches, CONFIG) for model in models)
    assert_same(checkpointed, plain)
