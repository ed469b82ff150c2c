"""What is compared: each a function of the base model, the batches and the setting.

All get the same model, samples, rank and targets. "-one" reads the samples one at a time, as the
paper and its released code do; the others in the batches of the setting.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tlora import TLoraConfig, get_tlora_model

sys.path.append(str(Path(__file__).parents[2] / "examples"))

import tlora_in_one_file

Batches = list[dict[str, Tensor]]
PROJECTIONS = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
]


@dataclass(frozen=True)
class Setting:
    """Rank (and alpha), memory budget of the lean variants, samples a batch."""

    r: int
    memory_budget: str = "16MiB"
    batch_size: int = 4


Subject = Callable[[Any, Batches, Setting], Any]


def targets(model: Any) -> list[str]:
    """Return the full names of the projections."""
    return [n for n, _ in model.named_modules() if n.rsplit(".", 1)[-1] in PROJECTIONS]


def one_by_one(batches: Batches) -> Batches:
    """Return the samples as batches of one."""
    return [
        {key: value[i : i + 1] for key, value in batch.items()}
        for batch in batches
        for i in range(len(batch["input_ids"]))
    ]


# --- (a) the bare passes


def bare(model: Any, batches: Batches, _: Setting) -> Any:
    """`model(**batch).loss.backward()` on the model as loaded: every weight gets a gradient."""
    for batch in batches:
        model(**batch).loss.backward()
    return model


def bare_targets(model: Any, batches: Batches, setting: Setting) -> Any:
    """The same with gradients for the targeted weights alone."""
    model.requires_grad_(False)
    for name in targets(model):
        model.get_submodule(name).weight.requires_grad_(True)
    return bare(model, batches, setting)


def bare_activations(model: Any, batches: Batches, setting: Setting) -> Any:
    """The same through the activations alone: no weight has a gradient."""
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return bare(model, batches, setting)


# --- the library


def tlora(model: Any, batches: Batches, setting: Setting, **fields: Any) -> Any:
    """Calibrate, plan and attach."""
    config = TLoraConfig(
        r=setting.r, lora_alpha=setting.r, target_modules=PROJECTIONS, task_type="CAUSAL_LM"
    )
    return get_tlora_model(model, replace(config, **fields), batches, progress=False)


def tlora_blocks(model: Any, batches: Batches, setting: Setting) -> Any:
    """The same plan within `memory_budget`, one sample at a time."""
    budget = {"memory_budget": setting.memory_budget, "covariance": "exact"}
    return tlora(model, one_by_one(batches), setting, **budget)


def tlora_streamed(model: Any, batches: Batches, setting: Setting) -> Any:
    """No second moment at all, within `memory_budget`, one sample at a time."""
    budget = {"memory_budget": setting.memory_budget, "covariance": "streamed"}
    return tlora(model, one_by_one(batches), setting, **budget)


# --- (b)


def released(model: Any, batches: Batches, setting: Setting) -> Any:
    """The released rule, straightforwardly."""
    return tlora_in_one_file.initialize(model, one_by_one(batches), targets(model), setting.r)


# --- (c) PEFT's, by its own entry points


def _peft(model: Any, setting: Setting, init: Any, **fields: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=setting.r,
        lora_alpha=setting.r,
        target_modules=PROJECTIONS,
        init_lora_weights=init,
        task_type="CAUSAL_LM",
        **fields,
    )


def _attached(init: Any) -> Subject:
    def attach(model: Any, _: Batches, setting: Setting) -> Any:
        from peft import get_peft_model

        return get_peft_model(model, _peft(model, setting, init))

    return attach


def corda(model: Any, batches: Batches, setting: Setting) -> Any:
    """Forward passes of one sample each (PEFT's hook takes no more), then its SVDs."""
    from peft import get_peft_model
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    config = _peft(model, setting, "corda", corda_config=CordaConfig(corda_method="ipm"))

    @torch.no_grad()
    def run() -> None:
        for sample in one_by_one(batches):
            model(**sample)

    preprocess_corda(model, config, run_model=run)
    return get_peft_model(model, config)


def eva(model: Any, batches: Batches, setting: Setting) -> Any:
    """Incremental PCA over the batches again and again, until the directions have settled."""
    from peft import EvaConfig, get_peft_model, initialize_lora_eva_weights

    config = _peft(model, setting, "eva", eva_config=EvaConfig())
    adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(adapted, batches, show_progress_bar=False)
    return adapted


def lora_ga(model: Any, batches: Batches, setting: Setting) -> Any:
    """Forward and backward over the batches, then an SVD of every gradient."""
    from peft import get_peft_model
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    config = _peft(model, setting, "lora_ga", lora_ga_config=LoraGAConfig())

    def run() -> None:
        for batch in batches:
            model(**batch).loss.backward()

    preprocess_loraga(model, config, run)
    return get_peft_model(model, config)


def _one(subject: Subject) -> Subject:
    return lambda model, batches, setting: subject(model, one_by_one(batches), setting)


SUBJECTS: dict[str, Subject] = {
    "bare": bare,
    "bare-one": _one(bare),
    "bare-targets": bare_targets,
    "bare-activations": bare_activations,
    "tlora": tlora,
    "tlora-one": _one(tlora),
    "tlora-blocks": tlora_blocks,
    "tlora-streamed": tlora_streamed,
    "released": released,
    "corda": corda,
    "eva": eva,
    "lora-ga": lora_ga,
    "pissa": _attached("pissa"),
    "pissa-niter-4": _attached("pissa_niter_4"),
    "olora": _attached("olora"),
    "lora": _attached(True),
}

TITLES = {
    "bare": "forward + backward, all weights",
    "bare-one": "forward + backward, all weights, one sample at a time",
    "bare-targets": "forward + backward, targeted weights",
    "bare-activations": "forward + backward, activations alone",
    "tlora": "tlora",
    "tlora-one": "tlora, one sample at a time",
    "tlora-blocks": "tlora in blocks (memory budget)",
    "tlora-streamed": "tlora streamed (memory budget)",
    "released": "released rule, straightforward",
    "corda": "PEFT CorDA",
    "eva": "PEFT EVA",
    "lora-ga": "PEFT LoRA-GA",
    "pissa": "PEFT PiSSA",
    "pissa-niter-4": "PEFT PiSSA, niter 4",
    "olora": "PEFT OLoRA",
    "lora": "PEFT LoRA (random A)",
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings and bars of what is measured out of the report."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
