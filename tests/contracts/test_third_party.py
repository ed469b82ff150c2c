"""docs/extending.md: what another package brings is listed and used as what is built in."""

import json
import re
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tlora import cli
from tlora.errors import ConfigError
from tlora.registry import EVALUATIONS, FORMATS, METHODS, TASKS

try:
    import tomllib
except ImportError:
    import tomli as tomllib

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)```$", PAGE, re.M | re.S))
PROJECT = tomllib.loads(FILES["pyproject.toml"])["project"]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install the package of the page, as pip leaves it in site-packages."""
    site = tmp_path / "site-packages"
    package, info = site / "thinlora", site / "thinlora-1.2.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text("")
    for name, text in FILES.items():
        (site / name).write_text(text)
    name, version = PROJECT["name"], PROJECT["version"]
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups = PROJECT["entry-points"]
    groups["tlora.methods"]["lora"] = "thinlora.method:Thin"  # whose name is taken
    lines = []
    for group, points in groups.items():
        lines += [f"[{group}]", *(f"{each} = {place}" for each, place in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(site))
    yield
    for module in [each for each in sys.modules if each.partition(".")[0] == "thinlora"]:
        sys.modules.pop(module)


def test_its_method_is_listed_beside_the_built_in_ones(installed, capsys):
    assert METHODS.names()[-1] == "thin"
    assert cli.main(["list", "methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split(maxsplit=1) == ["thin", "from thinlora"]
    # A built-in name stays what it was.
    assert METHODS.load("lora").__module__ == "tlora.methods.lora"


@pytest.mark.parametrize(
    ("registry", "name"),
    [(METHODS, "thin"), (TASKS, "captions"), (EVALUATIONS, "backwards"), (FORMATS, "one-file")],
)
def test_all_four_are_registered(installed, registry, name):
    assert registry.names()[-1] == name


def test_its_method_trains_on_its_task_and_its_format_holds_the_update(
    installed, saved, tiny_llama, tmp_path, capsys
):
    rows = tmp_path / "rows.jsonl"
    lines = (json.dumps({"name": each, "caption": "A lamp."}) for each in "1234")
    rows.write_text("\n".join(lines))
    run, out = tmp_path / "run", tmp_path / "out"
    flags = ["--model", saved(tiny_llama()), "--train_file", str(rows), "--method", "thin"]
    flags += ["--output_dir", str(run), "--max_steps", "2", "--task", "captions"]
    flags += ["--trainer.use_cpu", "true", "--trainer.disable_tqdm", "true"]
    assert cli.main(["train", *flags]) == 0, capsys.readouterr().err
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 1
    assert json.loads((run / "run.json").read_text())["config"]["method"] == "thin"

    flags = ["--format", "one-file", "--output_dir", str(out)]
    assert cli.main(["export", str(run), *flags]) == 0, capsys.readouterr().err
    updates = load_file(out / "update.safetensors")
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    assert len(updates) == len(adapter) / 2
    for name, update in updates.items():
        (a,) = (value for key, value in adapter.items() if f".{name}.lora_A." in key)
        (b,) = (value for key, value in adapter.items() if f".{name}.lora_B." in key)
        assert update.allclose(config["lora_alpha"] * b @ a)


def test_its_evaluation_asks_the_rows(installed, tmp_path, monkeypatch):
    from tlora.evaluations import catalog

    monkeypatch.chdir(tmp_path)
    Path("backwards.jsonl").write_text(json.dumps({"prompt": "lamp: ", "response": "pmal"}) + "\n")
    task = catalog.build(["backwards"])["backwards"]
    (row,) = task.test_docs()
    assert (task.doc_to_text(row), task.doc_to_target(row)) == ("lamp: ", "pmal")


def test_without_the_package_its_name_is_unknown():
    with pytest.raises(ConfigError, match="there is no method 'thin'"):
        METHODS.load("thin")
