"""EVA: LoRA whose A spans the directions in which the inputs vary most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from tlora.checks import Rule, at_least
from tlora.methods.base import Batches, Prepared, Traits
from tlora.methods.learningrates import LORA_RATES
from tlora.methods.lora import Lora, peft_fields
from tlora.methods.options import LoraOptions

if TYPE_CHECKING:
    import torch


_COSINE = Rule("a number above 0, up to 1", lambda value: 0 < value <= 1)


@dataclass(kw_only=True)
class EvaOptions(LoraOptions):
    """LoRA's options, and PEFT's options of EVA."""

    rho: Annotated[float, at_least(1)] = 2.0
    """Allocate ranks by explained variance, up to rho r per module; 1: every module gets r."""
    tau: Annotated[float, _COSINE] = 0.99
    """A direction has settled when its cosine from batch to batch exceeds this value."""
    use_label_mask: bool = False
    """Count only tokens with a label, as PEFT does; false: every real token, as in other methods'
    calibration."""
    whiten: bool = False
    """Divide each direction by the square root of its singular value."""
    adjust_scaling_factors: bool = True
    """Keep lora_alpha / rank the same for every module, whatever its rank."""


class Eva(Lora):
    """y = W x + s_i B A x: A = the r_i leading principal directions of the inputs; B is zero.

    The N r ranks go to the directions of all modules that explain the most variance. A and B train.
    PEFT's incremental PCA repeats the calibration batches until every direction has settled;
    `tlora.calibration` identifies real tokens and samples. Modules that read one row per sample (a
    pooler) start as in LoRA. A resumed run reads A from its folder.

    Source: Paischer et al., arXiv 2410.07170, section 3.
    """

    options: ClassVar[type] = EvaOptions
    traits: ClassVar[Traits] = Traits(
        title="Parameter Efficient Fine-tuning via Explained Variance Adaptation",
        arxiv="2410.07170",
        year=2024,
        formula="W x + (alpha / r) B A x, A the leading principal directions of x",
        trains=("lora_A", "lora_B"),
        parameters="r_i (m + d)",
        start="identical",
        saved="LoRA of rank r_i",
        learning_rates=LORA_RATES,
        reads="inputs",
    )

    def prepare(
        self, model: torch.nn.Module, options: Any, batches: Batches, plan: Any = None
    ) -> Prepared:
        """Compute A, unless ``plan`` holds it, and wrap ``model``."""
        from peft import EvaConfig, LoraConfig

        from tlora.adapter.principal_inputs import attach_eva, principal_inputs
        from tlora.adapter.stock import refuse_stored, targets_of

        eva = EvaConfig(**peft_fields(options, EvaConfig))
        fields = peft_fields(options, LoraConfig) | {"init_lora_weights": "eva", "eva_config": eva}
        targets = targets_of(model, options)
        refuse_stored(targets, hqq="PEFT's EVA does not see what these layers read")
        if plan is None:
            plan = principal_inputs(model, targets, LoraConfig(**fields), batches)
        return Prepared(model=attach_eva(model, targets, LoraConfig(**fields), plan), plan=plan)
