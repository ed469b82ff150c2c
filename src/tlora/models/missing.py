"""Weights of a loaded model that are not in its files: only a new head's may be missing."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from tlora.errors import ConfigError, listed

logger = logging.getLogger(__name__)


def drawn_weights(
    name: str, model: Any, found: Mapping[str, Any], *, new_head: bool = False
) -> list[str]:
    """Return the parameters of a new head, which are initialized at random.

    Tied weights, and those that the model's class allows to be missing, are not in transformers'
    list of missing ones. Buffers are computed. A warning names layers in the files that the model
    does not have.

    Args:
        name: the model's folder, or its name on the Hub.
        model: loaded by `from_pretrained` with `ignore_mismatched_sizes`.
        found: the loading info of `from_pretrained`.
        new_head: whether a head and poolers may be missing, or have other sizes.

    Raises:
        ConfigError: other parameters are missing, or have other sizes.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    sizes = {key: (stored, needed) for key, stored, needed in found["mismatched_keys"]}
    drawn = sorted(parameters.intersection(found["missing_keys"]) | sizes.keys())
    lost = [key for key in drawn if not (new_head and _is_of_head(model, key))]
    unlike = [key for key in lost if key in sizes]
    missing = [key for key in lost if key not in sizes]
    faults = []
    if missing:
        faults.append(
            f"{name!r} lacks {len(missing)} of {len(parameters)} weights of"
            f" {type(model).__name__}, which would start at random: {listed(missing)}; give a"
            " complete model of this kind, or correct its config.json."
        )
    if unlike:
        stored, needed = map(_by, sizes[unlike[0]])
        faults.append(
            f"{name!r} cannot be loaded: {unlike[0]} is {stored} in its files and {needed} by its"
            f" config ({len(unlike)} differ); correct the config, or get the model again."
        )
    if faults:
        raise ConfigError(faults, where="model")
    _warn_of_further_layers(name, model, found["unexpected_keys"])
    return drawn


def _by(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes)) or "a number"


def _is_of_head(model: Any, name: str) -> bool:
    """Whether a parameter belongs to a classifier's head: outside the body, or its pooler."""
    parts = name.split(".")
    body = model.base_model_prefix
    if not hasattr(model, body):
        return not {"classifier", "pooler", "score"}.isdisjoint(parts)
    return parts[0] != body or "pooler" in parts


def _warn_of_further_layers(name: str, model: Any, unused: Iterable[str]) -> None:
    """Name the files' unused weights that differ from used ones only by their layer.

    Others do not matter: the head of another task, another modality's tower.
    """
    used = {_layer_pattern(key) for key, _ in model.named_parameters()}
    prefix = f"{model.base_model_prefix}."
    extra = [k for k in unused if {_layer_pattern(k), _layer_pattern(prefix + k)} & used]
    if extra:
        logger.warning(
            "%s has %d weights of layers that its config.json lacks, and they are not used: %s.",
            name,
            len(extra),
            listed(sorted(extra)),
        )


def _layer_pattern(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)
