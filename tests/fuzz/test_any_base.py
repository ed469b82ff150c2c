"""Base models: configuration, tokenizer, weights, index, and the GGUF file made of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import accepted, damaged, edited, fuzz, json_file, tensor_file
from hypothesis import strategies as st

from tlora.exporters.checkpoint import INDEX, SINGLE, stored_tensors
from tlora.exporters.ggufbase import write_base
from tlora.models.pretrained import Pretrained, check_weights, dtype_of, positions_of
from tlora.models.skeleton import layer_sizes


@pytest.fixture(scope="module")
def base(llama_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with a tokenizer."""
    return Path(shutil.copytree(llama_folder, tmp_path_factory.mktemp("base") / "base"))


@pytest.fixture(scope="module")
def shards(tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in several files with an index."""
    folder = tmp_path_factory.mktemp("shards")
    tiny_llama().save_pretrained(folder, max_shard_size="20KB")
    return folder


def check(folder: Path, name: str, content: bytes, read: Callable[[], Any]) -> Any:
    """Read a model with other content in a file of it."""
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(content)
    try:
        return accepted(read)
    finally:
        (folder / name).write_bytes(whole)


def described(folder: Path) -> Any:
    config = Pretrained(name=str(folder)).config()
    return dtype_of(config), positions_of(config), layer_sizes(Pretrained(name=str(folder)))


QUANTIZED = [
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
]


@fuzz(50, data=st.data())
def test_a_configuration_describes_a_model_or_is_refused(base, data):
    content = data.draw(json_file((base / "config.json").read_bytes()))
    check(base, "config.json", content, lambda: described(base))


@fuzz(16, data=st.data())
def test_a_quantized_model_is_loaded_or_refused(base, data):
    fields = json.loads((base / "config.json").read_text())
    fields["quantization_config"] = data.draw(st.sampled_from(QUANTIZED).flatmap(edited))
    read = Pretrained(name=str(base)).model
    check(
        base,
        "config.json",
        json.dumps(fields).encode(),
        lambda: read("transformers:AutoModelForCausalLM", torch.device("cpu")),
    )


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@fuzz(8, data=st.data())
def test_a_tokenizer_is_loaded_or_refused(base, name, data):
    content = data.draw(json_file((base / name).read_bytes()))
    found = check(base, name, content, Pretrained(name=str(base)).tokenizer)
    if found is not None:
        accepted(lambda: len(found))


@fuzz(24, data=st.data())
def test_weights_are_loaded_or_refused(base, data):
    content = data.draw(tensor_file((base / SINGLE).read_bytes()))
    read = Pretrained(name=str(base)).model

    def both() -> None:
        stored_tensors(base)
        read("transformers:AutoModelForCausalLM", torch.device("cpu"))

    check(base, SINGLE, content, both)


@fuzz(24, data=st.data())
def test_an_index_of_shards_is_followed_or_refused(shards, data):
    content = data.draw(json_file((shards / INDEX).read_bytes()))

    def both() -> Any:
        check_weights(str(shards))
        return stored_tensors(shards)

    found = check(shards, INDEX, content, both)
    assert found is None or all((shards / name).parent == shards for name in found)


@fuzz(16, data=st.data())
def test_a_base_is_written_as_gguf_or_refused(base, data, tmp_path):
    name = data.draw(st.sampled_from(["config.json", "tokenizer.json", SINGLE]))
    whole = (base / name).read_bytes()
    content = data.draw(damaged(whole) if name == SINGLE else json_file(whole))
    file = tmp_path / "base.gguf"
    file.unlink(missing_ok=True)
    check(
        base,
        name,
        content,
        lambda: write_base(file, base, Pretrained(name=str(base)).config()) or True,
    )
    assert [path.name for path in tmp_path.iterdir()] in ([], ["base.gguf"])
