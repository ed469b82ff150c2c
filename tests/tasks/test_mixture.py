"""Several files as one source of rows."""

import gzip
import json
from collections import Counter

import pytest

from tlora.errors import ConfigError
from tlora.tasks.dataconfig import DataConfig
from tlora.tasks.jsonl import Jsonl
from tlora.tasks.mixture import Part, parts
from tlora.training.digests import input_digest
from tlora.training.runconfig import RunConfig


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        rows = [{"prompt": f"{name}{n}", "completion": "x"} for n in range(10)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def load(files, **data):
    task = Jsonl(DataConfig(**data))
    raw, _ = task.load(files, None)
    return task.rows(raw, files)


def prompts(files, **data):
    return [row["prompt"] for row in load(files, **data)]


def test_files_follow_each_other():
    assert prompts("a.jsonl,b.jsonl") == prompts("a.jsonl") + prompts("b.jsonl")
    assert prompts("*.jsonl") == prompts("a.jsonl,b.jsonl")


def test_weights_draw_shares_of_the_rows_with_the_seed():
    drawn = prompts("a.jsonl,b.jsonl:0.3")
    assert Counter(prompt[0] for prompt in drawn) == {"a": 10, "b": 3}
    assert drawn == sorted(drawn)
    seeds = {tuple(prompts("b.jsonl:.3", subset_seed=seed)) for seed in range(5)}
    assert len(seeds) > 1
    assert Counter(prompts("a.jsonl:2.5")).most_common(1)[0][1] == 3
    assert len(prompts("a.jsonl:2.5")) == 25


def test_yaml_lists_say_the_same():
    files = ["a.jsonl", {"path": "b.jsonl", "weight": 0.3}]
    config = RunConfig.from_dict({"train_file": files, "data": {"subset_seed": 1}})
    assert config.train_file == "a.jsonl,b.jsonl:0.3"
    with pytest.raises(ConfigError, match=r"`train_file` has \{'file': 'a'\}; give paths, or"):
        RunConfig.from_dict({"train_file": [{"file": "a"}]})


def test_files_of_different_shapes_are_each_read_by_their_own(here, caplog):
    chat = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}
    (here / "c.json").write_text(json.dumps([chat]))
    (here / "d.csv").write_text("question,answer\nwhy,so\n")
    (here / "e.txt").write_text("a line\n\nand another\n")
    with caplog.at_level("INFO"):
        rows = load("c.json,d.csv,e.txt")
    assert [[*row] for row in rows] == [["messages"], ["messages"], ["text"], ["text"]]
    assert [row.getMessage() for row in caplog.records] == [
        "c.json: reading 1 rows as ShareGPT conversations, formatted by the model's chat template.",
        "d.csv: reading 1 rows as questions and answers, formatted by the model's chat template.",
        "e.txt: reading 2 rows as plain text, used unchanged.",
    ]


def test_files_may_be_zipped(here):
    with gzip.open(here / "z.jsonl.gz", "wt") as file:
        file.write((here / "a.jsonl").read_text())
    assert prompts("z.jsonl.gz") == prompts("a.jsonl")


def test_a_name_with_a_comma_or_a_colon_is_a_name(here):
    for name in ("x,y.jsonl", "z:1"):
        (here / name).write_text("{}")
        assert parts(name) == [Part(name)]


def test_a_small_weight_is_a_weight():
    files = RunConfig.from_dict({"train_file": [{"path": "a.jsonl", "weight": 1e-7}]}).train_file
    assert parts(files) == [Part("a.jsonl", 1e-7)]


def test_a_digest_of_several_changes_with_each_file_and_weight(here):
    before = input_digest("a.jsonl,b.jsonl")
    assert input_digest("a.jsonl") != before != input_digest("a.jsonl,b.jsonl:0.5")
    (here / "b.jsonl").write_text("{}")
    assert input_digest("a.jsonl,b.jsonl") != before
