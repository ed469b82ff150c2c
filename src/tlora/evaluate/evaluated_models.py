"""Resolve command-line arguments to checked models and adapters.

Only configurations are loaded here, so that a wrong argument fails at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from tlora.errors import ConfigError
from tlora.evaluate.evalconfig import EvalConfig
from tlora.files import no_adapter, read_json
from tlora.models.pretrained import Pretrained, check_hub, check_model_folder
from tlora.sealed import adapter_fields
from tlora.training.runfolder import RunFolder

Kind = Literal["base", "adapter", "merged", "laplace"]
Head = Literal["causal", "seq2seq", "labeled"]

_ADAPTER = "adapter_config.json"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_LABELED = "ForSequenceClassification"
_HEADS: dict[str, Head] = {
    "SEQ_CLS": "labeled",
    "SEQ_2_SEQ_LM": "seq2seq",
    "CAUSAL_LM": "causal",
}
"""Heads by PEFT's task type."""
_END = 1 << 20  # bytes hashed at each end of a file


@dataclass(frozen=True)
class EvaluatedModel:
    """One model of an evaluation."""

    name: str
    """Name in tables and folders."""
    kind: Kind
    model: str
    """Folder or Hub name of the base, or of the model itself."""
    adapter: str | None
    """Folder or Hub name of the adapter, if it has one."""
    head: Head
    """Type of head: continues a text, answers it, or labels it."""
    tokenizer: str | None = None
    """Folder or Hub name of the adapter, if it adds tokens to its base."""

    @property
    def path(self) -> str:
        """Return the path that identifies the model to the user."""
        return self.adapter or self.model

    def identity(self) -> dict[str, str | None]:
        """Return digests of the model's files, None for those on the Hub."""
        return {
            "model": _digest(self.model),
            "adapter": _digest(self.adapter) if self.adapter else None,
        }


def resolve(config: EvalConfig) -> list[EvaluatedModel]:
    """Return the models of an evaluation, in the order of its table.

    Raises:
        ConfigError: a folder is missing or contains no model, a base is missing, two models
            share a name, or they have different heads.
    """
    return _together([each for each in _each(config, _loaded_head) if each], config)


def sketch(config: EvalConfig) -> list[EvaluatedModel] | None:
    """Return the models described by their JSON files, without slow imports.

    A model that only reads texts or only writes them counts as "causal". None if some model is on
    Any model without a labeling head counts as "causal". Returns None if some model is on the Hub;
    checks that need all models are then skipped.

    Raises:
        ConfigError: as `resolve`.
    """
    found = _each(config, _head_on_disk)
    models = [each for each in found if each]
    return _together(models, config) if len(models) == len(found) else None


FindHead = Callable[[str, EvalConfig], Head | None]
"""Returns the head of a model by name, None if that needs the Hub; raises if the model is
missing."""


def _each(config: EvalConfig, find_head: FindHead) -> list[EvaluatedModel | None]:
    faults: list[str] = []
    found: list[EvaluatedModel | None] = []
    for entry in config.entries():
        try:
            found.append(_evaluated_model(entry, config, find_head))
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(faults, where="models")
    return found


def _together(found: list[EvaluatedModel], config: EvalConfig) -> list[EvaluatedModel]:
    """Add merged models, bases and names, and check that all fit together."""
    faults: list[str] = []
    models = _named(_all_kinds(found, config))
    labeling = [each.name for each in models if each.head == "labeled"]
    if 0 < len(labeling) < len(models):
        faults.append(
            f"{', '.join(labeling)}: classifiers cannot be evaluated together with generative"
            " models; use separate commands (the base of a classifier has no trained head, so"
            " remove --with_base)."
        )
    if config.laplace and not any(each.kind == "laplace" for each in models):
        faults.append("`laplace` needs an adapter, but none is given; remove it.")
    counts = Counter(evaluated.name for evaluated in models)
    for name in (name for name, count in counts.items() if count > 1):
        paths = ", ".join(evaluated.path for evaluated in models if evaluated.name == name)
        faults.append(f"{paths} would all have the name {name!r}; name them: NAME=PATH.")
    if faults:
        raise ConfigError(faults, where="models")
    return models


def _evaluated_model(entry: str, config: EvalConfig, find_head: FindHead) -> EvaluatedModel | None:
    name, equals, path = entry.partition("=")
    if not equals or Path(entry).exists():
        name, path = "", entry
    if name and not re.fullmatch(r"[\w.+-]+", name):
        raise ConfigError(f"{name!r} is not a valid name; use letters, digits, `.`, `-` and `_`.")
    places = _places(path)
    if places is None and find_head is _head_on_disk:
        return None
    model, adapter = places or (("", path) if _hub_adapter(path) else (path, None))
    fields = {} if adapter is None else _adapter_fields(adapter)
    base = model or config.model or fields.get("base_model_name_or_path")
    if not (base and isinstance(base, str)):
        raise ConfigError(f"{path} does not name its base model; give --model.")
    try:
        found = find_head(base, config)
    except (OSError, ValueError) as error:
        what, flag = ("", "") if base == path else (f", the base of {path}", " with --model")
        raise ConfigError(
            f"cannot read a model at {base!r}{what}; give a folder or a name on the Hub{flag}"
            f" ({str(error).removeprefix('model: ').rstrip('.')})."
        ) from error
    head = _HEADS.get(str(fields.get("task_type")), found)
    kind: Kind = "base" if adapter is None else "adapter"
    own = adapter if fields.get("trainable_token_indices") else None
    return EvaluatedModel(name, kind, base, adapter, head, own) if head else None


