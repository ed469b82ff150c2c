"""The language model inside a multimodal one, which "all-linear" adapts.

A vision or audio tower, and the projector behind it, never process text. Adapters there would learn
nothing from text rows, and calibration would see no input.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tlora.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

# With these task types, or none, a model such as CLIP is more than its text model.
_OPEN = (None, "FEATURE_EXTRACTION")


def language_model(model: Any) -> tuple[str, Any] | None:
    """Return the name and module of a multimodal model's language model; None for other models.

    It is the outermost module whose config is the text config.
    """
    config = getattr(model, "config", None)
    text = getattr(config, "text_config", None)
    if text is None or not hasattr(config, "get_text_config"):
        return None
    for name, module in model.named_modules():
        if name and getattr(module, "config", None) is text:
            return name, module
    return None


def is_text_only(model: Any, config: Any) -> bool:
    """Whether ``config`` (PEFT's or ours) selects all linear maps that text reaches."""
    wanted = config.target_modules
    every = isinstance(wanted, str) and wanted.lower() == "all-linear"
    generates = getattr(model, "can_generate", lambda: False)
    return every and (config.task_type not in _OPEN or generates())


def text_names(model: nn.Module, config: Any, names: Iterable[str]) -> list[str]:
    """Return the ``names`` that a configuration adapts; "all-linear" selects the language model's.

    Args:
        model: the base model.
        config: a `TLoraConfig`, or PEFT's.
        names: full names of modules.
    """
    inner = language_model(model) if is_text_only(model, config) else None
    return [name for name in names if inner is None or name.startswith(f"{inner[0]}.")]


def check_reached(model: nn.Module, names: Sequence[str]) -> None:
    """Check that text rows reach some of the modules ``names``, given by full name.

    Raises:
        ConfigError: all of them lie outside a multimodal model's language model.
    """
    inner = language_model(model)
    if inner and names and not any(name.startswith(f"{inner[0]}.") for name in names):
        raise ConfigError(
            f"`target_modules` chooses {names[0]!r} and the like, but text rows only reach "
            f"{inner[0]}; choose modules of it, or remove `target_modules`.",
            where="adapter",
        )


def log_unadapted_towers(model: nn.Module, config: Any) -> None:
    """Log a line that names the towers of a multimodal model that are not adapted."""
    inner = language_model(model) if is_text_only(model, config) else None
    if inner is None:
        return
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    beside = model.get_submodule(inner[0].rpartition(".")[0]).named_children()
    places = [
        n
        for n, m in beside
        if m is not inner[1] and m is not head and next(m.parameters(), None) is not None
    ]
    if places:
        logger.warning(
            "%s is multimodal: the Linears of %s are adapted, %s not; name modules by "
            "`target_modules` to adapt others.",
            type(model).__name__,
            inner[0],
            " and ".join(sorted(places)) + (" is" if len(places) == 1 else " are"),
        )
