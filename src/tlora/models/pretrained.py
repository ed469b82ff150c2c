"""A checkpoint on disk or on the Hub: its configuration, its tokenizer, its model.

`quantization` quantizes the model while loading, by bitsandbytes: nf4 with quantized scales (4
bits; Dettmers et al., arXiv 2305.14314) or int8 (arXiv 2208.07339). Training needs no other QLoRA
preparation: PEFT freezes the base, and TRL makes the inputs require a gradient if it recomputes
activations, and casts the adapter to bfloat16. `peft.prepare_model_for_kbit_training` would also
copy norms, embeddings and head to float32; load with `dtype` "float32" to get that.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora import extras
from tlora.errors import ArtifactError, ConfigError, TLoraError, first_line
from tlora.files import read_json, similar_folder
from tlora.integrity import has_digest
from tlora.models.missing import drawn_weights
from tlora.sealed import check_beside

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_TOKENIZER = re.compile(r"^(tokenizer|vocab|spiece|sentencepiece)\.|\.(model|tiktoken)$")
"""Names of files that hold a vocabulary."""
_MOST_LAYERS = 10_000


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

        with readable(self.name, "config"):
            config = transformers.AutoConfig.from_pretrained(
                self.name, trust_remote_code=self.trust_remote_code
            )
            check_layers(config)
            return config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer.

        Raises:
            ConfigError: there is none that transformers can read.
        """
        import transformers

        with readable(self.name, "tokenizer"):
            return transformers.AutoTokenizer.from_pretrained(
                self.name, trust_remote_code=self.trust_remote_code
            )

    def model(
        self,
        auto_class: str,
        device: torch.device,
        *,
        parallelize: bool = False,
        shards: Sequence[str] = (),
        head: Mapping[str, Any] | None = None,
    ) -> tuple[Any, list[str]]:
        """Load the model with all its weights, except those of a new head.

        A warning names layers in the files that the model does not have.

        Args:
            auto_class: the class with the right head, as "module:name".
            device: where to put it; quantized weights are created there.
            parallelize: split it over all devices (accelerate's `device_map="auto"`) instead.
            shards: names of layers: FSDP2 shards the model over the processes and gathers these
                layers one at a time.
            head: fields of the model's configuration that describe a new head. The files may then
                lack the head and poolers, or have a head of other sizes; these are initialized at
                random.

        Returns:
            The model, and the names of the randomly initialized head parameters.

        Raises:
            ConfigError: there is no such model, its files are damaged or lack weights other than a
                new head's, it has no such head, or it cannot be quantized as requested.
        """
        check_weights(self.name)
        options = self._quantized(device) | dict(head or {})
        if parallelize:
            options["device_map"] = "auto"
        if shards:
            options["distributed_config"] = _sharding(shards)
        with readable(self.name, "model"):
            model, found = self.class_for(auto_class).from_pretrained(
                self.name,
                dtype=self.dtype,
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused by name
                **options,
            )
        _name_parts(model)
        drawn = drawn_weights(self.name, model, found, new_head=bool(head))
        # Quantized weights, and models split over devices or processes, are already placed.
        placed = getattr(model, "is_quantized", False) or getattr(model, "hf_device_map", None)
        return model if placed or shards else model.to(device), drawn

    def class_for(self, auto_class: str, config: Any = None) -> Any:
        """Return the class that loads this checkpoint; reads ``config`` if it is not given.

        If transformers has no causal model of a multimodal architecture, this is the class for
        images and text, which also accepts text alone.
        """
        import transformers

        found = load_class(auto_class)
        if found is not transformers.AutoModelForCausalLM:
            return found
        kind, other = type(config or self.config()), transformers.AutoModelForImageTextToText
        return other if kind not in found._model_mapping and kind in other._model_mapping else found

    def _quantized(self, device: torch.device) -> dict[str, Any]:
        """Return the keyword arguments of `from_pretrained` that quantize the model."""
        if self.quantization == "none":
            return {}
        extras.require("quantized", where="quantization")
        import transformers

        found = self.config()
        if getattr(found, "quantization_config", None):
            raise ConfigError(
                f"{self.name!r} is already quantized; remove `quantization`.",
                where="quantization",
            )
        dtype = self.dtype if self.dtype != "auto" else dtype_of(found)
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


