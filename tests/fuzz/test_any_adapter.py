"""Adapters of any origin: what cannot be read right is refused, whatever reads it."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import accepted, damaged, fuzz, json_file, tensor_file
from hypothesis import strategies as st

from served import SERVED, Saved, save
from tlora import load_adapter
from tlora.adapter.saved import SavedLora, read_lora
from tlora.adapter.savedconfig import CONFIG, WEIGHTS
from tlora.errors import AdapterError
from tlora.exporters import export
from tlora.exporters.exportconfig import ExportConfig
from tlora.files import seal_tensors
from tlora.report import adapters
from tlora.training.continuing import with_adapter
from tlora.training.runconfig import RunConfig
from tlora.verify import adapters as readers


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A Llama and an adapter of it that carries no digest."""
    return save(SERVED["llama"], tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def base(served: Saved) -> Callable[[], Any]:
    """Build the base anew."""
    return SERVED["llama"].build


def everything(folder: Path) -> list[Any]:
    """Read a LoRA, and all that the product says of it without its base."""
    lora = read_lora(folder)
    for name in lora.keys:
        factors = lora.factors(name)
        assert factors.a.shape[0] == factors.b.shape[1] or lora.fields.get("target_parameters")
        assert torch.isfinite(factors.a).all()
        assert math.isfinite(factors.scale)
    said = [lora.base, *lora.lacks(), lora.others, lora.biases]
    if not lora.fields.get("target_parameters"):
        said += [adapters.table(adapters.inspect(lora), "layer")]
    return [*said, *(verdict.words() for verdict in readers.by_every_reader(lora))]


@contextlib.contextmanager
def changed(folder: Path, name: str, content: bytes) -> Iterator[None]:
    """Put other content into a file for as long as the body runs."""
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(content)
    try:
        yield
    finally:
        (folder / name).write_bytes(whole)


FILES = {CONFIG: json_file, WEIGHTS: tensor_file}


def drawn(data: st.DataObject, folder: Path, name: str) -> bytes:
    return data.draw(FILES[name]((folder / name).read_bytes()))


@pytest.mark.parametrize("name", FILES)
@fuzz(80, data=st.data())
def test_an_adapter_is_read_and_described_or_refused(served, name, data):
    with changed(served.adapter, name, drawn(data, served.adapter, name)):
        accepted(lambda: everything(served.adapter))


@pytest.mark.parametrize("name", FILES)
@fuzz(20, data=st.data())
def test_an_adapter_is_loaded_or_refused(served, base, name, data):
    with changed(served.adapter, name, drawn(data, served.adapter, name)):
        accepted(lambda: load_adapter(base(), served.adapter, is_trainable=True))


@fuzz(20, data=st.data())
def test_an_adapter_is_continued_or_refused(served, data):
    with changed(served.adapter, CONFIG, drawn(data, served.adapter, CONFIG)):
        accepted(lambda: with_adapter(RunConfig(continue_from=str(served.adapter))).options())


@pytest.mark.parametrize("form", ["native", "compact", "uniform"])
@fuzz(8, data=st.data())
def test_an_adapter_is_exported_or_refused(served, form, data, tmp_path):
    name = data.draw(st.sampled_from([*FILES]))
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    config = ExportConfig(path=str(served.adapter), format=form, output_dir=str(out))
    with changed(served.adapter, name, drawn(data, served.adapter, name)):
        if accepted(lambda: export.run(config)) is not None:
            # Layers without a projection get one of zeros in a uniform adapter.
            assert read_lora(out).keys.keys() >= read_lora(served.adapter).keys.keys()
        else:
            assert not out.exists()


@fuzz(30, data=st.data())
def test_a_sealed_adapter_reads_as_it_was_or_is_refused(served, data, tmp_path):
    folder = tmp_path / "adapter"
    if not folder.exists():
        shutil.copytree(served.adapter, folder)
        seal_tensors(folder / WEIGHTS)
    right: SavedLora = read_lora(folder)
    # Tensors are mapped from the file, so a change of the file would change them.
    before = {key: right.tensors[key].clone() for key in right.tensors}
    with changed(folder, WEIGHTS, drawn(data, folder, WEIGHTS)):
        found = accepted(lambda: read_lora(folder))
        if found is not None and b"tlora_digest" in (folder / WEIGHTS).read_bytes():
            assert before.keys() == found.tensors.keys()
            assert all(torch.equal(before[key], found.tensors[key]) for key in before)


@pytest.fixture(scope="module")
def gguf_file(served: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "out"
    export.run(ExportConfig(path=str(served.adapter), format="gguf", output_dir=str(out)))
    [file] = out.glob("*.gguf")
    return file


@fuzz(30, data=st.data())
def test_a_gguf_is_compared_or_refused(served, gguf_file, data):
    from tlora.verify import ggufs

    lora = read_lora(served.adapter)
    config = json.loads((served.base / "config.json").read_text())
    whole = gguf_file.read_bytes()
    content = data.draw(
        damaged(whole[:2048]).map(lambda start: start + whole[2048:]) | damaged(whole)
    )
    with changed(gguf_file.parent, gguf_file.name, content):
        found = accepted(lambda: ggufs.read(gguf_file, lora, config))
        if found is not None:
            accepted(partial(readers.by_llama_cpp, found, lora))


def test_a_header_that_claims_an_exbibyte_is_refused_without_room_for_it(served):
    file = served.adapter / WEIGHTS
    whole = file.read_bytes()
    for claim in (2**60, 2**63, 2**64 - 1, 99_999_999):
        content = claim.to_bytes(8, "little") + whole[8:]
        refused = pytest.raises(AdapterError, match="cut off or damaged")
        with changed(served.adapter, WEIGHTS, content), refused:
            read_lora(served.adapter)
