"""`merged`: replace W by W + s B A in a full model that needs no adapter.

Rewrites the base's files one tensor at a time, computing in float32 and rounding once. A base whose
weights cannot be read one by one is loaded instead (`tlora.exporters.loaded`).
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from tlora.adapter.head import HEAD_FILE
from tlora.adapter.saved import SavedLora
from tlora.errors import AdapterError, ConfigError, listed
from tlora.exporters import checkpoint, loaded
from tlora.exporters.base import Export, Source, copy_beside
from tlora.exporters.changes import Change, changes_of
from tlora.exporters.checkpoint import INDEX, Piece, Stored
from tlora.exporters.pieces import Rounding, piece
from tlora.exporters.ties import Ties
from tlora.files import read_json, write_json
from tlora.models.pretrained import Pretrained
from tlora.models.skeleton import names_in_model, skeleton
from tlora.training.runfolder import RunFolder

CONFIG = "config.json"
_SLACK = 2**26  # bytes for tokenizer and configuration
_TOKENS = "tokenizer_config.json"
_TOKENIZER = ("tokenizer", "chat_template", "special_tokens", "added_tokens", "vocab", "merges")
"""Prefixes of tokenizer files."""


@dataclass
class Plan:
    """Files to write."""

    files: dict[str, dict[str, Piece]]
    """Tensors by file and name."""
    fields: dict[str, Any]
    """Changed fields of config.json."""
    notes: list[str] = field(default_factory=list)
    rounding: Rounding = field(default_factory=Rounding)


class Merged:
    """The base model with the adapter in its weights."""

    needs: ClassVar[str | None] = None

    def write(self, source: Source, folder: Path) -> Export:
        """Write the folder; see `Exporter`."""
        lora = source.lora
        if not source.base:
            raise AdapterError(f"{lora.path} does not name its base model; give --model.")
        revision = lora.fields.get("revision") if source.base == lora.base else None
        root = checkpoint.base_folder(source.base, revision)
        base = Pretrained(name=str(root), trust_remote_code=source.config.trust_remote_code)
        quantized = bool(read_json(root / CONFIG).get("quantization_config"))
        if quantized and not source.config.dequantize:
            raise ConfigError(
                f"{source.base!r} is quantized and its weights cannot absorb an update; merge into"
                " the full-precision model with --model, or use --dequantize.",
                where="model",
            )
        model = skeleton(base, lora.fields.get("task_type"))
        head = _head(lora, model.config)
        why = "the base is quantized" if quantized else None
        if lora.fields.get("target_parameters"):
            why = why or "PEFT has to merge adapters of fused experts (`target_parameters`)"
        plan = why or _plan(source, root, model)
        if isinstance(plan, Plan):
            pieces = [each for file in plan.files.values() for each in file.values()]
            checkpoint.check_space(folder, sum(each.bytes for each in pieces) + _SLACK)
            single = (root / checkpoint.SINGLE).is_file()
            checkpoint.write_weights(folder, plan.files, None if single else root / INDEX)
        else:
            whole = loaded.Loaded(source, base, model, head, quantized)
            plan = Plan({}, {}, [f"Merged in memory: {plan}.", *whole.write(folder)])
        _copy(root, lora.path, folder)
        _configure(folder, plan.fields | head, source.config.dtype, model)
        return Export([*plan.notes, *plan.rounding.notes(), *_trained_on(lora, quantized)])


def _plan(source: Source, root: Path, model: Any) -> Plan | str:
    """Return the plan, or the reason why the files are not sufficient.

    Raises:
        AdapterError: the adapter cannot be merged, or does not fit.
        ConfigError: a file of the base is missing or damaged, or does not fit its configuration.
    """
    files = checkpoint.stored_tensors(root)
    if not files:
        return "the base has no safetensors files"
    lora = source.lora
    changes = changes_of(lora, model)
    stored = {key: tensor for tensors in files.values() for key, tensor in tensors.items()}
    names = names_in_model(model, stored)
    computed = {name for name, computes in names.values() if computes}
    in_model = {name: stored[key] for key, (name, computes) in names.items() if not computes}
    ties = Ties(model, in_model, changes)
    there = {*in_model, *ties.stored}
    hard = [n for n in changes if n in computed or (n not in there and not changes[n].replaces)]
    if computed and hard:
        return f"transformers computes {listed(hard)} from other tensors of the base"
    _refuse_scaled(lora, model, ties)
    if not computed:
        _check_whole(root, model, in_model, {*changes, *ties.stored})
    plan = Plan({name: {} for name in files}, {})
    make = functools.partial(piece, dtype=source.config.dtype, rounding=plan.rounding)
    other_head = type(model).__name__ not in (model.config.architectures or [])
    known = model.state_dict()
    for file, tensors in files.items():
        for key, tensor in tensors.items():
            if names[key][0] in known or not other_head:
                change = ties.change(names[key][0])
                plan.files[file][key] = make(key, tensor, change, tensor.code)
    usual = Counter(each.code for each in stored.values()).most_common(1)[0][0]
    for name in sorted((changes.keys() | ties.split) - in_model.keys()):
        if not ties.follows(name):
            origin = ties.stored.get(name)
            file = origin.file.name if origin else [*files][-1]
            code = origin.code if origin else usual
            plan.files[file][name] = make(name, origin, ties.change(name), code)
    plan.files = {file: tensors for file, tensors in plan.files.items() if tensors}
    plan.fields |= _sizes(model, changes)
    if ties.split:
        plan.fields["tie_word_embeddings"] = False
        plan.notes.append(
            f"{listed(ties.apart)} had tied weights and now has its own; `tie_word_embeddings` is"
            " false."
        )
    return plan


def _refuse_scaled(lora: SavedLora, model: Any, ties: Ties) -> None:
    """Reject untying in an encoder-decoder, because T5 scales a tied head."""
    if ties.apart and model.config.is_encoder_decoder:
        raise AdapterError(
            f"{lora.path} changes {listed(ties.apart)}, which {type(model).__name__} ties and"
            " computes differently without the tie; use --format native."
        )


def _sizes(model: Any, changes: Mapping[str, Change]) -> dict[str, Any]:
    """Return the configuration fields with the row counts of an embedding or a head."""
    fields: dict[str, Any] = {}
    for name, change in changes.items():
        module = model.get_submodule(name.rpartition(".")[0])
        before = tuple(model.state_dict()[name].shape)
        rows = change.shape(before)[:1]
        if rows != before[:1] and isinstance(module, nn.Embedding):
            fields["vocab_size"] = rows[0]
        elif rows != before[:1] and change.replaced:
            fields["id2label"] = {number: f"LABEL_{number}" for number in range(rows[0])}
            fields["label2id"] = {label: number for number, label in fields["id2label"].items()}
    return fields


def _check_whole(
    root: Path, model: Any, in_model: Mapping[str, Stored], given: Collection[str]
) -> None:
    """Check that the files contain the model described by the configuration."""
    optional = [*(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())]
    lost = [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name not in in_model and name not in given
        if not any(re.search(pattern, name) for pattern in optional)
    ]
    if lost:
        raise ConfigError(
            f"{str(root)!r} and the adapter both lack {listed(lost)}; download the base model"
            " again, or give another with --model.",
            where="model",
        )
    for name, shape in ((name, tuple(each.shape)) for name, each in model.state_dict().items()):
        if name in in_model and name not in given and in_model[name].shape != shape:
            raise ConfigError(
                f"{str(root)!r}: {name} is {_by(in_model[name].shape)} in its files but"
                f" {_by(shape)} in its {CONFIG}; download the base model again.",
                where="model",
            )


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _head(lora: SavedLora, config: Any) -> dict[str, Any]:
    """Return the configuration fields that describe an adapter's classifier, or {}."""
    file = lora.path / HEAD_FILE
    if not file.is_file():
        return {}
    fields = dict(read_json(file))
    if config.get_text_config().pad_token_id is None and (lora.path / _TOKENS).is_file():
        # Decoders use it to find the last token of a text.
        fields["pad_token_id"] = Pretrained(name=str(lora.path)).tokenizer().pad_token_id
    return fields


