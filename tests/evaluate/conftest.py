from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tlora import TLoraConfig, get_tlora_model
from tlora.demo import corpus
from tlora.demo.run import BASE_MODEL


@pytest.fixture(scope="session")
def demo_rows() -> list[dict[str, str]]:
    """Problems in every form, of all lengths."""
    _, rows = corpus.shifted_task(seed=0, train=0, test=6)
    start = [{"prompt": f"{n}+{n}=", "response": f"{2 * n}"} for n in range(1, 37, 6)]
    return [*rows, *start]


@pytest.fixture(scope="session")
def demo_file(tmp_path_factory, demo_rows) -> str:
    file = tmp_path_factory.mktemp("rows") / "test.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in demo_rows))
    return str(file)


@pytest.fixture(scope="session")
def demo_adapter(tmp_path_factory, demo_rows) -> str:
    """An adapter of the shipped base by get_tlora_model; B is drawn, so that it changes replies."""
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL)
    batch = tokenizer([row["prompt"] for row in demo_rows[:4]], padding=True, return_tensors="pt")
    batch["labels"] = batch["input_ids"]
    config = TLoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_tlora_model(model, config, [dict(batch)])
    randomized(adapted, scale=0.02)
    folder = tmp_path_factory.mktemp("adapters") / "drawn"
    adapted.save_pretrained(folder)
    return str(folder)


def randomized(model: Any, scale: float) -> None:
    """Draw every B of an adapter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.copy_(scale * torch.randn(value.shape, generator=generator))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
