"""A checkpoint on disk or on the Hub: its configuration, its tokenizer, its model.

`quantization` quantizes the model while it loads, by bitsandbytes: nf4 with quantized scales (4
bits; Dettmers et al., arXiv 2305.14314) or int8 (arXiv 2208.07339). Training needs nothing else of
QLoRA's preparation: PEFT freezes the base, and TRL makes the inputs require a gradient where it
recomputes activations and casts the adapter to bfloat16. `peft.prepare_model_for_kbit_training`
would also copy norms, embeddings and head to float32; load with `dtype` "float32" to get that.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from tlora import extras
from tlora.errors import ConfigError, first_line
from tlora.integrity import has_digest
from tlora.models.missing import drawn_weights

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A checkpoint, and the precision to load it in.

    Attributes:
        name: a folder, or a name on the Hub.
        dtype: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16".
        quantization: "none", "nf4" (4-bit weights that compute in `dtype`) or "int8".
        trust_remote_code: run Python code that comes with the model.
    """

    name: str
    dtype: str = "auto"
    quantization: str = "none"
    trust_remote_code: bool = False

    def config(self) -> PreTrainedConfig:
        """Read the model's configuration.

        Raises:
            ConfigError: there is none that transformers can read.
        """
        import transformers

        check_model_folder(self.name)
        try:
            return transformers.AutoConfig.from_pretrained(
                self.name, trust_remote_code=self.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the config of {self.name!r} cannot be loaded: {first_line(error)}", "model"
            ) from error

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer.

        Raises:
            OSError | ValueError: transformers finds none; its first line says why.
        """
        import transformers

        return transformers.AutoTokenizer.from_pretrained(
            self.name, trust_remote_code=self.trust_remote_code
        )

    def model(
        self,
        auto_class: str,
        device: torch.device,
        *,
        parallelize: bool = False,
        head: Mapping[str, Any] | None = None,
    ) -> tuple[Any, list[str]]:
        """Load the model, whole but for a new head.

        Layers that the files have and the model does not are named in a warning.

        Args:
            auto_class: the class that gives it the right head, as "module:name".
            device: where to put it; quantized weights are made there.
            parallelize: split it over all devices (accelerate's `device_map="auto"`) instead.
            head: fields of the model's configuration that describe a new head. The files may then
                lack the head and poolers, or have a head of other sizes; these are drawn at random.

        Returns:
            The model, and the names of the parameters of the head that were drawn.

        Raises:
            ConfigError: there is no such model, its weights do not match the digest that they
                carry, it lacks others than those of a new head, it has no such head, or it cannot
                be quantized as asked.
        """
        check_weights(self.name)
        options = self._quantized(device) | dict(head or {})
        if parallelize:
            options["device_map"] = "auto"
        try:
            model, found = load_class(auto_class).from_pretrained(
                self.name,
                dtype=self.dtype,
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused by name
                **options,
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise ConfigError(
                f"{self.name!r} cannot be loaded: {first_line(error)}", "model"
            ) from error
        drawn = drawn_weights(self.name, model, found, new_head=bool(head))
        # Quantized weights, and models split over devices, are already where they belong.
        placed = getattr(model, "is_quantized", False) or getattr(model, "hf_device_map", None)
        return model if placed else model.to(device), drawn

    def _quantized(self, device: torch.device) -> dict[str, Any]:
        """Return the keyword arguments of `from_pretrained` that quantize the model."""
        if self.quantization == "none":
            return {}
        extras.require("quantized", where="quantization")
        import transformers

        found = self.config()
        if getattr(found, "quantization_config", None):
            raise ConfigError(
                f"{self.name!r} is already quantized; leave `quantization` out.",
                where="quantization",
            )
        dtype = self.dtype if self.dtype != "auto" else found.dtype or "float32"
        fields: dict[str, dict[str, Any]] = {
            "nf4": {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
                "bnb_4bit_compute_dtype": dtype,
            },
            "int8": {"load_in_8bit": True},
        }
        chosen = transformers.BitsAndBytesConfig(**fields[self.quantization])
        return {"quantization_config": chosen, "device_map": {"": str(device)}}


def load_class(target: str) -> Any:
    """Import the class called ``target``, "module:name"."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def check_model_folder(model: str | None) -> None:
    """Refuse a name that looks like a folder but is not a model's; a name on the Hub passes.

    Raises:
        ConfigError: the folder does not exist, or has no config.json.
    """
    path = Path(str(model))
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(f"{path} has no config.json; give the folder of a model.", "model")
    if not path.exists() and (path.is_absolute() or str(model).startswith(".")):
        raise ConfigError(f"there is no folder {str(model)!r}; give a model's.", "model")


def check_weights(model: str) -> None:
    """Check the weights in a model's folder against the digests that those of a run carry.

    Raises:
        ConfigError: a file does not match.
    """
    for file in sorted(Path(model).glob("*.safetensors")):
        try:
            has_digest(file)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{model!r} cannot be loaded: {file.name}: {error}; save or copy it again.", "model"
            ) from error