def _sharding(layers: Sequence[str]) -> Any:
    """Return the arguments that make transformers shard a model by FSDP2 while loading."""
    import torch
    from transformers.distributed import DistributedConfig

    # Its rules use a star for the layer number.
    rules = {re.sub(r"\.\d+(?=\.|$)", ".*", name): "free_full_weight" for name in layers}
    return DistributedConfig(fsdp_size=torch.distributed.get_world_size(), fsdp_plan=rules)


def _name_parts(model: Any) -> None:
    """Name a model's body and number of experts in the way that TRL reads them.

    transformers 5.23 misnames the body of Llama4ForCausalLM, and Llama 4 and gpt-oss use another
    name for the number of experts.
    """
    if not hasattr(model, model.base_model_prefix) and hasattr(model, "model"):
        model.base_model_prefix = "model"
    text = model.config.get_text_config()
    if hasattr(text, "num_local_experts") and not hasattr(text, "num_experts"):
        text.num_experts = text.num_local_experts


def dtype_of(config: Any) -> Any:
    """Return the precision in a model's configuration; in a multimodal one, the text config's."""
    own = getattr(config, "dtype", None)
    return own or getattr(config.get_text_config(), "dtype", None) or "float32"


def check_layers(config: Any) -> None:
    """Check that a model's configuration has a number of layers that can be built.

    Raises:
        ValueError: it has more than any model.
    """
    for name, value in config.get_text_config().to_dict().items():
        if "layer" in name and isinstance(value, int) and value > _MOST_LAYERS:
            raise ValueError(f"`{name}` is {value}, more than the {_MOST_LAYERS} that are built")


def positions_of(config: Any) -> int | None:
    """Return the maximum number of tokens in a model's configuration; None if it has none."""
    text = config.get_text_config()
    said = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions")]
    return min((n for n in said if isinstance(n, int) and n > 0), default=None)


def set_token_ids(config: Any, names: Iterable[str], token: int | None) -> None:
    """Set the token ids ``names`` that a model's configuration, or its text config, lacks."""
    for part in (config, config.get_text_config()):
        for name in names:
            if getattr(part, name, None) is None:
                setattr(part, name, token)


