"""llama.cpp itself applies an exported adapter as PEFT does, on every family of the table."""

from __future__ import annotations

import dataclasses

import gguf
import peft
import pytest
import torch
import transformers

from llamacpp import LlamaCpp, distance, kind_of, next_token_of, save_with_tokenizer
from served import SERVED, save
from tlora import cli
from tlora.adapter.saved import read_lora
from tlora.errors import AdapterError, ConfigError
from tlora.exporters import ggufbase, gguffamilies
from tlora.exporters.gguf import write_adapter

REORDERED = [name for name, each in gguffamilies.FAMILIES.items() if each.reordered]


def config_of(saved):
    return transformers.AutoConfig.from_pretrained(saved.base)


def written(saved, folder, dtype="auto"):
    """Write base and adapter, the base without rounding; return their files."""
    config = config_of(saved)
    base, adapter = folder / "base.gguf", folder / "adapter.gguf"
    ggufbase.write_base(base, saved.base, config, torch.float32)
    write_adapter(adapter, read_lora(saved.adapter), config.to_dict(), dtype)
    return base, adapter


def errors(saved, base, adapter):
    """Return the errors of base and adapter in llama.cpp, and the adapter's effect."""
    model = saved.load()
    with model.disable_adapter():
        plain = next_token_of(model)
    adapted = next_token_of(model)
    noise = distance(LlamaCpp(base).next_token(), plain)
    return noise, distance(LlamaCpp(base, adapter).next_token(), adapted), distance(adapted, plain)


@pytest.mark.parametrize("family", SERVED)
def test_llama_cpp_applies_it_as_peft_does(family, tmp_path):
    saved = save_with_tokenizer(kind_of(family), tmp_path)
    noise, error, effect = errors(saved, *written(saved, tmp_path))
    assert noise < 2e-3  # of a GELU that llama.cpp looks up in float16; else 1e-5
    assert error <= 3 * max(noise, 1e-5)
    assert effect > 100 * error


def test_the_families_tested_are_those_of_the_table():
    kinds = {getattr(transformers, kind.config).model_type for kind in SERVED.values()}
    assert kinds == {*gguffamilies.FAMILIES}


@pytest.mark.parametrize("family", REORDERED)
def test_without_the_order_of_rows_llama_cpp_applies_it_wrong(family, tmp_path, monkeypatch):
    saved = save_with_tokenizer(kind_of(family), tmp_path)
    base, _ = written(saved, tmp_path)
    kept = dataclasses.replace(gguffamilies.FAMILIES[family], reordered=False)
    monkeypatch.setitem(gguffamilies.FAMILIES, family, kept)
    adapter = tmp_path / "wrong.gguf"
    write_adapter(adapter, read_lora(saved.adapter), config_of(saved).to_dict(), "auto")
    noise, error, effect = errors(saved, base, adapter)
    assert error > 100 * noise
    assert error > effect / 10


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_rounded_adapter_is_off_by_its_rounding(dtype, tmp_path):
    saved = save_with_tokenizer(kind_of("llama"), tmp_path)
    _, error, effect = errors(saved, *written(saved, tmp_path, dtype))
    assert error < 0.02 * effect


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_ranks_are_kept_and_alpha_is_zero(family, tmp_path):
    saved = save(SERVED[family], tmp_path)
    lora = read_lora(saved.adapter)
    write_adapter(tmp_path / "a.gguf", lora, config_of(saved).to_dict(), "float32")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == gguffamilies.FAMILIES[family].architecture
    assert fields["adapter.lora.alpha"] == 0
    assert len(reader.tensors) == 2 * len(lora.keys)
    stored = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    factors = lora.factors("model.layers.0.mlp.down_proj")
    a, b = (stored[f"blk.0.ffn_down.weight.lora_{side}"] for side in "ab")
    assert torch.equal(a, factors.a)
    torch.testing.assert_close(b, factors.b * factors.scale)
    assert len({len(each) for name, each in stored.items() if name.endswith("lora_a")}) > 1


