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
    """LoRA's options, and PEFT's of EVA."""

    rho: Annotated[float, at_least(1)] = 2.0
    """Ranks are shared out by explained variance, up to rho r for a module; 1: every one gets r."""
    tau: Annotated[float, _COSINE] = 0.99
    """A direction has settled when it turns by less than this cosine from batch to batch."""
    use_label_mask: bool = False
    """Count only tokens that have a label, as PEFT does; off: every real token, as the other
    methods' calibration does."""
    whiten: bool = False
    """Divide each direction by the root of its singular value."""
    adjust_scaling_factors: bool = True
    """Keep lora_alpha / rank the same for every module, whatever its rank."""


class Eva(Lora):
    """y = W x + s_i B A x: A = the r_i leading principal directions of the inputs; B is zero.

    The ranks go to the directions of all modules that explain the most variance, N r in all. A and
    B train. PEFT's incremental PCA, over the calibration batches again and again until every
    direction has settled; what tokens are real and whose is told by `tlora.calibration`. Modules
    that read one row a sample (a pooler) start as in LoRA. A resumed run takes A from its folder.

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
        """Find A, unless ``plan`` holds it, and wrap ``model``."""
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
