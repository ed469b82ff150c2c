"""llama.cpp makes the same tokens and the same probabilities of the base's GGUF file."""

from __future__ import annotations

import json

import gguf
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from llamacpp import (
    LlamaCpp,
    byte_tokenizer,
    distance,
    kind_of,
    next_token_of,
    save_with_tokenizer,
)
from tlora.errors import ConfigError
from tlora.exporters import ggufbase
from tlora.exporters.ggufbase import write_base
from tlora.exporters.gguftokens import _GPT4

TEXT = "ab a 1234567 \t  aab\r\n\n\n  I'S  it's!!!\n12ab 'S  日本 é½²  a\n a  "


def split_by(pattern):
    """Split as the tokenizers of GPT-4 and its kin do."""
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])


PATTERNS = {
    "gpt-2": byte_tokenizer(),
    "smollm": byte_tokenizer(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    ),
    "qwen2": byte_tokenizer(split_by(_GPT4 % "")),
    "dbrx": byte_tokenizer(split_by(_GPT4 % "{1,3}")),
    "llama-bpe": byte_tokenizer(split_by(_GPT4 % "{1,3}"), ignore_merges=True),
}


def scored_tokenizer(first):
    """Return one like Llama 2's, with bytes as fallback and `<s>` before every text."""
    specials = ["<unk>", "<s>", "</s>"]
    letters = [*"▁abcdeitsI!'\n1234567"]
    merges = [("a", "b"), ("▁", "a"), ("i", "t"), ("1", "2"), ("12", "3"), ("▁", "▁"), ("▁▁", "a")]
    merges += [("▁", "▁a")]  # all ways to make a token are listed, as scores allow all of them
    known = [*specials, *(f"<0x{each:02X}>" for each in range(256)), *letters]
    known += dict.fromkeys("".join(merge) for merge in merges)
    vocabulary = {token: index for index, token in enumerate(known)}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(model)
    steps = [normalizers.Prepend("▁")] if first else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(fallback)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(specials)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def saved(folder, tokenizer, family="llama", **fields):
    """Save a base with a tokenizer; return the model."""
    model = kind_of(family, **fields).build()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


def written(folder, dtype=torch.float32):
    """Write its GGUF file; return the path."""
    path = folder / "base.gguf"
    write_base(path, folder, transformers.AutoConfig.from_pretrained(folder), dtype)
    return path


def assert_same_tokens(folder, tokenizer):
    saved(folder, tokenizer)
    server = LlamaCpp(written(folder))
    ids = tokenizer(TEXT).input_ids
    assert torch.equal(server.next_token(TEXT), server.next_token(ids))
    assert not torch.equal(server.next_token(TEXT), server.next_token(ids[:-1]))


@pytest.mark.parametrize("name", PATTERNS)
def test_text_becomes_the_same_tokens(name, tmp_path):
    assert_same_tokens(tmp_path, PATTERNS[name])
    reader = gguf.GGUFReader(tmp_path / "base.gguf")
    assert reader.fields["tokenizer.ggml.pre"].contents() == name


def test_the_text_of_that_test_tells_the_patterns_apart():
    ids = {name: tuple(tokenizer(TEXT).input_ids) for name, tokenizer in PATTERNS.items()}
    assert len({*ids.values()}) >= 4


@pytest.mark.parametrize("first", [True, False])
def test_text_becomes_the_same_tokens_by_scores(first, tmp_path):
    assert_same_tokens(tmp_path, scored_tokenizer(first))


def lower_case(tokenizer):
    """Return the tokenizer with a step that llama.cpp does not take."""
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "what"),
    [
        (byte_tokenizer(split_by(r"\d+|\D+")), r"BPE tokenizer that splits text by \\d"),
        (byte_tokenizer(pre_tokenizers.ByteLevel(True)), "splits text by ByteLevel"),
        (lower_case(byte_tokenizer()), "splits text by Lowercase"),
        (lower_case(scored_tokenizer(False)), "a step Lowercase"),
        (
            byte_tokenizer(byte_fallback=True),
            "it falls back to bytes but has no byte tokens",
        ),
    ],
)
def test_an_unknown_tokenizer_is_refused(tokenizer, what, tmp_path):
    saved(tmp_path, tokenizer)
    with pytest.raises(ConfigError, match=rf"{what}.* convert_hf_to_gguf\.py"):
        written(tmp_path)
    assert not (tmp_path / "base.gguf").exists()


def test_more_tokens_than_rows_are_refused(tmp_path):
    saved(tmp_path, byte_tokenizer(), vocab_size=200)
    with pytest.raises(ConfigError, match="more tokens than the 200 rows"):
        written(tmp_path)