def test_a_head_of_its_own_is_applied(tmp_path):
    kind = kind_of("llama", tie_word_embeddings=False)
    targets = ["lm_head", "q_proj"]
    saved = save_with_tokenizer(kind, tmp_path, targets=targets, exclude_modules=None)
    assert "lm_head" in read_lora(saved.adapter).keys
    noise, error, _ = errors(saved, *written(saved, tmp_path))
    assert error <= 3 * max(noise, 1e-5)


def test_a_tied_head_is_refused(tmp_path):
    kind = kind_of("llama", tie_word_embeddings=True)
    saved = save(kind, tmp_path, ["lm_head", "q_proj"], exclude_modules=None)
    with pytest.raises(AdapterError, match=r"matrices of lm_head, .* convert_hf_to_gguf\.py"):
        write_adapter(
            tmp_path / "a.gguf", read_lora(saved.adapter), config_of(saved).to_dict(), "auto"
        )


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"use_dora": True}, "DoRA's magnitudes"),
        ({"modules_to_save": ["norm"]}, "trained modules (norm)"),
        ({"bias": "all"}, "trained biases"),
        ({"targets": ["embed_tokens", "q_proj"]}, "adapters of embeddings"),
    ],
)
def test_what_llama_cpp_would_leave_out_in_silence_is_refused(fields, what, tmp_path, capsys):
    saved = save(SERVED["llama"], tmp_path, **fields)
    argv = ["export", str(saved.adapter), "--format", "gguf", "--output_dir", str(tmp_path / "o")]
    assert cli.main(argv) == 2
    assert what in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_another_family_is_refused_with_the_way_round():
    with pytest.raises(ConfigError, match=r"not falcon; .* uniform, .*convert_lora_to_gguf"):
        gguffamilies.family_of({"model_type": "falcon"})


def test_the_verb_writes_all_that_ollama_and_llama_cpp_need(tmp_path, capsys):
    saved = save_with_tokenizer(kind_of("llama"), tmp_path)
    out = tmp_path / "out"
    argv = ["export", str(saved.adapter), "--for", "ollama", "--base_gguf", "--output_dir"]
    assert cli.main([*argv, str(out)]) == 0
    assert (out / "Modelfile").read_text() == "FROM ./base.gguf\nADAPTER ./adapter.gguf\n"
    _, error, effect = errors(saved, out / "base.gguf", out / "adapter.gguf")
    assert error < 0.02 * effect  # the base is rounded to float16
    assert "ollama create" in capsys.readouterr().out


def test_without_the_base_it_says_where_to_put_it(tmp_path, capsys):
    saved = save(SERVED["llama"], tmp_path)
    argv = ["export", str(saved.adapter), "--for", "llama.cpp", "--output_dir"]
    assert cli.main([*argv, str(tmp_path / "out")]) == 0
    *_, command, needs = capsys.readouterr().out.splitlines()
    out = tmp_path / "out"
    assert command == f"serve with: llama-server -m {out}/base.gguf --lora {out}/adapter.gguf"
    assert needs == (
        f"You still need {out}/base.gguf: make it with llama.cpp's convert_hf_to_gguf.py, or export"
        " again with --base_gguf into a new folder."
    )
    assert "You still need out/base.gguf" in (out / "README.md").read_text(encoding="utf-8")


def test_the_base_is_named_or_asked_for(tmp_path):
    saved = save(SERVED["llama"], tmp_path)
    lora = peft.LoraConfig.from_pretrained(saved.adapter)
    lora.base_model_name_or_path = None
    lora.save_pretrained(saved.adapter)
    argv = ["export", str(saved.adapter), "--format", "gguf", "--output_dir", str(tmp_path / "o")]
    assert cli.main(argv) == 2
    assert cli.main([*argv, "--model", str(saved.base)]) == 0
