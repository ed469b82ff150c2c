"""What SECURITY.md says of strangers' models, held by the libraries that read them."""

import json
import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tlora import calibration_batches, cli
from tlora.errors import ConfigError
from tlora.models.pretrained import Pretrained

PROJECT = Path(__file__).parents[1]


@pytest.fixture
def hostile(llama_folder, tmp_path):
    """A copy of a model that is free to be changed, and the file that its code would write."""
    folder = Path(shutil.copytree(llama_folder, tmp_path / "model"))
    return folder, tmp_path / "written"


def test_a_chat_template_reaches_no_code(hostile):
    folder, mark = hostile
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reach = f"cycler.__init__.__globals__.os.open('{mark}', 64)"
    tokenizer.chat_template = f"{{% generation %}}{{{{ {reach} }}}}{{% endgeneration %}}"
    chat = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"}]
    with pytest.raises(Exception, match="unsafe"):
        calibration_batches(tokenizer, [{"messages": chat}])
    assert not mark.exists()


def test_the_code_of_a_base_model_runs_only_if_trusted(hostile):
    folder, mark = hostile
    code = f"open({str(mark)!r}, 'w').close()\nfrom transformers import LlamaConfig\n"
    (folder / "own.py").write_text(f"{code}class Own(LlamaConfig):\n    model_type = 'own'\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        Pretrained(name=str(folder)).config()
    assert not mark.exists()
    Pretrained(name=str(folder), trust_remote_code=True).config()
    assert mark.exists()  # else the refusal above shows nothing


def test_no_verb_trusts_code_by_default():
    records = [verb.record for verb in cli.VERBS.values()]
    trusting = [record for record in records if hasattr(record, "trust_remote_code")]
    without = {verb.name for verb in cli.VERBS.values() if verb.record not in trusting}
    assert without == {"demo", "inspect", "list"}
    assert not any(record.trust_remote_code for record in trusting)
    assert not any(getattr(record, "allow_code_execution", False) for record in records)


def test_the_readme_leads_to_security_and_its_links_lead_somewhere():
    assert "(SECURITY.md)" in (PROJECT / "README.md").read_text("utf-8")
    links = re.findall(r"\]\(([^)#:]+)[^)]*\)", (PROJECT / "SECURITY.md").read_text("utf-8"))
    assert links
    assert [link for link in links if not (PROJECT / link).exists()] == []
