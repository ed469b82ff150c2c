"""`pip install tlora` without extras: the library works; a verb names the extra that it lacks."""

import re

import environment
import pytest
from packaging.utils import canonicalize_name

BASE = "import tlora.demo, pathlib; print(pathlib.Path(tlora.demo.__file__).parent / 'base')"
README = re.findall(
    r"```python\n(.*?)```", (environment.PROJECT / "README.md").read_text("utf-8"), re.S
)[1]
START = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
import tlora

def load():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(BASE)

model, tokenizer = load(), AutoTokenizer.from_pretrained(BASE)
rows = [{"prompt": f"{n} + {n} = ", "response": f"{2 * n}"} for n in range(8)]
"""
STEPS = """
batches = tlora.calibration_batches(tokenizer, rows, batch_size=4)
config = tlora.TLoraConfig(r=2, lora_alpha=2, target_modules="all-linear", task_type="CAUSAL_LM")
tlora.calibrate(model, batches, config).save("statistics.safetensors")
plan = tlora.plan(model, tlora.Calibration.load("statistics.safetensors"), config)
plan.save("plan.safetensors")
model = tlora.attach(model, tlora.AdapterPlan.load("plan.safetensors"))
at_once = tlora.get_tlora_model(load(), config, batches).state_dict()
for name, value in model.state_dict().items():
    torch.testing.assert_close(value, at_once[name], atol=1e-3, rtol=0)
"""
CHAT = """
chat = [{"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"}]}]
turn = "{% generation %}{{ message['content'] }}{% endgeneration %}"
tokenizer.chat_template = "{% for message in messages %}" + turn + "{% endfor %}"
assert (tlora.calibration_batches(tokenizer, chat)[0]["labels"] >= 0).any()
tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
labels = tlora.calibration_batches(tokenizer, chat)[0]["labels"]
assert (labels >= 0).any() and (labels < 0).any()
"""
TRAINING = """
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
before = model(**batches[0]).loss
for _ in range(3):
    optimizer.zero_grad()
    model(**batches[0]).loss.backward()
    optimizer.step()
after = model(**batches[0]).loss
assert after < before, (before, after)
model.save_pretrained("adapter")
again = tlora.load_adapter(load(), "adapter", is_trainable=True)
assert torch.equal(again.train(model.training)(**batches[0]).loss, after)
"""


@pytest.fixture(scope="module")
def base(bare, tmp_path_factory):
    """Return the folder of the demo's base model, as it is installed."""
    done = bare.run("-c", BASE, folder=tmp_path_factory.mktemp("base"))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_package_of_an_extra_is_there(bare, wheel, tmp_path):
    """Else the tests below would show nothing."""
    found = environment.requirements(wheel, tmp_path)
    needed = environment.closure(each for each in found if environment.applies(each))
    extras = {canonicalize_name(each.name) for each in found} - needed.keys() - {"tlora"}
    assert {"trl", "datasets", "scipy", "scikit-learn", "matplotlib", "lm-eval"} <= extras
    listed = (
        "import importlib.metadata as m; print(*{d.name for d in m.distributions()}, sep='\\n')"
    )
    done = bare.run("-c", listed, folder=tmp_path)
    there = {canonicalize_name(name) for name in done.stdout.split()}
    assert "torch" in there
    assert there & extras == set()


def test_the_library_calibrates_trains_saves_and_loads(bare, base, tmp_path):
    """Step by step, and as README's program for your own loop does."""
    program = START.replace("BASE", repr(base)) + STEPS + CHAT
    program += "model = load()\n" + README + TRAINING
    done = bare.run("-c", program, folder=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["list", "methods"], ["train", "-h"]])
def test_the_command_line_says_what_there_is(bare, words, tmp_path):
    done = bare.run("-m", "tlora.cli", *words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("train", ["demo"]),
        ("train", ["train", "--model", "m", "--train_file", "rows.jsonl"]),
        ("train", ["init", "--model", "m", "--train_file", "rows.jsonl"]),
        ("train", ["inspect", "run"]),
        ("compare", ["compare", "--model", "m", "--train_file", "rows.jsonl"]),
        ("eval", ["eval", "m", "--tasks", "gsm8k-paper"]),
    ],
)
def test_a_verb_without_its_extra_says_so_in_one_sentence(bare, extra, words, tmp_path):
    done = bare.run("-m", "tlora.cli", *words, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert f'pip install ".[{extra}]"' in done.stderr
    assert list(tmp_path.iterdir()) == []