def _copy(root: Path, adapter: Path, folder: Path) -> None:
    """Copy the files next to the base's weights; the export copies the adapter's own."""
    own = {file.name for file in adapter.iterdir()} - {CONFIG}
    left = {INDEX, *own}
    if _TOKENS in own:
        left |= {file.name for file in root.iterdir() if file.name.startswith(_TOKENIZER)}
    copy_beside(root, folder, left)


def _configure(folder: Path, fields: dict[str, Any], dtype: str, model: Any) -> None:
    """Update config.json with the fields in which the merged model differs from its base."""
    config = read_json(folder / CONFIG) | {"architectures": [type(model).__name__]}
    texts = [config, *(each for name in ("text_config",) if (each := config.get(name)))]
    for name in ("vocab_size", "tie_word_embeddings"):
        for each in texts if name in fields else ():
            if name in each or each is config:
                each[name] = fields[name]
    if dtype != "auto":
        for each in (config, *(part for part in config.values() if isinstance(part, dict))):
            for name in {"dtype", "torch_dtype"} & each.keys():
                each[name] = dtype
        if not {"dtype", "torch_dtype"} & config.keys():
            config["dtype"] = dtype
    write_json(folder / CONFIG, config | fields)


def _trained_on(lora: SavedLora, quantized: bool) -> Iterator[str]:
    """Yield a note if training used other weights than these."""
    run = RunFolder(lora.path.parent)
    if not quantized and run.exists and run.adapter.name == lora.path.name:
        kind = run.config().get("quantization", "none")
        if kind != "none":
            yield (
                f"The adapter was trained on weights quantized to {kind} but merged into the"
                " full-precision ones, so answers differ slightly from those in training."
            )
