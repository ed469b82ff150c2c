"""README's programs run as they stand, but for the model and its size."""

import json
import re
from pathlib import Path

import peft
import torch

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST, WITH_TRL = re.findall(r"```python\n(.*?)```", README, re.S)


def run(program, names):
    exec(compile(program, "README.md", "exec"), names)
    return names["model"]


def check(model, base):
    """B alone trains, and PEFT alone gives the saved adapter's logits."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_B." in name for name in trained)
    again = peft.PeftModel.from_pretrained(base, "adapter").eval()
    ids = {"input_ids": torch.arange(3, 9).reshape(1, -1)}
    with torch.no_grad():
        assert torch.equal(again(**ids).logits, model.eval()(**ids).logits)


def test_the_first_program_leaves_a_plain_adapter(
    tiny_llama, tiny_tokenizer, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{n} and {n} is ", "completion": f"{2 * n}"} for n in range(40)]
    names = {"model": tiny_llama(), "tokenizer": tiny_tokenizer, "rows": rows}
    program = FIRST.replace("r=16, lora_alpha=16", "r=4, lora_alpha=4")  # the model is tiny
    check(run(program, names), tiny_llama())


def test_the_program_with_trl_trains_b(saved, tiny_llama, tmp_path, monkeypatch):
    (on_gpu,) = re.findall(r"^SFTTrainer\(.*\)\.train\(\)", WITH_TRL, re.M)
    (on_cpu,) = re.findall(r"`(SFTTrainer\(.*\))`", README)
    program = WITH_TRL.replace("path/to/model", saved(tiny_llama()))
    program = program.replace(on_gpu, f"{on_cpu}.train()")
    program = program.replace("r=64, lora_alpha=64", "r=4, lora_alpha=4")  # the model is tiny
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{n} and {n} is ", "completion": f"{2 * n}"} for n in range(12)]
    Path("train.jsonl").write_text("\n".join(map(json.dumps, rows)))

    model = run(program, {})

    assert any(p.abs().max() > 0 for n, p in model.named_parameters() if ".lora_B." in n)
    check(model, tiny_llama())