def _places(path: str) -> tuple[str, str | None] | None:
    """Return the (model, None) or ("", adapter) at ``path``; None if it is on the Hub."""
    folder = Path(path)
    if folder.is_dir():
        run = RunFolder(folder)
        if run.exists and not (folder / _ADAPTER).is_file():
            if not run.adapter.is_dir():
                raise ConfigError(
                    f"{path} is an unfinished run without an adapter; finish it with tlora"
                    f" {run.verb} --output_dir {path} --resume."
                )
            folder = run.adapter
        if (folder / _ADAPTER).is_file():
            return "", str(folder)
        if (folder / "config.json").is_file():
            return str(folder), None
        raise ConfigError(
            f"{path} contains no model (config.json), adapter ({_ADAPTER}) or `tlora train` run"
            " (run.json); give another folder."
        )
    if folder.exists():
        raise ConfigError(f"{path} is a file; give the folder of a model or an adapter.")
    if not _HUB_NAME.fullmatch(path):
        raise ConfigError(no_adapter(path, "model, run or adapter"))
    return None


def _hub_adapter(name: str) -> str | None:
    from transformers.utils.peft_utils import find_adapter_config_file

    check_hub(name, _ADAPTER, "config.json")
    try:
        return find_adapter_config_file(name)
    except (OSError, ValueError):
        return None


def _adapter_fields(adapter: str) -> dict[str, Any]:
    file = Path(adapter) / _ADAPTER
    return adapter_fields(file if file.is_file() else str(_hub_adapter(adapter)))


def _loaded_head(model: str, config: EvalConfig) -> Head | None:
    """Return the head of a model from its configuration, as transformers reads it.

    Raises:
        ConfigError: transformers cannot read the configuration.
    """
    checkpoint = Pretrained(name=model, trust_remote_code=config.trust_remote_code)
    return _head_of_model(checkpoint.config())


def _head_on_disk(model: str, config: EvalConfig) -> Head | None:
    """Return the head of a model from its config.json; None for a name on the Hub.

    Raises:
        OSError, ValueError: the folder or a readable config.json is missing.
    """
    check_model_folder(model)
    file = Path(model) / "config.json"
    if not file.is_file():
        return None
    fields = read_json(file)
    if not isinstance(fields, dict):
        raise ValueError(f"{file} has no fields")
    return "labeled" if labels_texts(SimpleNamespace(**fields)) else "causal"


def labels_texts(config: Any) -> bool:
    """Return whether this configuration describes a model with a labeling head."""
    return _LABELED in str(getattr(config, "architectures", None))


def _head_of_model(config: Any) -> Head:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as SEQ2SEQ,
    )

    if labels_texts(config):
        return "labeled"
    return "seq2seq" if config.model_type in SEQ2SEQ else "causal"


def _all_kinds(found: list[EvaluatedModel], config: EvalConfig) -> list[EvaluatedModel]:
    """Add merged and Laplace variants next to or instead of the adapters, and bases first."""
    models: list[EvaluatedModel] = []
    for each in found:
        if each.adapter is None or not config.merge:
            models.append(each)
        if each.adapter is not None and (config.merge or config.with_merged):
            models.append(dataclasses.replace(each, kind="merged"))
        if each.adapter is not None and config.laplace:
            models.append(dataclasses.replace(each, kind="laplace"))
    if config.with_base:
        there = {each.model for each in found if each.adapter is None}
        lacking = {each.model: each for each in found if each.model not in there}.values()
        models[:0] = [
            dataclasses.replace(each, name="", kind="base", adapter=None, tokenizer=None)
            for each in lacking
        ]
    return models


def _named(models: list[EvaluatedModel]) -> list[EvaluatedModel]:
    """Name the unnamed models: "base" for the base, the folder name for the others."""
    bases = {each.model for each in models if each.kind == "base"}
    used = {each.model for each in models if each.kind != "base"}
    lone = len(bases) == 1 and (bases <= used or len(models) == 1)

    def name(each: EvaluatedModel) -> str:
        own = "base" if each.kind == "base" and lone else _folder_name(each.path)
        return f"{each.name or own}{f'-{each.kind}' * (each.kind in ('merged', 'laplace'))}"

    return [dataclasses.replace(each, name=name(each)) for each in models]


def _folder_name(path: str) -> str:
    """Return the name for a folder; the adapter folder of a run has the run's name."""
    folder = Path(path)
    if folder.exists():
        folder = folder.resolve()
    if folder.name == "adapter" and RunFolder(folder.parent).exists:
        folder = folder.parent
    return re.sub(r"[^\w.+-]", "_", folder.name) or "model"


def _digest(path: str) -> str | None:
    """Hash the names, sizes and ends of a folder's files, which detects new weights."""
    if not Path(path).is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(Path(path).iterdir()):
        if file.suffix in (".safetensors", ".json", ".jinja", ".bin", ".model"):
            size = file.stat().st_size
            digest.update(f"{file.name} {size};".encode())
            with file.open("rb") as content:
                digest.update(content.read(_END))
                content.seek(max(0, size - _END))
                digest.update(content.read(_END))
    return digest.hexdigest()[:16]
