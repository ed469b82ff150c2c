"""Write the tokenizer of a base into its GGUF file.

llama.cpp has two kinds of byte pair encoding: `gpt2` merges within words found by a named pattern;
`llama` merges the pair whose result has the highest score, with bytes as fallback.

Source: llama.cpp, `src/llama-vocab.cpp`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.errors import ConfigError
from tlora.exporters.gguffamilies import untested

if TYPE_CHECKING:
    from gguf import GGUFWriter, TokenType

_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (_GPT4 % "", "bytes"): "qwen2",
    (_GPT4 % "{1,3}", "bytes"): "dbrx",
    (_GPT4 % "{1,3}", "bytes", "whole words first"): "llama-bpe",
}
"""Ways to split text into words, with llama.cpp's names."""
_BYTE = re.compile("<0x[0-9A-F]{2}>")


def add_tokens(writer: GGUFWriter, folder: Path, rows: int) -> None:
    """Add a base's tokens, merges, special tokens and chat template.

    Args:
        writer: writer of the base's GGUF file.
        folder: the base, with a `tokenizer.json`.
        rows: rows of its embedding; rows without a token get placeholders.

    Raises:
        ConfigError: this kind of tokenizer is not tested.
    """
    if not (folder / "tokenizer.json").is_file():
        raise untested(f"{folder} without a tokenizer.json")
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    merges = [m.split(" ") if isinstance(m, str) else m for m in data["model"].get("merges", [])]
    tokens, types = _tokens(data, rows)
    if data["model"].get("byte_fallback", False):
        if "<0x0A>" not in data["model"]["vocab"]:
            raise ConfigError(
                "tlora cannot write this model's tokenizer to GGUF: it falls back to bytes but has"
                " no byte tokens; write base.gguf with llama.cpp's convert_hf_to_gguf.py, which"
                " works with the adapter.",
                "base_gguf",
            )
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(merges, tokens))
        writer.add_add_space_prefix(_has_prefix(data))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pattern(data))
        writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _add_specials(writer, folder)


def _tokens(data: dict[str, Any], rows: int) -> tuple[list[str], list[TokenType]]:
    """Return the tokens and their types.

    Raises:
        ConfigError: there are more tokens than rows.
    """
    from gguf import TokenType

    known = {index: text for text, index in data["model"]["vocab"].items()}
    added = {each["id"]: each for each in data["added_tokens"]}
    if max([*known, *added]) >= rows:
        raise untested(f"a tokenizer with more tokens than the {rows} rows of the embedding")
    tokens, types = [f"[PAD{index}]" for index in range(rows)], [TokenType.UNUSED] * rows
    for index, text in known.items():
        is_byte = data["model"].get("byte_fallback") and _BYTE.fullmatch(text)
        tokens[index], types[index] = text, TokenType.BYTE if is_byte else TokenType.NORMAL
    for index, each in added.items():
        tokens[index] = each["content"]
        types[index] = TokenType.CONTROL if each["special"] else TokenType.USER_DEFINED
    return tokens, types


def _add_specials(writer: GGUFWriter, folder: Path) -> None:
    """Add the special tokens, whether they surround a text, and the chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    around = tokenizer("").input_ids
    for kind in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(index)
    writer.add_add_bos_token(tokenizer.bos_token_id in around[:1])
    writer.add_add_eos_token(tokenizer.eos_token_id in around[1:])
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        writer.add_chat_template(template)


def _scores(merges: list[list[str]], tokens: list[str]) -> list[float]:
    """Return scores that rank pairs in their merge order."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _has_prefix(data: dict[str, Any]) -> bool:
    """Return whether the tokenizer puts a space before a text.

    Raises:
        ConfigError: the tokenizer does more than replace spaces.
    """
    steps = _steps(data, "normalizer") + _steps(data, "pre_tokenizer")
    for step in steps:
        is_spaces = step.get("pattern", {"String": " "}) == {"String": " "}
        if step["type"] not in ("Prepend", "Replace", "Metaspace", "Split") or not is_spaces:
            raise untested(f"a tokenizer with a step {step['type']}")
    return any(
        step["type"] == "Prepend" or step.get("prepend_scheme") in ("first", "always")
        for step in steps
    )


def _pattern(data: dict[str, Any]) -> str:
    """Return llama.cpp's name for a tokenizer's word splitting.

    Raises:
        ConfigError: it is untested.
    """
    steps = [step for step in _steps(data, "normalizer") if step["type"] != "NFC"]
    key = tuple(_step(step) for step in [*steps, *_steps(data, "pre_tokenizer")])
    if data["model"].get("ignore_merges"):
        key = (*key, "whole words first")
    if data["model"]["type"] != "BPE" or key not in _PATTERNS:
        kind = data["model"]["type"]
        raise untested(f"a {kind} tokenizer that splits text by {', '.join(key) or 'nothing'}")
    return _PATTERNS[key]


def _step(step: dict[str, Any]) -> str:
    if step["type"] == "Digits" and step["individual_digits"]:
        return "digits"
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return "words" if step["use_regex"] else "bytes"
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex"))
    return str(step["type"])


def _steps(data: dict[str, Any], part: str) -> list[dict[str, Any]]:
    """Return the steps of a tokenizer part, which is one step, a sequence or absent."""
    whole = data.get(part)
    if not whole:
        return []
    return list(whole.get("pretokenizers") or whole.get("normalizers") or [whole])
