"""Model folders that are damaged, and names that the Hub does not give: one sentence each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub
from safetensors.torch import load_file, save_file

from tlora.errors import ConfigError
from tlora.models import pretrained
from tlora.models.pretrained import Pretrained

CAUSAL = "transformers:AutoModelForCausalLM"


@pytest.fixture
def folder(llama_folder, tmp_path) -> Path:
    return Path(shutil.copytree(llama_folder, tmp_path / "model"))


def load(folder: Path) -> None:
    checkpoint = Pretrained(name=str(folder))
    checkpoint.tokenizer()
    checkpoint.config()
    checkpoint.model(CAUSAL, torch.device("cpu"))


TEXTS = [
    *[("config.json", text) for text in ("", "[]", "null", '"x"', "{}", "{", "[" * 100_000)],
    *[("tokenizer.json", text) for text in ("", "[]", "{}", "{")],
    *[("tokenizer_config.json", text) for text in ("[]", '{"tokenizer_class": 5}')],
    *[("model.safetensors", text) for text in ("", "x" * 100)],
    ("generation_config.json", "[]"),
]


@pytest.mark.parametrize(("name", "text"), TEXTS)
def test_a_file_that_is_something_else_is_a_sentence(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(ConfigError, match=r"^model: .*cannot be loaded: .+") as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


FIELDS = [
    {"hidden_size": "x"},
    {"hidden_size": -16},
    {"num_attention_heads": 0},
    {"num_attention_heads": 3},
    {"num_hidden_layers": None},
    {"num_hidden_layers": 2**31},
    {"hidden_act": "nosuch"},
    {"model_type": "nosuch"},
    {"model_type": ["llama"]},
    {"dtype": "float99"},
    {"pad_token_id": 9999},
    {"quantization_config": 5},
    {"auto_map": 5},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_a_config_that_no_model_can_be_built_from_is_a_sentence(folder, fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(ConfigError, match=r"^model: .*cannot be loaded: .+") as caught:
        load(folder)
    assert len(str(caught.value).splitlines()) == 1


def test_weights_of_other_sizes_than_the_config_says_are_named(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] = weights["model.norm.weight"][:5].clone()
    save_file(weights, file, metadata={"format": "pt"})
    says = r"model\.norm\.weight is 5 in its files and 16 by its config \(1 differ\)"
    with pytest.raises(ConfigError, match=says):
        load(folder)


@pytest.mark.parametrize(
    "index",
    [
        [],
        {},
        {"weight_map": []},
        {"metadata": {}, "weight_map": {"lm_head.weight": 5}},
        {"metadata": {}, "weight_map": {"lm_head.weight": "nosuch.safetensors"}},
    ],
    ids=str,
)
def test_a_damaged_index_of_shards_is_a_sentence(folder, index):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"^model: .*cannot be loaded: .+"):
        load(folder)


def test_memory_that_runs_out_is_no_fault_of_the_files(folder):
    with pytest.raises(torch.OutOfMemoryError), pretrained.readable(str(folder), "model"):
        raise torch.OutOfMemoryError("too little")


def test_a_panic_of_the_library_tokenizers_is_a_sentence(folder):
    class PanicException(BaseException):
        """As PyO3 makes it: no Exception."""

    with (
        pytest.raises(ConfigError, match="cannot be loaded: range end"),
        pretrained.readable(str(folder), "tokenizer"),
    ):
        raise PanicException("range end index 6 out of range")
    with pytest.raises(KeyboardInterrupt), pretrained.readable(str(folder), "tokenizer"):
        raise KeyboardInterrupt


@pytest.fixture
def asked(monkeypatch):
    """Answer every question to the Hub with an error; return what was asked."""
    asked: list[str] = []

    def answer_with(error: Exception):
        def answer(url: str, **_: object):
            asked.append(url)
            raise error

        pretrained.check_hub.cache_clear()
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", answer)
        return asked

    yield answer_with
    pretrained.check_hub.cache_clear()


def of_hub(kind: type[Exception], text: str) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, text)
    return error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (of_hub(hub.RepositoryNotFoundError, "401"), "no model of this name on the Hub"),
        (of_hub(hub.GatedRepoError, "403"), "on the Hub is restricted"),
        (OSError("Name or service not known"), "cannot be reached .Name or service not known."),
        (TimeoutError("timed out"), "the Hub cannot be reached .timed out."),
    ],
)
def test_a_name_that_cannot_be_had_is_asked_for_once(asked, error, says):
    questions = asked(error)
    with pytest.raises(ConfigError, match=f"'no/such'.*{says}"):
        Pretrained(name="no/such").tokenizer()
    assert len(questions) == 1


def test_a_model_whose_repository_lacks_the_file_is_for_its_reader(asked):
    questions = asked(of_hub(hub.EntryNotFoundError, "404"))
    pretrained.check_hub("no/such", "config.json")
    assert len(questions) == 1


@pytest.mark.parametrize("cached", [False, True])
def test_offline_a_name_that_is_not_in_the_cache_is_refused(asked, monkeypatch, tmp_path, cached):
    asked(of_hub(hub.OfflineModeIsEnabled, "offline"))
    monkeypatch.setattr(huggingface_hub.file_download.constants, "HF_HUB_CACHE", str(tmp_path))
    if cached:  # in part: whoever reads it says what it lacks
        (tmp_path / "models--no--such").mkdir()
        pretrained.check_hub("no/such", "config.json")
        return
    with pytest.raises(ConfigError, match=r"no folder 'no/such', and no model .* cache; check"):
        pretrained.check_hub("no/such", "config.json")


def test_a_folder_without_a_vocabulary_is_told_what_it_lacks(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json or other vocabulary; copy"):
        Pretrained(name=str(folder)).tokenizer()
