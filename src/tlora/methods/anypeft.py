"""Any PEFT method by its type: `peft:vera`, with the fields of PEFT's own configuration.

The options record is built from PEFT's dataclass only when such a method is named, because that
imports PEFT and torch.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from tlora.adapter.peft_types import KNOWN, PeftType
from tlora.checks import Pattern, default_of, plain
from tlora.errors import ConfigError, did_you_mean, first_line
from tlora.methods.base import Batches, Prepared, Traits
from tlora.methods.learningrates import LORA_RATES, LearningRates
from tlora.methods.options import MethodOptions

if TYPE_CHECKING:
    import torch

_SET_HERE = (
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "fan_in_fan_out", "runtime_config"),
)
"""PEFT fields that are not options: the model, the task or the layer decides them."""
_NEEDED = ("num_virtual_tokens", "adapter_len", "adapter_layers", "token_indices")
"""Fields without a sensible default, whatever PEFT sets."""
_KEEP_THE_BASE = (True, False, "gaussian", "orthogonal", "mica")
"""Values of LoRA's `init_lora_weights` that leave the base weights unchanged."""


@dataclass(kw_only=True)
class PeftOptions(MethodOptions):
    """The fields of a configuration of PEFT, under their own names."""

    config_class: ClassVar[Any]

    def relations(self) -> Iterator[str]:
        """Yield missing fields, and PEFT's objections to the values."""
        yield from super().relations()
        missing = [name for name in _NEEDED if getattr(self, name, 0) in (None, [])]
        yield from (f"`{name}` is missing; give it." for name in missing)
        start = getattr(self, "init_lora_weights", True)
        if start not in _KEEP_THE_BASE:
            yield (
                f"`init_lora_weights` is {start!r}, which reads data or changes the base "
                "weights; give --method the name of that initialization (`tlora list "
                "methods`)."
            )
        if not missing:
            try:
                self.config()
            except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
                yield f"PEFT refuses these options: {first_line(error)}"

    def config(self) -> Any:
        """Return PEFT's configuration."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        given["task_type"] = self.task_type or "CAUSAL_LM"  # while the task is unknown
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.config_class(**given)


class PeftMethod:
    """Wraps a model with one of PEFT's adapter types, unchanged."""

    options: ClassVar[type]
    traits: ClassVar[Traits]

    def prepare(
        self, model: torch.nn.Module, options: Any, batches: Batches, plan: Any = None
    ) -> Prepared:
        """Wrap ``model`` by PEFT, which draws from torch's global generator.

        If modules are named, exactly the modules that `tlora` would adapt are adapted; if
        `target_modules` is None, PEFT chooses.

        Raises:
            ConfigError: PEFT adapts none of the modules.
        """
        from tlora.adapter.stock import targets_of, wrap, wrap_exactly

        config = options.config()
        if getattr(options, "target_modules", None) is None or not _adapts_layers(config):
            adapted = wrap(model, config)
        else:
            adapted = wrap_exactly(model, targets_of(model, options), config)
        if not any(parameter.requires_grad for parameter in adapted.parameters()):
            raise ConfigError(
                f"PEFT's {type(config).__name__} adapts no module of {type(model).__name__}, so "
                "nothing would train; name Linear modules by `target_modules`, or choose another "
                "method.",
                where="adapter",
            )
        tuner: Any = adapted.base_model
        if "forward" in vars(tuner):  # bound, so that it does not bypass TRL's own forward pass
            tuner.forward = lambda *args, **inputs: tuner.model.forward(*args, **inputs)  # noqa: PLW0108
        return Prepared(model=adapted)


def _adapts_layers(config: Any) -> bool:
    """Return whether a type adapts linear maps, as far as known."""
    kind = config.peft_type.value.lower()
    return kind == "ia3" or kind not in KNOWN or KNOWN[kind].targets is not None


