"""The scripts for people's own trainers run, train B alone, and leave what PEFT loads."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers

FIELDS = {
    "num_train_epochs": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 2e-2,
    "use_cpu": True,
    "bf16": False,
    "logging_steps": 1,
    "disable_tqdm": True,
}


@pytest.fixture
def rows(tmp_path):
    """Write rows that serve both scripts."""

    def write(rows):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    return write


def assert_trained(trainer, output):
    trains = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trains
    assert not [name for name in trains if "lora_A" in name]
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert json.loads((output / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.filterwarnings("ignore:r = 16 is larger")  # too much for this small a model
def test_the_script_of_trl(example, rows, tmp_path, saved, tiny_llama):
    folder = saved(tiny_llama(initializer_range=0.2))
    file = rows([{"prompt": f"{n}+{n}?", "completion": f" {n + n}"} for n in range(12)])
    trainer = example("trl_sft").main(folder, file, str(tmp_path / "out"), **FIELDS)
    assert_trained(trainer, tmp_path / "out")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(again(ids).logits, trainer.model.eval()(ids).logits)


def test_the_script_of_transformers(example, rows, tmp_path, saved, tiny_bert_classifier):
    folder = saved(tiny_bert_classifier())
    texts = [(f"{'good' if n % 2 else 'bad'} {n}", n % 2) for n in range(12)]
    file = rows([{"text": text, "label": label} for text, label in texts])
    trainer = example("plain_trainer").main(folder, file, str(tmp_path / "out"), **FIELDS)
    assert_trained(trainer, tmp_path / "out")


@pytest.mark.parametrize("name", ["trl_sft", "plain_trainer"])
def test_two_lines_are_added(example, name):
    source = Path(example(name).__file__).read_text().splitlines()
    added = [line for line in source if line.endswith("  # added")]
    body = source[source.index(next(line for line in source if line.startswith("def main"))) :]
    assert len(added) == 2
    assert not [line for line in body if "tlora" in line.lower() and line not in added]
