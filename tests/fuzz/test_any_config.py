"""Configurations from Python, from files and from flags, and what is planned by them."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import torch
from fuzzing import JUNK, accepted, damaged, fuzz
from hypothesis import strategies as st
from torch import nn

from tlora import AdapterPlan, TLoraConfig, calibrate, cli, plan
from tlora.checks import default_of, hints
from tlora.evaluations import consent, names
from tlora.parsing import parse
from tlora.registry import EVALUATIONS, METHODS
from tlora.training.kinds import KINDS, check_trainer_fields
from tlora.training.runconfig import RunConfig
from tlora.yamlfiles import read_yaml, to_yaml

RECORDS = {name: verb.record for name, verb in cli.VERBS.items()}
PRESETS = sorted(Path(names.__file__).parents[1].glob("presets/*.yaml"))


def right(kind: Any) -> st.SearchStrategy[Any]:
    """Return values that a field of a type may take, by its type alone."""
    inside = [option for part in (kind, *typing.get_args(kind)) for option in typing.get_args(part)]
    options = [each for each in inside if isinstance(each, str | bool)]
    return st.sampled_from([*options, True, 1, 2, 0.5, "1", "2GiB", "q_proj", ["q_proj"], None])


def values(record: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Return a few fields of a record with right and wrong values, and at times unknown ones."""
    fields = {name: right(kind) | JUNK for name, kind in hints(record).items()}
    some = st.lists(st.sampled_from([*fields]), max_size=5, unique=True)
    known = some.flatmap(lambda picked: st.fixed_dictionaries({n: fields[n] for n in picked}))
    return known | st.tuples(known, st.dictionaries(st.text(max_size=4), JUNK, max_size=1)).map(
        lambda pair: pair[0] | pair[1]
    )


@fuzz(90, values=values(TLoraConfig))
def test_a_configuration_is_kept_or_refused(values):
    found = accepted(lambda: TLoraConfig(**values))
    if found is not None:
        assert TLoraConfig.from_dict(found.to_dict()) == found
        assert isinstance(found.needs_backward and found.bounds_moments, bool)
        assert found.lora_alpha / found.r >= 0


METHOD_OPTIONS = {name: METHODS.load(name).options for name in METHODS.names()}


@fuzz(60, data=st.data())
def test_options_of_a_method_are_kept_or_refused(data):
    name = data.draw(st.sampled_from([*METHOD_OPTIONS]))
    values_ = data.draw(values(METHOD_OPTIONS[name]))
    config = accepted(lambda: RunConfig.from_dict({"method": name, "adapter": values_}))
    found = config and accepted(config.resolved)
    if found is not None:
        assert found.resolved() == found


@fuzz(80, data=st.data())
def test_a_record_of_any_verb_survives_yaml_or_is_refused(data, tmp_path):
    record = RECORDS[data.draw(st.sampled_from([*RECORDS]))]
    needed = [f.name for f in dataclasses.fields(record) if default_of(f) is dataclasses.MISSING]
    given = dict.fromkeys(needed, "path") | data.draw(values(record))
    found = accepted(lambda: record.from_dict(given))
    if found is not None:
        (tmp_path / "a.yaml").write_text(to_yaml(found), encoding="utf-8")
        assert record.from_dict(read_yaml(tmp_path / "a.yaml")) == found


YAMLS = [path.read_bytes() for path in PRESETS]
YAMLS += [
    to_yaml(RunConfig(model="m", train_file="rows.jsonl", adapter={"r": 4})).encode(),
    b"model: m\ntrain_file: a.jsonl\nmethods: [tlora, lora]\nlearning_rates: [1e-4, 2e-4]\n"
    b"tuning_seeds: [0]\nfinal_seeds: [1, 2]\ntest_file: b.jsonl\n",
    b"models: {base: m, tuned: run}\ntasks: [gsm8k-paper]\noutput_dir: out\nbatch_size: 8\n",
]


