"""Adapters of varied ranks and scales on tiny models, saved as PEFT saves them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

import support
from families import FAMILIES, Kind
from tlora.adapter.saved import WEIGHTS, SavedLora
from tlora.adapter.savedconfig import CONFIG

COHERE = Kind("CohereConfig", "CohereForCausalLM", FAMILIES["llama"].fields)
GRANITE = Kind("GraniteConfig", "GraniteForCausalLM", FAMILIES["llama"].fields)
SERVED = {
    name: FAMILIES[name]
    for name in (
        *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"),
        *("phi3", "gpt2", "smollm3", "olmo2"),
    )
} | {"granite": GRANITE, "cohere": COHERE}
"""The twelve families that exports are tested on."""


@dataclass(frozen=True)
class Saved:
    """A base and an adapter of it, each in a folder."""

    base: Path
    adapter: Path

    def load(self, adapter: Path | None = None) -> Any:
        """Return the base with an adapter, by PEFT alone."""
        base = transformers.AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        with contextlib.suppress(AttributeError):
            base.generation_config.cache_implementation = None
        return peft.PeftModel.from_pretrained(base, str(adapter or self.adapter)).eval()

    def logits(self, adapter: Path | None = None) -> torch.Tensor:
        """Return the logits of a fixed prompt under an adapter."""
        with torch.no_grad():
            return self.load(adapter)(input_ids=PROMPT).logits


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite an adapter's weights, without a digest."""
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def change_config(folder: Path, **fields: Any) -> None:
    """Edit an adapter's adapter_config.json."""
    known = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(known | fields))


def dense(lora: SavedLora) -> dict[str, torch.Tensor]:
    """Return s B A of each module of a saved adapter, by PEFT's rule written anew."""
    fields, found = lora.fields, {}
    for name, (a, b) in lora.keys.items():
        key = f"^{name.replace('.', chr(92) + '.')}"
        rank = fields["rank_pattern"].get(key, fields["r"])
        alpha = fields["alpha_pattern"].get(key, fields["lora_alpha"])
        found[name] = lora.tensors[b].double() @ lora.tensors[a].double() * (alpha / rank)
    return found


PROMPT = torch.tensor([[1, 17, 42, 5, 99, 23, 8]])


def save(kind: Kind, folder: Path, targets: Any = "all-linear", **fields: Any) -> Saved:
    """Save a tiny model and an adapter of ranks 1 to 5 with scales of their own; one is missing."""
    model = kind.build()
    model.save_pretrained(folder / "base")
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D)
        and not name.endswith("lm_head")
    ]
    ranks = {f"^{name.replace('.', chr(92) + '.')}": 1 + i % 5 for i, name in enumerate(names[:-1])}
    alphas = {key: 0.5 + 0.7 * i for i, key in enumerate(ranks)}
    given: dict[str, Any] = {
        "r": 3,
        "lora_alpha": 4,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "exclude_modules": [names[-1]],
        "task_type": "CAUSAL_LM",
    }
    config = peft.LoraConfig(target_modules=targets, **given | fields)
    adapted = support.seeded(lambda: peft.get_peft_model(model, config))
    with torch.no_grad():
        for name, parameter in sorted(adapted.named_parameters()):
            if "lora_" in name:
                generator = torch.Generator().manual_seed(len(name))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
    adapted.save_pretrained(str(folder / "adapter"))
    return Saved(folder / "base", folder / "adapter")