def load_class(target: str) -> Any:
    """Import the class called ``target``, "module:name"."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


@contextlib.contextmanager
def readable(name: str, part: str) -> Iterator[None]:
    """Raise one clear sentence for any error of transformers over files that it cannot read.

    The files may be anything in a folder or on the Hub, and can fail in any way. Running out of
    memory is not their fault.

    Args:
        name: a folder, or a name on the Hub.
        part: the part being read: "config", "tokenizer", "model".

    Raises:
        ConfigError: there is no such model, it cannot be reached, or its files cannot be read.
        ArtifactError: a file of a folder that tlora wrote was edited or is damaged.
    """
    import torch

    if part != "tokenizer" or not Path(name).is_dir():  # a tokenizer's folder needs no config
        check_model_folder(name)
    if not Path(name).exists():
        check_hub(name, "config.json")
    check_beside(Path(name))
    try:
        yield
    except (TLoraError, MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        # A panic in the library tokenizers is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        files = (file.name for file in Path(name).glob("*"))
        if part == "tokenizer" and Path(name).is_dir() and not any(map(_TOKENIZER.search, files)):
            raise ConfigError(
                f"{name!r} has no tokenizer.json or other vocabulary; copy the tokenizer's files"
                " into it.",
                where="model",
            ) from error
        what = repr(name) if part == "model" else f"the {part} of {name!r}"
        cause = first_line(error).rstrip(".")
        if isinstance(error, pickle.UnpicklingError):  # torch's own words advise to run its code
            cause = "its weights are damaged, or a pickle of more than tensors"
        raise ConfigError(
            f"{what} cannot be loaded: {cause}; give another folder or name, or download it again.",
            where="model",
        ) from error


def check_model_folder(model: str | None) -> None:
    """Refuse a name that looks like a folder but is not a model's; names on the Hub pass.

    Raises:
        ConfigError: the folder does not exist, has no config.json that holds fields, or is a file.
    """
    path = Path(str(model))
    if path.is_file():
        raise ConfigError(f"{path} is a file; give the folder of a model.", "model")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(f"{path} has no config.json; give the folder of a model.", "model")
    if path.is_dir():
        try:
            fields = read_json(path / "config.json")
        except ArtifactError as error:
            raise ConfigError(f"{model!r} cannot be loaded: {error}", "model") from error
        if not isinstance(fields, dict):
            raise ConfigError(
                f"{model!r} cannot be loaded: config.json holds no fields; get it again.",
                "model",
            )
    if not path.exists() and (path.is_absolute() or str(model).startswith(".")):
        raise ConfigError(
            f"there is no folder {str(model)!r}; check --model.{similar_folder(path)}", "model"
        )


def check_weights(model: str) -> None:
    """Check the weights in a model's folder against the digests that a run has added.

    Raises:
        ConfigError: a file does not match, or the index names a file outside the folder.
    """
    for index in Path(model).glob("*.index.json"):
        fields = read_json(index)
        found = fields.get("weight_map") if isinstance(fields, dict) else None
        if not isinstance(found, dict):
            raise ConfigError(
                f"{model!r} cannot be loaded: {index.name} names no files; download it again.",
                "model",
            )
        names = {str(name) for name in found.values()}
        if outside := sorted(name for name in names if Path(name).name != name):
            raise ConfigError(
                f"{model!r} cannot be loaded: {index.name} names {outside[0]!r}, which is not a"
                " file in the folder; download it again.",
                "model",
            )
    for file in sorted(Path(model).glob("*.safetensors")):
        try:
            has_digest(file)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{model!r} cannot be loaded: {file.name}: {error}; save or copy it again.", "model"
            ) from error


@functools.cache
def check_hub(name: str, *files: str, kind: str = "model") -> None:
    """Ask the Hub once for a file of ``name``: its own client retries six times, for 40 s.

    Nothing is asked offline, or if one of ``files`` is cached or known to be missing. The reader
    checks whether the first of them exists.

    Args:
        name: name of the repository.
        files: its files, with the one to ask for first.
        kind: kind of repository, "model" or "dataset".

    Raises:
        ConfigError: the Hub cannot be reached, has no such name, or denies this user access.
    """
    import huggingface_hub as hub

    try:
        if any(hub.try_to_load_from_cache(name, it, repo_type=kind) is not None for it in files):
            return
        hub.get_hf_file_metadata(hub.hf_hub_url(name, files[0], repo_type=kind))
    except hub.errors.GatedRepoError:
        fault = f"access to {name!r} on the Hub is restricted; accept its terms and log in."
    except hub.errors.RepositoryNotFoundError:
        fault = f"there is no folder {name!r}, and no {kind} of this name on the Hub."
    except hub.errors.OfflineModeIsEnabled:
        cached = hub.file_download.repo_folder_name(repo_id=name, repo_type=kind)
        if Path(hub.constants.HF_HUB_CACHE, cached).is_dir() or kind == "dataset":
            return  # `datasets` has its own cache
        fault = f"there is no folder {name!r}, and no model of this name in the Hub's cache; check"
        fault += " the path, or unset HF_HUB_OFFLINE to download it."
    except hub.errors.HFValidationError:
        fault = f"{name!r} is neither a folder nor a name on the Hub; give a folder or OWNER/NAME."
    except (hub.errors.EntryNotFoundError, ValueError):
        return
    except Exception as error:  # the client's HTTP library depends on its version
        fault = f"there is no folder {name!r}, and the Hub cannot be reached ({first_line(error)})."
    else:
        return
    raise ConfigError(fault, where="model")
