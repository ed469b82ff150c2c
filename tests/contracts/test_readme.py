"""README's programs run as they stand, but for the model and its size."""

import json
import re
from pathlib import Path

import peft
import torch

from tlora import calibration_batches
from tlora.demo.run import BASE_MODEL, write_rows

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LOAD, FIRST, WITH_TRL = re.findall(r"```python\n(.*?)```", README, re.S)


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


def test_the_loading_code_gives_the_trained_models_logits(tiny_llama, saved, tmp_path, monkeypatch):
    base = saved(tiny_llama())
    monkeypatch.chdir(tmp_path)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    trained = peft.get_peft_model(tiny_llama(), lora)
    trained.save_pretrained("run/adapter")
    ids = {"input_ids": torch.arange(3, 9).reshape(1, -1)}
    loaded = run(LOAD.replace("path/to/model", base), {})
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**ids).logits, trained.eval()(**ids).logits)


def test_the_first_program_leaves_a_plain_adapter(
    tiny_llama, tiny_tokenizer, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{n} and {n} is ", "completion": f"{2 * n}"} for n in range(40)]
    names = {"model": tiny_llama(), "tokenizer": tiny_tokenizer, "rows": rows}
    program = FIRST.replace("r=16, lora_alpha=16", "r=4, lora_alpha=4")  # the model is tiny
    check(run(program, names), tiny_llama())


def with_trl(model):
    """Return the program with TRL, on a CPU and on a model that is small."""
    (on_gpu,) = re.findall(r"SFTConfig\(.*?\)", WITH_TRL)
    (on_cpu,) = re.findall(r"without a GPU: `(SFTConfig\(.*?\))`", README)
    program = WITH_TRL.replace("path/to/model", model).replace(on_gpu, on_cpu)
    return program.replace("r=64, lora_alpha=64", "r=4, lora_alpha=4")


def test_the_program_with_trl_trains_b(saved, tiny_llama, tmp_path, monkeypatch):
    program = with_trl(saved(tiny_llama()))
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{n} and {n} is ", "completion": f"{2 * n}"} for n in range(12)]
    Path("train.jsonl").write_text("\n".join(map(json.dumps, rows)))

    model = run(program, {})

    assert any(p.abs().max() > 0 for n, p in model.named_parameters() if ".lora_B." in n)
    check(model, tiny_llama())


def test_its_learning_rate_lowers_the_loss(tmp_path, monkeypatch):
    """At the 2e-5 of TRL it falls by 0.24, though the embedded base is far from these rows."""
    monkeypatch.chdir(tmp_path)
    folder = write_rows(str(tmp_path / "demo"), 0)["ledger"]
    lines = (folder / "train.jsonl").read_text().splitlines()[:48]
    rows = [json.loads(line) for line in lines]
    rows = [{"prompt": row["prompt"], "completion": row["response"]} for row in rows]
    Path("train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    names = {}
    model = run(with_trl(BASE_MODEL), names).eval()
    (batch,) = calibration_batches(names["tokenizer"], rows, n=len(rows), batch_size=len(rows))
    with torch.no_grad():
        after = model(**batch).loss
        with model.disable_adapter():
            before = model(**batch).loss
    assert after < before - 1
