"""The experiments on robustness vary what they say they vary."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def scores(script):
    return script("quality", "robustness_scores")


@pytest.fixture
def long_context(script):
    return script("quality", "longcontext")


@pytest.fixture
def vision(script):
    return script("quality", "vision")


def test_no_run_is_planned_twice_and_each_group_varies_one_thing(scores):
    runs = scores.runs()
    assert len({run.name for run in runs}) == len(runs)
    assert all(run.draw == 0 or run.seed == 0 for run in runs)
    assert {run.source for run in runs} == {"ledger", "program", "spelled", scores.MIXTURE}


def test_spreads_put_the_shared_run_in_both_groups(scores):
    found = {
        f"ledger/rule/32/{source}/{draw}/{seed}": {"loss": loss}
        for source, draw, seed, loss in (
            ("ledger", 0, 0, 1.0),
            ("ledger", 1, 0, 3.0),
            ("ledger", 0, 1, 5.0),
            (scores.MIXTURE, 0, 0, 9.0),
        )
    }
    (line,) = scores.spreads(found, "loss")
    assert line["32 samples"] == {"mean": 2.0, "sd": pytest.approx(2**0.5, abs=1e-4), "runs": 2}
    assert line["training seeds"]["mean"] == 3.0
    assert line["mixture 32 samples"] == {"mean": 9.0, "sd": None, "runs": 1}


def test_short_rows_are_pieces_of_the_long_rows_of_the_same_draw(long_context):
    rows = torch.arange(64 * 512).view(64, 512)
    for draw in long_context.DRAWS:
        own = rows[draw * 16 : draw * 16 + 16]
        cuts = {
            name: long_context.cut_rows(rows, *cut, draw) for name, cut in long_context.CUTS.items()
        }
        assert torch.equal(cuts["16 rows of 512"], own)
        assert torch.equal(cuts["128 rows of 64"].flatten(), own.flatten())
        short = cuts["16 rows of 64"]
        assert short.shape == (16, 64)
        assert all(
            set(piece.tolist()) <= set(row.tolist()) for piece, row in zip(short, own, strict=True)
        )


def test_every_image_is_drawn_before_one_is_drawn_again(vision):
    images = (torch.zeros(12, 1, 28, 28), torch.arange(12))
    digits = torch.cat([batch["labels"] for batch in vision.drawn(images, 5, 4, seed=0)])
    assert sorted(digits[:12].tolist()) == list(range(12))
    assert len(digits) == 20


def test_digits_are_turned_and_keep_their_label(vision):
    pixels = torch.zeros(1, 1, 28, 28)
    pixels[0, 0, 0, 27] = 1
    turned, digits = vision.turn((pixels, torch.tensor([7])))
    assert turned[0, 0, 0, 0] == 1 and turned.sum() == 1
    assert digits.tolist() == [7]


@pytest.mark.parametrize("method", ["lora", "lora-fa", "tlora, the paper's rule"])
def test_adapters_of_the_vision_model_leave_its_output_and_train_what_they_say(vision, method):
    draw = torch.Generator().manual_seed(0)
    images = (torch.rand(32, 1, 28, 28, generator=draw), torch.arange(32) % 10)
    model = vision.made().eval()
    before = model(pixel_values=images[0]).logits
    adapted = vision.attached(model, method, images, seed=0).eval()
    assert torch.equal(adapted(pixel_values=images[0]).logits, before)
    trained = {n.split(".")[-3] for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained == ({"lora_A", "lora_B"} if method == "lora" else {"lora_B"})
