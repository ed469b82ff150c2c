"""An adapter.gguf is compared with the adapter by llama.cpp's rule, and in llama.cpp itself."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llamacpp import kind_of, save_with_tokenizer
from tlora import cli
from tlora.adapter.saved import read_lora
from tlora.exporters import export, gguf
from tlora.exporters.exportconfig import ExportConfig
from tlora.verify import llamacpp

FAMILY = "llama"  # whose rows of q and k are reordered, with fewer heads for k


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An adapter on a tiny model with a tokenizer."""
    return save_with_tokenizer(kind_of(FAMILY), tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def folder(saved, tmp_path_factory):
    """Its GGUF file, and the base's."""
    made = tmp_path_factory.mktemp("out") / "gguf"
    fields = {"path": str(saved.adapter), "output_dir": str(made), "format": "gguf"}
    export.run(ExportConfig(**fields, base_gguf=True))
    return made


EXACT = "exact: the server applies the same update that was trained."


def run(tmp_path, *words):
    """Run `tlora verify`; return the exit code and the numbers."""
    numbers = tmp_path / "numbers.json"
    code = cli.main(["verify", *map(str, words), "--output", str(numbers)])
    return code, json.loads(numbers.read_text())


def test_an_export_is_exact_but_for_rounding(saved, folder, tmp_path):
    code, found = run(tmp_path, saved.adapter, folder, "--for", "llama.cpp")
    assert code == 0
    llama = found["readers"][0]
    assert llama["exact"]
    assert llama["error"] < 1e-6
    assert llama["title"] == "llama.cpp (GGUF)"


def test_only_readers_of_the_format_are_listed_and_any_other_is_refused(saved, folder, capsys):
    words = ["verify", str(saved.adapter), str(folder / "adapter.gguf"), "--for", "vllm"]
    assert cli.main(words) == 1
    shown = capsys.readouterr()
    assert [line.partition(" (")[0] for line in shown.out.splitlines()] == ["llama.cpp", EXACT]
    assert "vllm does not read this format" in shown.err


def test_rows_in_the_base_s_order_are_found(saved, tmp_path, monkeypatch):
    """The same file without the permutation of q and k."""
    monkeypatch.setattr(gguf, "reordered", lambda rows, *_: rows)
    file = tmp_path / "adapter.gguf"
    config = json.loads((saved.base / "config.json").read_text())
    gguf.write_adapter(file, read_lora(saved.adapter), config, "auto")
    code, found = run(tmp_path, saved.adapter, file)
    assert code == 1
    wrong = {name.rpartition(".")[2] for name in found["readers"][0]["modules"]}
    assert wrong == {"q_proj", "k_proj"}


def test_alpha_is_divided_by_each_own_rank(saved, folder, tmp_path):
    """llama.cpp's converter writes alpha, and B without its scale."""
    import gguf as library

    lora = read_lora(saved.adapter)
    file = tmp_path / "adapter.gguf"
    config = json.loads((saved.base / "config.json").read_text())
    gguf.write_adapter(file, lora, config, "auto")
    opened = library.GGUFReader(file, "r+")
    opened.get_field("adapter.lora.alpha").parts[-1][0] = 4.0
    opened.data.flush()
    del opened
    code, found = run(tmp_path, saved.adapter, file)
    errors = found["readers"][0]["modules"]
    assert code == 1
    for name, error in errors.items():
        assert error == pytest.approx(abs(4 / lora.rank(name) - 1), abs=1e-6)
    assert set(errors) == {name for name in lora.keys if lora.rank(name) != 4}


def test_a_damaged_file_is_named(saved, folder, tmp_path, capsys):
    file = tmp_path / "adapter.gguf"
    file.write_bytes((folder / "adapter.gguf").read_bytes()[:200])
    assert cli.main(["verify", str(saved.adapter), str(file)]) == 1
    assert "truncated or damaged" in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "said"), [(0, "A of blk.0"), (3, "and B is")])
def test_an_a_that_does_not_fit_its_b_is_refused(saved, folder, tmp_path, capsys, rank, said):
    import gguf as library

    writer = library.GGUFWriter(tmp_path / "adapter.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    for side, shape in (("a", (rank, 16)), ("b", (16, 2))):
        writer.add_tensor(f"blk.0.attn_q.weight.lora_{side}", np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert cli.main(["verify", str(saved.adapter), str(tmp_path / "adapter.gguf")]) == 1
    assert said in capsys.readouterr().err


def test_llama_cpp_replies_as_the_adapter_within_the_noise_of_its_base(saved, folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a1 b2\nthe second\n")
    code, found = run(tmp_path, saved.adapter, folder, "--prompts", prompts)
    assert code == 0
    effect, noise, off = found["replies"].values()
    assert 0 < noise["norm"] < 0.05 * effect["norm"]
    assert off["norm"] < max(3 * noise["norm"], 0.05 * effect["norm"])


def test_without_llama_cpp_the_files_are_checked_and_that_is_said(
    saved, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(llamacpp, "is_installed", lambda: False)
    assert run(tmp_path, saved.adapter, folder, "--model", saved.base)[0] == 0
    assert "llama.cpp: skipped; it needs `pip install xllamacpp`" in capsys.readouterr().out
