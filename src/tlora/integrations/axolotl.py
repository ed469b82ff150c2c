"""A plugin for Axolotl: `adapter: tlora` calibrates on the training rows and attaches the plan.

    plugins: [tlora.integrations.axolotl.TLoraPlugin]
    adapter: tlora
    tlora: {r: 16, lora_alpha: 16, samples: 32}

Written against the plugins of Axolotl 0.19: the `load_adapter` of a plugin replaces Axolotl's own
once `get_adapter_capabilities` has named the adapter. Axolotl then trains, saves and resumes a PEFT
model like any other, whose A stays frozen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from pydantic import BaseModel

from tlora.adapter.attach import get_tlora_model
from tlora.adapter.load import load_adapter
from tlora.calibration.group import process_group
from tlora.config import TLoraConfig
from tlora.errors import ConfigError

NAME = "tlora"
_SAMPLES, _BATCH_SIZE = 32, 4
_IGNORED = -100


class TLoraArgs(BaseModel):
    """The `tlora:` section: fields of `TLoraConfig`, `samples` (32) and `batch_size` (4).

    Missing fields have the values of `TLoraConfig.recommended()`.
    """

    tlora: dict[str, Any] | None = None


class TLoraPlugin(BasePlugin):
    """Calibrates on Axolotl's tokenized training rows when it loads the adapter."""

    def get_input_args(self) -> str:
        """Return the name of the class with which Axolotl parses the section."""
        return "tlora.integrations.axolotl.TLoraArgs"

    def get_adapter_capabilities(self) -> list[Any]:
        """Return the adapter provided by this plugin."""
        return [AdapterCapabilities(name=NAME, lora_like=True)]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, Any] | None:
        """Attach the adapter from `lora_model_dir`, or a new one; None for other adapter types.

        Raises:
            ConfigError: the section is invalid, or the training only accepts a configuration.
            TLoraError: as `tlora.get_tlora_model` and `tlora.load_adapter`.
        """
        if cfg.adapter != NAME:
            return None
        if config_only:
            raise ConfigError(
                "preference training creates its adapter from a configuration, which has no"
                " calibrated A; train with `adapter: lora`, or on rows without `rl`.",
                where="tlora",
            )
        config, samples, batch_size = _read(cfg.tlora)
        if cfg.lora_model_dir:
            trains = not inference
            adapted = load_adapter(
                model, cfg.lora_model_dir, is_trainable=trains, freeze=config.freeze_a
            )
        else:
            rows = _training_rows(cfg)
            group = process_group()
            own = range(group.process, min(samples, len(rows)), group.size)
            shuffled = rows.shuffle(seed=cfg.seed or 0).select(own)
            adapted = get_tlora_model(model, config, batches(list(shuffled), batch_size))
        return adapted, adapted.peft_config["default"]


def _read(section: Mapping[str, Any] | None) -> tuple[TLoraConfig, int, int]:
    fields = {"task_type": "CAUSAL_LM"} | dict(section or {})
    samples, size = fields.pop("samples", _SAMPLES), fields.pop("batch_size", _BATCH_SIZE)
    for name, value in (("samples", samples), ("batch_size", size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"`{name}` is {value!r}; give a whole number above 0.", where="tlora")
    return TLoraConfig.recommended(**fields), samples, size


def _training_rows(cfg: Any) -> Any:
    """Return Axolotl's tokenized training rows, which it has already prepared."""
    from axolotl.common.datasets import load_datasets

    return load_datasets(cfg=cfg).train_dataset


def batches(rows: Sequence[Mapping[str, Any]], size: int) -> Iterator[dict[str, Any]]:
    """Yield padded batches of tokenized rows.

    Args:
        rows: rows with `input_ids`, and `labels` if not all tokens count.
        size: rows per batch.
    """
    import torch

    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        width = max(len(row["input_ids"]) for row in part)
        ids = torch.zeros(len(part), width, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, _IGNORED)
        for number, row in enumerate(part):
            count = len(row["input_ids"])
            ids[number, :count] = torch.as_tensor(row["input_ids"])
            mask[number, :count] = 1
            labels[number, :count] = torch.as_tensor(row.get("labels", row["input_ids"]))
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}