@functools.cache
def method_of(kind: str) -> type[PeftMethod]:
    """Return the method for PEFT's type ``kind``.

    Raises:
        ConfigError: the installed PEFT has no such type (with a suggestion), or it cannot be
            trained here.
    """
    from peft import mapping

    registered = {each.value.lower(): each for each in mapping.PEFT_TYPE_TO_CONFIG_MAPPING}
    if kind not in registered:
        hint = did_you_mean(kind, registered) or f" It has {', '.join(sorted(registered))}."
        raise ConfigError(f"PEFT has no type {kind!r}.{hint}", where="method")
    config_class = mapping.PEFT_TYPE_TO_CONFIG_MAPPING[registered[kind]]
    name = config_class.__name__.removesuffix("Config")
    known = KNOWN.get(kind, PeftType(title=f"PEFT's {name}", year=2026))
    if known.refused:
        raise ConfigError(f"`peft:{kind}` is refused: {known.refused}.", where="method")
    prefix = mapping.PEFT_TYPE_TO_PREFIX_MAPPING[registered[kind]]
    learns_prompts = hasattr(config_class, "num_virtual_tokens")
    traits = Traits(
        title=known.title,
        arxiv=known.arxiv,
        year=known.year,
        formula=f"PEFT's {name}",
        trains=(known.trains or ("prompt_encoder" if learns_prompts else prefix.rstrip("_")),),
        parameters="PEFT's",
        start=known.start,
        saved=f"PEFT's {name}",
        merges=known.unmerged is None,
        learning_rates=_rates(known.rate),
    )
    doc = f"PEFT's {name}: {known.title}."
    members = {"options": _options(config_class, known), "traits": traits, "__doc__": doc}
    return type(f"Peft{name}", (PeftMethod,), members)


def _rates(rate: float | None) -> LearningRates:
    """Return the learning rates of a type, given its rate for models of 3 billion parameters."""
    if rate is None:
        return dataclasses.replace(LORA_RATES, source=f"LoRA's, untried: {LORA_RATES.source}")
    return LearningRates(
        tiny=max(rate, LORA_RATES.tiny),
        small=max(rate, LORA_RATES.small),
        large=rate,
        huge=min(rate / 2, 1e-4),
        source="PEFT's comparison of methods on Llama-3.2-3B (huggingface/peft): "
        f"{rate:g}. Below a billion LoRA's, if it is larger; from 20 billion on "
        "at most LoRA's.",
    )


def _options(config_class: Any, known: PeftType) -> type[PeftOptions]:
    """Return an options record with the fields, types, defaults and help of a configuration."""
    kinds = _hints(config_class)
    made = []
    for each in dataclasses.fields(config_class):
        if each.name in _SET_HERE or each.name.startswith("megatron"):
            continue
        default = plain(default_of(each))
        default = known.targets if each.name == "target_modules" else default
        kind = kinds.get(each.name, Any)
        kind = kind if default is not None else typing.Optional[kind]  # noqa: UP045
        text = each.metadata.get("help") or _described(config_class, each.name)
        text = "".join(text) if isinstance(text, tuple) else text
        made.append((each.name, kind, _with_default(default, " ".join(text.split()))))
    name = config_class.__name__.replace("Config", "Options")
    record: Any = dataclasses.make_dataclass(name, made, bases=(PeftOptions,), kw_only=True)
    record.__doc__ = f"PEFT's {config_class.__name__}."
    record.config_class = config_class
    return record


def _hints(config_class: Any) -> dict[str, Any]:
    """Return the types of a configuration's fields; a field without a known type takes any value.

    Names of modules are checked like ours.
    """
    try:
        found = typing.get_type_hints(config_class)
    except (NameError, TypeError):
        return {}
    for name in ("target_modules", "exclude_modules"):
        if name in found:
            found[name] = Pattern | list[str] | None
    return found


def _with_default(default: Any, text: str) -> Any:
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def _described(config_class: Any, name: str) -> str:
    """Return the docstring of a configuration's field."""
    text = str(config_class.__doc__)
    found = re.search(rf"^ *{name} \([^\n]*\):\s*\n?(.*?)(?=^ *\w+ \(|\Z)", text, re.M | re.S)
    return found[1] if found else f"See `peft.{config_class.__name__}`."
