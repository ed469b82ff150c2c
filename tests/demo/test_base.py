"""The embedded base model: small, loadable, able on its own forms, unable on the shifted one."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pretraining_corpus import FORMS, held_out_rows
from tlora.demo.corpus import SHIFTED, Row, shifted_task

BASE = Path(str(files("tlora.demo") / "base"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The tokenizer as a user loads it."""
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model() -> Any:
    """The model as a user loads it."""
    return AutoModelForCausalLM.from_pretrained(BASE).eval()


@torch.no_grad()
def exact_match(model: Any, tokenizer: Any, rows: list[Row]) -> float:
    """Share of rows whose greedy continuation is the response and then the end."""
    prompts = tokenizer(
        [row["prompt"] for row in rows], padding=True, padding_side="left", return_tensors="pt"
    )
    out = model.generate(**prompts, max_new_tokens=10)
    new = tokenizer.batch_decode(out[:, prompts["input_ids"].shape[1] :])
    wanted = [row["response"] + tokenizer.eos_token for row in rows]
    return sum(map(str.startswith, new, wanted)) / len(rows)


def test_the_folder_is_small() -> None:
    assert sum(file.stat().st_size for file in BASE.iterdir()) < 8_000_000
    assert (BASE / "MODEL_CARD.md").is_file()


def test_special_tokens_are_defined(model: Any, tokenizer: Any) -> None:
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.bos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.vocab_size == len(tokenizer)


@pytest.mark.parametrize(
    "text", ["", "Tom has 12 apples.", "  two  spaces\n\ttab ", "naïve Ω 漢字 🙂", "def f(x):\n  0"]
)
def test_the_tokenizer_round_trips_any_text(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_digit_is_a_token(tokenizer: Any) -> None:
    assert tokenizer.tokenize("407") == ["4", "0", "7"]


def test_it_answers_held_out_problems_of_its_own_forms(model: Any, tokenizer: Any) -> None:
    rows = [row for form in FORMS for row in held_out_rows(form, 0, 5)]
    assert exact_match(model, tokenizer, rows) > 0.8


@pytest.mark.parametrize("form", SHIFTED)
def test_it_cannot_do_the_shifted_tasks(model: Any, tokenizer: Any, form: str) -> None:
    assert exact_match(model, tokenizer, shifted_task(0, 1, 50, form)[1]) < 0.2


def test_padding_on_either_side_gives_the_same_answer(model: Any, tokenizer: Any) -> None:
    texts = [held_out_rows(form, 0, 1)[0]["prompt"] for form in ("symbols", "pool")]
    right = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    left = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    positions = (left["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        last = right["attention_mask"].sum(-1) - 1
        from_right = model(**right).logits[torch.arange(2), last]
        from_left = model(**left, position_ids=positions).logits[:, -1]
    torch.testing.assert_close(from_right, from_left, atol=1e-4, rtol=1e-4)
