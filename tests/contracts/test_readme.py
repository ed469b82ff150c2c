"""README's program runs as it stands, but for the model and its size."""

import json
import re
from pathlib import Path

import peft
import torch

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_program_trains_b_and_leaves_a_plain_adapter(saved, tiny_llama, tmp_path, monkeypatch):
    (program,) = re.findall(r"```python\n(.*?)```", README, re.S)
    (on_gpu,) = re.findall(r"^SFTTrainer\(.*\)\.train\(\)", program, re.M)
    (on_cpu,) = re.findall(r"`(SFTTrainer\(.*\))`", README)
    model = saved(tiny_llama())
    program = program.replace("path/to/model", model).replace(on_gpu, f"{on_cpu}.train()")
    program = program.replace("r=64, lora_alpha=64", "r=4, lora_alpha=4")  # the model is tiny
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"text": f"{n} and {n} is {2 * n}"}) for n in range(12)]
    Path("train.jsonl").write_text("\n".join(rows))

    names = {}
    exec(compile(program, "README.md", "exec"), names)

    trained = {n: p for n, p in names["model"].named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_B." in name and p.abs().max() > 0 for name, p in trained.items())
    again = peft.PeftModel.from_pretrained(tiny_llama(), "adapter").eval()
    ids = {"input_ids": torch.arange(3, 9).reshape(1, -1)}
    with torch.no_grad():
        assert torch.equal(again(**ids).logits, names["model"].eval()(**ids).logits)
