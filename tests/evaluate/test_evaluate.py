"""`tlora eval` from end to end on the shipped base: one table, kept when stopped, gone on with."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from lm_eval.tasks import TaskManager

from tlora import cli
from tlora.demo.run import BASE_MODEL
from tlora.errors import AdapterError, ArtifactError, ConfigError
from tlora.evaluate import evaluate, loading
from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.evalfolder import EvalFolder
from tlora.evaluate.harness_task import HarnessTask
from tlora.evaluations import catalog
from tlora.files import seal_tensors
from tlora.report import evaluation as report
from tlora.tasks.dataconfig import DataConfig


@pytest.fixture
def config(here, demo_adapter, demo_file):
    """Make a short evaluation; fields can be changed."""

    def make(**fields):
        given = {
            "models": [f"drawn={demo_adapter}"],
            "with_base": True,
            "tasks": ["jsonl"],
            "test_file": demo_file,
            "output_dir": "out",
            "data": DataConfig(format="raw"),
            "limit": 3,
        }
        return EvalConfig(**given | fields)

    return make


@pytest.fixture
def loaded(monkeypatch):
    """The names of the models that were loaded."""
    names = []
    load = loading.load

    def noted(evaluated, *args, **head):
        names.append(evaluated.name)
        return load(evaluated, *args, **head)

    monkeypatch.setattr(loading, "load", noted)
    return names


def lines(model, task="jsonl"):
    return EvalFolder("out").read_samples(model, task)


def test_one_table_of_base_adapter_and_merged(config, loaded, demo_file):
    said = []
    folder = evaluate.run(config(with_merged=True, limit=None), tell=said.append)
    found = folder.read()
    names = ["base", "drawn", "drawn-merged"]
    assert loaded == names
    assert [(m["name"], m["kind"]) for m in found["models"]] == [
        ("base", "base"),
        ("drawn", "adapter"),
        ("drawn-merged", "merged"),
    ]
    (task,) = found["tasks"]
    rows = [json.loads(line) for line in Path(demo_file).read_text().splitlines()]
    metrics = ["exact_match", "rouge1", "rouge2", "rougeL", "chrf", "-loss", "-perplexity"]
    assert (task["name"], task["metrics"], task["items"]) == ("jsonl", metrics, len(rows))
    for name in names:
        sample = lines(name)
        assert [line["prompt"] for line in sample] == [row["prompt"] for row in rows]
        assert [line["target"] for line in sample] == [row["response"] for row in rows]
        for line in sample:
            right = line["reply"].strip() == line["target"].strip()
            assert line["scores"]["exact_match"] == float(right)
        mean = sum(line["scores"]["exact_match"] for line in sample) / len(rows)
        assert task["scores"][name]["exact_match"] == pytest.approx(mean)
        assert task["seconds"][name] > 0
    assert task["scores"]["base"]["exact_match"] > 0.4  # it knows the bare sums
    assert lines("drawn") == lines("drawn-merged") != lines("base")
    assert found["config"]["with_merged"] is True
    assert found["provenance"]["packages"]["lm_eval"]
    assert len(said) == 3


def test_edited_samples_are_not_reported(config):
    evaluate.run(config(with_base=False))
    assert report.write("out").text
    file = EvalFolder("out").samples_file("drawn", "jsonl")
    file.write_text(file.read_text().replace('"exact_match": 0.0', '"exact_match": 1.0'))
    with pytest.raises(ArtifactError, match=r"jsonl\.jsonl: its content does not match its digest"):
        report.write("out")


def test_a_stopped_evaluation_keeps_what_was_finished(config, loaded, monkeypatch):
    ask = HarnessTask.evaluate

    def stopped(self, lm):
        if len(loaded) == 2:
            raise KeyboardInterrupt
        return ask(self, lm)

    Path("out").mkdir()  # as a command leaves it that is killed before its first record
    Path("out/.lock").touch()
    with monkeypatch.context() as patch:
        patch.setattr(HarnessTask, "evaluate", stopped)
        with pytest.raises(KeyboardInterrupt, match="rerun the same command to resume"):
            evaluate.run(config())
    (task,) = EvalFolder("out").read()["tasks"]
    assert list(task["scores"]) == ["base"]
    assert [file.parent.name for file in Path("out").rglob("*.jsonl")] == ["base"]
    loaded.clear()
    evaluate.run(config())
    assert loaded == ["drawn"]
    (task,) = EvalFolder("out").read()["tasks"]
    assert list(task["scores"]) == ["base", "drawn"]
    loaded.clear()
    evaluate.run(config())
    assert loaded == []


def test_models_can_be_added_to_a_table(config, loaded):
    evaluate.run(config(with_base=False))
    evaluate.run(config(models=[BASE_MODEL], with_base=False))
    evaluate.run(config(with_base=False, merge=True))
    assert loaded == ["drawn", "base", "drawn-merged"]
    found = EvalFolder("out").read()
    evaluate.run(config(with_merged=True))  # what is finished is not asked again
    assert len(loaded) == 3
    assert EvalFolder("out").read()["tasks"] == found["tasks"]
    assert [model["name"] for model in found["models"]] == ["base", "drawn", "drawn-merged"]
    assert set(found["tasks"][0]["scores"]) == {"base", "drawn", "drawn-merged"}


def test_a_model_that_has_changed_is_evaluated_anew(config, loaded, demo_adapter, here):
    shutil.copytree(demo_adapter, "mine")
    evaluate.run(config(models=["mine"], with_base=False))
    fields = json.loads(Path("mine/adapter_config.json").read_text())
    fields["lora_alpha"] *= 2
    fields["alpha_pattern"] = {key: 2 * value for key, value in fields["alpha_pattern"].items()}
    Path("mine/adapter_config.json").write_text(json.dumps(fields))
    before = lines("mine")
    loaded.clear()
    evaluate.run(config(models=["mine"], with_base=False))
    assert loaded == ["mine"]
    assert lines("mine") != before


def test_results_of_other_settings_are_not_mixed(config, demo_file):
    evaluate.run(config(limit=4, with_base=False))
    with pytest.raises(ConfigError) as error:
        evaluate.run(config(limit=5, gen_kwargs={"max_gen_toks": 3}))
    assert error.value.faults == (
        "`limit` is 5, but out was made with 4; use the same value, or another --output_dir.",
        "`gen_kwargs` is {'max_gen_toks': 3}, but out was made with {}; use the same value, or"
        " another --output_dir.",
    )
    with pytest.raises(ConfigError, match="out has another model called 'drawn'"):
        evaluate.run(config(limit=4, models=[f"drawn={BASE_MODEL}"], with_base=False))


def test_a_folder_without_results_takes_other_settings(config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(HarnessTask, "evaluate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate.run(config(limit=4))
    found = evaluate.run(config(with_base=False)).read()
    assert found["config"]["limit"] == 3
    assert [task["items"] for task in found["tasks"]] == [3]
    assert len(lines("drawn")) == 3


BAD = [
    ({"models": ["nowhere/at/all"]}, "there is no model, run or adapter 'nowhere/at/all'"),
    (
        {"test_file": None, "tasks": ["gsm8k-paper"], "data_dir": "."},
        "has none of gsm8k/test.jsonl",
    ),
    ({"test_file": "gone.jsonl"}, "gone.jsonl: there is no such file"),
    ({"tasks": ["gsm8k"]}, "cannot score 'gsm8k' by its responses"),
    (
        {"gen_kwargs": {"max_gen_toks": 256}},
        "a reply may take 256 tokens, but base has room for 256",
    ),
    ({"gen_kwargs": {"max_new_tokens": 0}}, "`gen_kwargs.max_new_tokens` is 0"),
    ({"gen_kwargs": {"do_sample": "maybe"}}, "`gen_kwargs.do_sample` is 'maybe'"),
    ({"gen_kwargs": {"num_beam": 2}}, "has the unknown option 'num_beam'; remove it. Did you"),
    ({"limit": 1.5}, "`limit` is 1.5"),
    ({"apply_chat_template": True}, "has no chat template"),
    ({"device": "cuda:77"}, "device: 'cuda:77'"),
    ({"tokenizer": "./nothing"}, "cannot load a tokenizer from './nothing'"),
]


@pytest.mark.parametrize(("fields", "said"), BAD, ids=lambda each: str(each)[:40])
def test_bad_input_is_refused_before_anything_is_loaded_or_written(config, loaded, fields, said):
    with pytest.raises((ConfigError, OSError, ValueError)) as error:
        evaluate.run(config(**fields))
    assert said in str(error.value)
    assert loaded == []
    assert not Path("out").exists()


def test_a_taken_folder_is_refused(config, here):
    (here / "taken").mkdir()
    (here / "taken/run.json").write_text("{}")
    with pytest.raises(ConfigError, match="taken holds something else"):
        evaluate.run(config(output_dir="taken"))
    with (
        EvalFolder("out").locked(),
        pytest.raises(ConfigError, match="out: another process is evaluating into this folder"),
    ):
        evaluate.run(config(limit=1))
    assert not EvalFolder("out").exists


def test_the_command_line_says_where_the_result_is(config, capsys, demo_adapter, demo_file):
    words = ["eval", "--with_base", f"drawn={demo_adapter}", "--tasks", "jsonl"]
    words += ["--test_file", demo_file, "--limit", "3", "--output_dir", "out"]
    assert cli.main([*words, "--gen_kwargs", "max_gen_toks=4,do_sample=false"]) == 0
    out = capsys.readouterr().out
    assert "base: jsonl: exact_match" in out
    found = EvalFolder("out").read()
    assert found["config"]["gen_kwargs"] == {"max_gen_toks": 4, "do_sample": False}
    assert found["tasks"][0]["items"] == 3
    assert cli.main(["eval", "--tasks", "jsonl", "--limit", "0"]) == 2
    assert "2 faults" in capsys.readouterr().err


def test_a_file_of_fields_gives_the_record_that_print_config_shows(here, capsys):
    (here / "eval.yaml").write_text(
        "models: [one, named=two]\ntasks: a, b\nlimit: 5\ngen_kwargs: {max_gen_toks: 7}\n"
    )
    words = ["--with_base", "--gen_kwargs", "temperature=0.5", "--limit", "0.5", "--print_config"]
    assert cli.main(["eval", "eval.yaml", *words]) == 0
    shown = capsys.readouterr().out
    fields = yaml.safe_load(shown)
    assert (fields["models"], fields["tasks"]) == (["one", "named=two"], ["a", "b"])
    assert (fields["limit"], fields["with_base"]) == (0.5, True)
    assert fields["gen_kwargs"] == {"max_gen_toks": 7, "temperature": 0.5}
    (here / "shown.yaml").write_text(shown)
    assert cli.main(["eval", "shown.yaml", "--print_config"]) == 0
    assert capsys.readouterr().out == shown
    assert cli.main(["eval", "eval.yaml", "three", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["models"] == ["three"]
    assert cli.main(["eval", "one", "--task", "a"]) == 2
    assert "there is no flag `--task`. Did you mean '--tasks'?" in capsys.readouterr().err
    assert cli.main(["eval", "one", "--tasks"]) == 2
    assert "--tasks needs a value" in capsys.readouterr().err


def test_a_task_of_the_harness_by_its_own_file(config, here, monkeypatch):
    # Its index of 14,000 tasks takes seconds to read.
    none = TaskManager(include_defaults=False)
    monkeypatch.setattr(catalog, "_theirs", lambda: none)
    rows = [{"q": f"{n}+1=", "right": n % 2, "options": ["5", "7"]} for n in range(4)]
    (here / "rows.json").write_text(json.dumps(rows))
    (here / "choice.yaml").write_text(
        "task: choice\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.json}}\n"
        "test_split: test\nfewshot_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{q}}'\ndoc_to_choice: '{{options}}'\ndoc_to_target: right\n"
        "target_delimiter: ''\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true},"
        " {metric: brier_score, aggregation: brier_score, higher_is_better: false}]\n"
    )
    for size in (1, 8):
        folder = f"out{size}"
        fields = {"test_file": None, "tasks": ["./choice.yaml"], "batch_size": size}
        fields |= {"num_fewshot": 2}
        evaluate.run(config(**fields, output_dir=folder))
    one, many = (EvalFolder(f"out{size}").read()["tasks"][0] for size in (1, 8))
    assert one["metrics"] == ["acc", "-brier_score"]
    for model in ("base", "drawn"):
        for metric in one["metrics"]:
            assert one["scores"][model][metric] == pytest.approx(many["scores"][model][metric])
        assert one["scores"][model]["-brier_score"] < 0
        said = [EvalFolder(f"out{size}").read_samples(model, "choice") for size in (1, 8)]
        assert said[0] == said[1]
        assert {line["reply"] for line in said[0]} <= {"5", "7"}
    # The examples are drawn anew for each model, and are the same.
    asked = [
        [line["prompt"] for line in EvalFolder("out1").read_samples(m, "choice")]
        for m in ("base", "drawn")
    ]
    assert asked[0] == asked[1]
    assert all(prompt.count("+1=") == 3 for prompt in asked[0])
    assert one["shots"] == 2


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def test_a_cut_off_base_or_adapter_is_named(config, demo_adapter, saved, tiny_llama):
    shutil.copytree(demo_adapter, "cut")
    cut_off(Path("cut/adapter_model.safetensors"))
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors: cut off or damaged"):
        evaluate.run(config(models=["cut"], with_base=False))
    base = saved(tiny_llama())
    cut_off(Path(base) / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model: .* cannot be loaded: "):
        evaluate.run(config(models=[base], with_base=False))


def test_a_flipped_bit_of_a_model_that_a_run_saved_is_named(config, saved, tiny_llama):
    base = saved(tiny_llama())
    file = Path(base) / "model.safetensors"
    seal_tensors(file)
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.safetensors: its content does not match its d"):
        evaluate.run(config(models=[base], with_base=False))


def test_what_is_finished_is_kept_when_a_later_adapter_does_not_fit(
    config, demo_adapter, saved, tiny_llama
):
    evaluate.run(config(with_base=False))
    before = EvalFolder("out").read()
    with pytest.raises(AdapterError, match="does not fit"):
        evaluate.run(
            config(models=[f"other={demo_adapter}"], model=saved(tiny_llama()), with_base=False)
        )
    assert EvalFolder("out").read()["tasks"] == before["tasks"]
    assert lines("drawn")
