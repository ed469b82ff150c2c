"""A method that another package brings is listed and trained as a built-in one is."""

import json
import sys

import pytest

from tlora import cli
from tlora.errors import ConfigError
from tlora.registry import METHODS

CODE = '''
"""LoRA with a rank of one, by somebody else."""
from dataclasses import dataclass
from tlora.methods.lora import Lora
from tlora.methods.options import LoraOptions

@dataclass(kw_only=True)
class ThinOptions(LoraOptions):
    """LoRA's."""
    r: int = 1
    """Rank; one."""

class Thin(Lora):
    """LoRA of rank one."""
    options = ThinOptions
'''


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install a distribution with a method, as pip leaves it in site-packages."""
    site = tmp_path / "site-packages"
    package, info = site / "thinlora", site / "thinlora-1.2.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text("")
    (package / "method.py").write_text(CODE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thinlora\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(
        "[tlora.methods]\nthin = thinlora.method:Thin\nlora = thinlora.method:Thin\n"
    )
    monkeypatch.syspath_prepend(str(site))
    yield
    for name in ("thinlora", "thinlora.method"):
        sys.modules.pop(name, None)


def test_its_method_is_listed_beside_the_built_in_ones(installed, capsys):
    assert METHODS.names()[-1] == "thin"
    assert cli.main(["list", "methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split(maxsplit=1) == ["thin", "from thinlora"]
    # A built-in name stays what it was.
    assert METHODS.load("lora").__module__ == "tlora.methods.lora"


def test_its_method_trains(installed, saved, tiny_llama, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"{n}?", "response": "no"}) + "\n" for n in "1234")
    )
    flags = ["--model", saved(tiny_llama()), "--train_file", str(rows), "--method", "thin"]
    flags += ["--output_dir", str(tmp_path / "run"), "--trainer.max_steps", "2"]
    flags += ["--trainer.use_cpu", "true", "--trainer.disable_tqdm", "true"]
    assert cli.main(["train", *flags]) == 0, capsys.readouterr().err
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["method"] == "thin"


def test_without_the_package_its_name_is_unknown():
    with pytest.raises(ConfigError, match="there is no method 'thin'"):
        METHODS.load("thin")