@fuzz(100, data=st.data(), record=st.sampled_from([*RECORDS]))
def test_a_file_of_fields_is_read_or_refused(data, record, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_bytes(data.draw(st.sampled_from(YAMLS).flatmap(damaged)))
    found = accepted(lambda: parse("tlora", RECORDS[record], [str(file)]).record)
    if isinstance(found, RunConfig):
        accepted(found.resolved)


WORDS = st.one_of(
    st.sampled_from(
        [
            *("--model", "--adapter.r", "--adapter.target_modules", "--trainer.max_steps", "--r"),
            *(
                "--data.val_size",
                "--adapter",
                "--data",
                "--resume",
                "--alpha",
                "--seed",
                "--epochs",
            ),
            *("--method", "--preset", "--task", "--tokens.add", "--learning_rate", "-", "--", "-1"),
            *(
                "m",
                "0",
                "-1",
                "1e-4",
                "true",
                "null",
                "[a, b]",
                "{a: 1}",
                "a=1,b=2",
                "a,b",
                "=",
                "",
            ),
            *("tlora", "lora", "recommended", "paper-rule", "9" * 400, "[" * 600, "&a [*a]", "é"),
        ]
    ),
    st.tuples(
        st.sampled_from(["--adapter.", "--trainer.", "--data.", "--"]), st.text(max_size=4)
    ).map("".join),
    st.text(max_size=6),
)


@fuzz(110, words=st.lists(WORDS, max_size=8), verb=st.sampled_from([*RECORDS]))
def test_flags_are_read_or_refused(words, verb):
    found = accepted(lambda: parse(f"tlora {verb}", RECORDS[verb], words).record)
    if isinstance(found, RunConfig):
        accepted(found.resolved)


@fuzz(40, data=st.data())
def test_fields_of_the_trainer_are_taken_or_refused(data):
    from tlora.training.argumentfields import declared_fields

    kind = KINDS[data.draw(st.sampled_from([*KINDS]))]
    known = st.sampled_from(sorted(declared_fields(kind.arguments)))
    fields = data.draw(st.dictionaries(known, right(Any) | JUNK, max_size=3))
    accepted(lambda: check_trainer_fields(kind, fields))


OURS = [b"task: a\ninclude: b.yaml\noutput_type: generate_until\ndoc_to_text: !function utils.f\n"]
OURS += [path.read_bytes() for path in sorted(Path(names.__file__).parent.glob("*paper.yaml"))[:4]]


@fuzz(30, content=st.sampled_from(OURS).flatmap(damaged), name=st.sampled_from(["a", "b"]))
def test_the_yaml_of_an_evaluation_is_read_or_refused(content, name, tmp_path):
    file = tmp_path / f"{name}.yaml"
    file.write_bytes(content)
    accepted(lambda: names._settings(file))
    accepted(lambda: consent.code_in(file))


class Small(nn.Module):
    """Two layers of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> Any:
        out = self.two(torch.relu(self.one(x)))
        return type("Output", (), {"loss": out.square().mean(), "logits": out})


PLANNED = ["r", "lora_alpha", "rank_min", "rank_max", "budget", "allocate_rank", "allocate_scale"]
PLANNED += ["scale_rule", "basis", "whiten", "covariance", "subspace", "memory_budget", "freeze_a"]
PLANNED += ["sensitivity_rule", "target_modules", "exclude_modules", "seed"]


@fuzz(60, data=st.data(), scale=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e6, 1e18]))
def test_a_plan_keeps_its_promises_or_is_refused(data, scale, tmp_path):
    picked = data.draw(st.lists(st.sampled_from(PLANNED), max_size=6, unique=True))
    types = hints(TLoraConfig)
    sizes = st.integers(0, 40) | st.sampled_from([2**31, 2**62, 1e-9, 1e18])
    given = {name: data.draw(right(types[name]) | sizes) for name in picked}
    config = accepted(lambda: TLoraConfig(**{"target_modules": ["one", "two"]} | given))
    if config is None:
        return
    torch.manual_seed(0)
    model, batches = Small(), [{"x": scale * torch.randn(3, 6)} for _ in range(2)]
    made = accepted(lambda: plan(model, calibrate(model, batches, config), config))
    if made is None:
        return
    for module in made.modules.values():
        assert 0 <= module.rank <= min(module.d_in, module.d_out, config.rank_max or 99)
        assert module.lora_A.shape == (module.rank, module.d_in)
        assert torch.isfinite(module.lora_A).all()
        if config.basis != "random" and not config.whiten:
            gram = module.lora_A @ module.lora_A.T
            assert torch.allclose(gram, torch.eye(module.rank), atol=1e-4)
    again = AdapterPlan.load(made.save(tmp_path / "plan"))
    assert again.config == made.config
    assert all(torch.equal(again.modules[n].lora_A, m.lora_A) for n, m in made.modules.items())
    assert [dataclasses.replace(m, lora_A=None) for m in again.modules.values()] == [
        dataclasses.replace(m, lora_A=None) for m in made.modules.values()
    ]


def test_every_evaluation_is_among_those_that_are_damaged():
    assert len(OURS) == 5
    assert {path.stem for path in Path(names.__file__).parent.glob("[a-z]*.yaml")} <= {
        *EVALUATIONS.names()
    } | {"none"}
