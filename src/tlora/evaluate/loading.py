"""Load the models to evaluate: plain, with an adapter, or with the adapter merged."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.errors import AdapterError, ConfigError, MisfitError, first_line
from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.evaluated_models import EvaluatedModel, Head
from tlora.models.pretrained import Pretrained
from tlora.models.tokens import make_rows
from tlora.sealed import adapter_fields

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@contextlib.contextmanager
def unheard(*names: str) -> Iterator[None]:
    """Silence the loggers of other libraries below errors."""
    logs = [logging.getLogger(name) for name in names]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


_CLASSES: dict[Head, str] = {
    "causal": "transformers:AutoModelForCausalLM",
    "seq2seq": "transformers:AutoModelForSeq2SeqLM",
    "labeled": "transformers:AutoModelForSequenceClassification",
}


def device_of(config: EvalConfig) -> torch.device:
    """Return the device: the user's choice, else the accelerator, else the CPU.

    Raises:
        ConfigError: there is no such device.
    """
    import torch

    if config.device is None:
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        device = torch.device(config.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"{config.device!r}: {first_line(error)}", where="device") from error
    return device


def check_backend(config: EvalConfig, models: list[EvaluatedModel]) -> None:
    """Check that the backend is installed and supports these models.

    Raises:
        ConfigError: it is not, or does not.
    """
    if config.backend == "hf":
        device_of(config)
        return
    faults = []
    if importlib.util.find_spec("vllm") is None:
        faults.append("'vllm' is not installed; run `pip install vllm`, or remove --backend.")
    for evaluated in models:
        if evaluated.kind == "adapter" and (why := _unserved(evaluated)):
            faults.append(f"vLLM cannot serve {evaluated.name}: {why}; add --merge.")
    if any(evaluated.head == "labeled" for evaluated in models):
        faults.append(
            "vLLM only generates text, but these models are classifiers; remove --backend."
        )
    if config.quantization != "none" or config.parallelize:
        faults.append("`quantization` and `parallelize` do not apply to vLLM; remove them.")
    if faults:
        raise ConfigError(faults, where="backend")


def _unserved(evaluated: EvaluatedModel) -> str | None:
    """Return the reason why vLLM cannot load an adapter, if any."""
    from tlora.adapter.saved import read_lora
    from tlora.adapter.savedconfig import CONFIG
    from tlora.exporters.readers import READERS, reading

    folder = Path(local_adapter(evaluated))
    kind = adapter_fields(folder / CONFIG).get("peft_type")
    if kind != "LORA":
        return f"its type is {kind}, not LoRA"
    vllm = next(reader for reader in READERS if reader.name == "vllm")
    return reading(vllm, read_lora(folder)).refused


def local_adapter(evaluated: EvaluatedModel) -> str:
    """Return the folder of an adapter, downloading it from the Hub if needed."""
    adapter = str(evaluated.adapter)
    if Path(adapter).is_dir():
        return adapter
    from huggingface_hub import snapshot_download

    return snapshot_download(adapter)


def dtype_of(config: EvalConfig) -> str:
    """Return the precision to compute in; on a CPU "auto" is float32."""
    if config.dtype == "auto" and device_of(config).type == "cpu":
        return "float32"  # as fast there, and replies do not depend on the batch
    return config.dtype


def load(evaluated: EvaluatedModel, config: EvalConfig, **head: Any) -> Any:
    """Load one model onto its device, in eval mode and without gradients.

    Args:
        evaluated: the model to load.
        config: device, precision and quantization.
        **head: model configuration fields that define a head missing from the base.

    Raises:
        ConfigError: the base cannot be loaded as asked.
        AdapterError: the adapter does not fit the base, or cannot be merged.
    """
    device = device_of(config)
    model, drawn = _load_base(evaluated, config, device, head)
    if config.tokenizer or evaluated.tokenizer:
        make_rows(model, load_tokenizer(evaluated, config))
    if evaluated.adapter is not None:
        model = _adapted(model, evaluated)
    if drawn:
        _check_head(model, drawn, evaluated)
    if evaluated.kind == "merged":
        model = _merged(model, evaluated)
    return model.eval().requires_grad_(False)


def load_tokenizer(evaluated: EvaluatedModel, config: EvalConfig) -> PreTrainedTokenizerBase:
    """Load the base model's tokenizer, so that all adapters see the same tokens.

    An adapter that adds tokens uses its own tokenizer.

    Raises:
        ConfigError: there is none.
    """
    place = config.tokenizer or evaluated.tokenizer or evaluated.model
    try:
        return Pretrained(name=place, trust_remote_code=config.trust_remote_code).tokenizer()
    except ConfigError as error:
        raise ConfigError(
            f"cannot load a tokenizer from {place!r} ({error.faults[0].rstrip('.')}); give"
            " --tokenizer.",
            where="tokenizer",
        ) from error


def release() -> None:
    """Free the device memory of models that are no longer referenced."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _load_base(
    evaluated: EvaluatedModel, config: EvalConfig, device: torch.device, head: dict[str, Any]
) -> tuple[Any, list[str]]:
    """Return the model, and the head parameters missing from its files."""
    checkpoint = Pretrained(
        name=evaluated.model,
        dtype=dtype_of(config),
        quantization=config.quantization,
        trust_remote_code=config.trust_remote_code,
    )
    # transformers would report a head as missing that the adapter provides.
    with unheard(*(["transformers"] if head else [])):
        return checkpoint.model(
            _CLASSES[evaluated.head], device, parallelize=config.parallelize, head=head
        )


def _check_head(model: Any, drawn: list[str], evaluated: EvaluatedModel) -> None:
    """Raise if a parameter is random because neither base nor adapter has it."""
    brought = [name for name, _ in model.named_parameters() if ".modules_to_save." in name]
    modules = dict.fromkeys(name.rpartition(".")[0] for name in drawn)
    lost = [each for each in modules if not any(f".{each}.modules" in name for name in brought)]
    if lost:
        raise AdapterError(
            f"{evaluated.path} has no trained {', '.join(lost)}; give an adapter trained on the"
            " task, with its head."
        )


def _adapted(model: Any, evaluated: EvaluatedModel) -> Any:
    from tlora import load_adapter

    path = str(evaluated.adapter)
    advice = "give its own base with --model, and its --tokenizer if it adds tokens."
    try:
        return load_adapter(model, path, freeze=False)
    except MisfitError as error:
        raise MisfitError(path, evaluated.model, error.misfit, advice) from error


def _merged(model: Any, evaluated: EvaluatedModel) -> Any:
    if not hasattr(model, "merge_and_unload"):
        raise AdapterError(f"{evaluated.adapter}: this kind of adapter cannot be merged.")
    try:
        return model.merge_and_unload()
    except (NotImplementedError, ValueError, AttributeError) as error:
        raise AdapterError(
            f"{evaluated.adapter} cannot be merged into {evaluated.model}: {first_line(error)}"
        ) from error
