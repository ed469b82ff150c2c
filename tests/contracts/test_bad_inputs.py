"""Every wrong input of `bad_inputs/` is refused in one sentence, in time, and leaves nothing.

With `RECORD_SENTENCES=1` in the environment the sentences in the files become what the commands
say; read the difference before it is committed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers
from bad_cases import (
    STAGES,
    Bench,
    Case,
    Said,
    TooLateError,
    cases,
    changed,
    contents,
    distinct,
    matches,
    record,
    spoken,
)

from tlora.files import seal_tensors

CASES = cases()
LOADS = Case(
    area="none", name="loads", argv="init --dry_run --model {shared}/llama", before="imports"
)
"""A right command, which imports torch."""
RECORDS = bool(os.environ.get("RECORD_SENTENCES"))
HEAVY = ("torch", "transformers", "trl", "datasets", "lm_eval", "peft")
SCRIPT = """
import json, logging, os, sys
from importlib.machinery import PathFinder
logging.getLogger().addHandler(logging.NullHandler())
sys.path.insert(0, sys.argv[1])
from bad_cases import TooLateError, spoken

class Blocker:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name in sys.argv[2:]:
            spec = PathFinder.find_spec(name, path, target)
            spec.loader = cls
            return spec
    def create_module(spec):
        return None
    def exec_module(module):
        raise TooLateError(module.__name__)

sys.meta_path.insert(0, Blocker)
said = []
for folder, argv, env in json.load(sys.stdin):
    os.chdir(folder)
    old = dict(os.environ)
    os.environ.update(env)
    try:
        said.append([*spoken(argv), []])
    except TooLateError as late:
        said.append([-1, "", [str(late)]])
    for name in os.environ.keys() - old.keys():
        del os.environ[name]
    os.environ.update(old)
print(json.dumps(said))
"""


@pytest.fixture(scope="session")
def bench(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_tokenizer: Any,
    tiny_llama: Any,
    tiny_bert_classifier: Any,
    tiny_t5: Any,
) -> Bench:
    """Make what the cases share: models, adapters and rows."""
    shared = tmp_path_factory.mktemp("shared")
    models = {"llama": tiny_llama(), "classifier": tiny_bert_classifier(), "t5": tiny_t5()}
    for name, model in models.items():
        model.save_pretrained(shared / name)
        tiny_tokenizer.save_pretrained(shared / name)
    lora = peft.LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 3}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(models["llama"], lora)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    adapted.peft_config["default"].base_model_name_or_path = str(shared / "llama")
    adapted.save_pretrained(str(shared / "adapter"))
    shutil.copytree(shared / "adapter", shared / "sealed")
    seal_tensors(shared / "sealed" / "adapter_model.safetensors")
    rows = [{"prompt": f"{n}+{n}?", "response": f" {n + n}"} for n in range(8)]
    labeled = [{"text": f"row {n}", "label": n % 2} for n in range(8)]
    for name, lines in (("rows", rows), ("labeled", labeled)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (shared / f"{name}.jsonl").write_text(text)
    return Bench(shared, tmp_path_factory.mktemp("cases"))


@pytest.fixture(scope="session")
def light(bench: Bench, request: Any) -> dict[str, Said]:
    """Run all commands that import nothing heavy in one fresh process, and one that does."""
    items = [getattr(item, "callspec", None) for item in request.session.items]
    cases = [item.params["case"] for item in items if item and "case" in item.params]
    chosen = [LOADS, *(case for case in cases if getattr(case, "before", "") == "imports")]
    given = [bench.prepared(case) for case in chosen]
    before = [contents(folder) | contents(bench.shared) for folder, _ in given]
    commands = [
        (str(folder), argv, case.env) for case, (folder, argv) in zip(chosen, given, strict=True)
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), *HEAVY],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = {}
    rows = zip(chosen, given, before, json.loads(done.stdout.splitlines()[-1]), strict=True)
    for case, (folder, _), old, (code, error, loaded) in rows:
        now = contents(folder) | contents(bench.shared)
        found[case.name] = Said(code, bench.emptied(error, folder), loaded, changed(old, now))
    return found


@pytest.fixture
def said(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Run the command of a case that may import, and stop it where it goes too far."""

    def run(case: Case) -> Said:
        folder, argv = bench.prepared(case)
        before = contents(folder) | contents(bench.shared)
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            for name, value in case.env.items():
                patch.setenv(name, value)
            guard(patch, STAGES.index(case.before))
            try:
                code, error = spoken(argv)
            except TooLateError as late:
                return Said(-1, "", [str(late)])
        now = contents(folder) | contents(bench.shared)
        return Said(code, bench.emptied(error, folder), [], changed(before, now))

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    yield run
    datasets.enable_progress_bars()
    transformers.utils.logging.enable_progress_bar()


def guard(patch: pytest.MonkeyPatch, first: int) -> None:
    """Let a stage from ``first`` on, if it is reached, stop the command."""
    reached = {
        "weights": (transformers.PreTrainedModel, "from_pretrained"),
        "computation": (torch.nn.Embedding, "forward"),
        "training": (transformers.Trainer, "train"),
    }
    for stage in STAGES[first:]:
        owner, method = reached[stage]

        def stop(*_: Any, stage: str = stage, **__: Any) -> None:
            raise TooLateError(stage)

        patch.setattr(owner, method, stop)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.area}-{case.name}")
def test_a_wrong_input_is_refused_in_one_sentence(case: Case, request: Any) -> None:
    if case.before == "imports":
        found = request.getfixturevalue("light")[case.name]
    else:
        found = request.getfixturevalue("said")(case)
    if RECORDS:
        record(case, found.error, found.code)
    else:
        assert matches(case, found.error), found.error
        assert found.code == case.code
    assert found.reached == []
    assert found.changed == []
    assert re.fullmatch(r"tlora: \S.*\n", found.error, re.DOTALL)
    assert not re.search(r"Traceback|<class| at 0x|\n\n|\ntlora: ", found.error)


def test_a_command_that_goes_too_far_is_stopped(light: dict[str, Said], said: Any) -> None:
    assert light[LOADS.name].reached != []
    argv = "train --model {shared}/llama --train_file {shared}/rows.jsonl --output_dir {dir}/new"
    for stage in STAGES[1:]:
        case = Case(area="none", name=stage, argv=f"{argv} --max_steps 1", before=stage)
        assert said(case).reached == [stage]


def test_the_cases_are_three_hundred_and_no_two_are_one() -> None:
    names = Counter(case.name for case in CASES)
    assert [name for name, count in names.items() if count > 1] == []
    assert len({distinct(case) for case in CASES}) == len(CASES)
    assert len(CASES) >= 300