def test_the_chat_template_is_there(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    saved(tmp_path, tokenizer)
    fields = gguf.GGUFReader(written(tmp_path)).fields
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2


LLAMA_3 = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA_3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": LLAMA_3},
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4, "head_dim": 8},
    ],
)
def test_probabilities_are_those_of_transformers(fields, tmp_path):
    model = saved(tmp_path, byte_tokenizer(), **fields)
    assert distance(LlamaCpp(written(tmp_path)).next_token(), next_token_of(model)) < 1e-5


def test_float16_rounds_matrices_alone(tmp_path):
    model = saved(tmp_path, byte_tokenizer())
    kinds = {
        (len(each.shape), each.tensor_type.name)
        for each in gguf.GGUFReader(written(tmp_path, torch.float16)).tensors
    }
    assert kinds == {(1, "F32"), (2, "F16")}
    server = LlamaCpp(tmp_path / "base.gguf")
    assert distance(server.next_token(), next_token_of(model)) < 0.02


def test_values_beyond_float16_are_refused(tmp_path):
    saved(tmp_path, byte_tokenizer())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"beyond float16 \(blk\.0\.ffn_up\.weight\)"):
        written(tmp_path, torch.float16)
    assert not (tmp_path / "base.gguf").exists()


def test_shards_are_read(tmp_path):
    model = saved(tmp_path, byte_tokenizer())
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert distance(LlamaCpp(written(tmp_path)).next_token(), next_token_of(model)) < 1e-5


def test_a_tied_head_that_alone_is_stored_is_the_embedding(tmp_path):
    model = saved(tmp_path, byte_tokenizer(), tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    assert distance(LlamaCpp(written(tmp_path)).next_token(), next_token_of(model)) < 1e-5


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "a quantized base"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "type yarn"),
    ],
)
def test_other_bases_are_refused(change, what, tmp_path):
    saved(tmp_path, byte_tokenizer())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConfigError, match=rf"{what} is not supported; .* convert_hf_to_gguf\.py"):
        written(tmp_path)


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("gemma2", {"hidden_activation": "silu"}, "hidden_activation"),
        ("gemma2", {"query_pre_attn_scalar": 77}, "query_pre_attn_scalar"),
        ("gemma3", {"head_dim": 32, "query_pre_attn_scalar": 16}, "query_pre_attn_scalar"),
        ("gemma3", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("smollm3", {"no_rope_layers": [0, 1]}, "no_rope_layers"),
        ("gpt2", {"activation_function": "relu"}, "activation_function"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ],
)
def test_constants_that_llama_cpp_does_not_read_are_refused(family, change, named, tmp_path):
    save_with_tokenizer(kind_of(family), tmp_path)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConfigError, match=rf"a base with `{named}: .*, where llama\.cpp uses"):
        write_base(
            tmp_path / "base.gguf",
            tmp_path / "base",
            transformers.AutoConfig.from_pretrained(tmp_path / "base"),
        )
    assert not (tmp_path / "base.gguf").exists()


def test_an_ignored_scale_would_make_llama_cpp_wrong(tmp_path, monkeypatch):
    saved = save_with_tokenizer(kind_of("gemma2"), tmp_path)
    config = transformers.AutoConfig.from_pretrained(saved.base)
    config.query_pre_attn_scalar = 1
    config.save_pretrained(saved.base)
    monkeypatch.setattr(ggufbase, "_refuse_other_constants", lambda *_: None)
    write_base(tmp_path / "base.gguf", saved.base, config, torch.float32)
    with torch.no_grad(), (model := saved.load()).disable_adapter():
        right = next_token_of(model)
    assert distance(LlamaCpp(tmp_path / "base.gguf").next_token(), right) > 0.01


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer.json", {"model": {"type": "BPE"}}),
        ("tokenizer.json", {"added_tokens": [{"id": "0"}]}),
        ("config.json", {"rope_parameters": {"rope_type": "default"}}),
        ("config.json", {"num_attention_heads": 7}),
    ],
)
def test_a_base_whose_files_are_damaged_is_a_sentence(name, change, tmp_path):
    saved(tmp_path, byte_tokenizer())
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    if name == "config.json":
        config.update(change)
    else:
        fields = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(fields | change))
    with pytest.raises(ConfigError, match="cannot be loaded: "):
        write_base(tmp_path / "base.gguf", tmp_path, config)
    assert not (tmp_path / "base.gguf").exists()


def test_a_size_that_gguf_cannot_hold_is_a_sentence(tmp_path):
    saved(tmp_path, byte_tokenizer())
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.head_dim = -4
    with pytest.raises(ConfigError, match="has a size below 0 or beyond 32 bits"):
        write_base(tmp_path / "base.gguf", tmp_path, config)
    assert not (tmp_path / "base.gguf").exists()
