"""LoRA-One: LoRA that starts after the best rank-r step of full fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from tlora.checks import POSITIVE
from tlora.methods.base import Batches, Prepared, Samples, Traits
from tlora.methods.learningrates import LearningRates
from tlora.methods.lora import Lora, peft_fields
from tlora.methods.rslora import RsLoraOptions

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class LoraOneOptions(RsLoraOptions):
    """rsLoRA's options, the size of the initial step, and the preconditioner."""

    lora_alpha: Annotated[float, POSITIVE] = 16
    """The adapter's output is multiplied by lora_alpha / sqrt(r)."""
    gamma: Annotated[float, POSITIVE] = 128.0
    """The initial step of full fine-tuning has the learning rate lora_alpha / (sqrt(r) gamma)."""
    normalize: bool = True
    """First divide each module's gradient by its largest singular value, as the authors do."""
    precondition: bool = False
    """Step with (B^T B + reg I)^-1 dL/dA and dL/dB (A A^T + reg I)^-1, by PEFT's optimizer."""
    reg: Annotated[float, POSITIVE] = 1e-6
    """Added to the diagonals of the matrices that `precondition` inverts."""

    @property
    def own_optimizer(self) -> bool:
        """See `MethodOptions`."""
        return self.precondition


class LoraOne(Lora):
    """y = W x + s B A x, s = lora_alpha / sqrt(r), where s B_0 A_0 is a first descent step.

    -G = U S V^T: B_0 = (S_r / gamma)^(1/2) on U_r, A_0 = (S_r / gamma)^(1/2) on V_r^T, the leading
    r components of the mean gradient over the calibration samples. The base weights do not
    change: the model starts after full fine-tuning's best step of rank r, not at W x.
    A and B train. A resumed run reads A_0 and B_0 from its folder.

    Source: Zhang et al., arXiv 2502.01235, its algorithm; YuanheZ/LoRA-One.
    """

    options: ClassVar[type] = LoraOneOptions
    traits: ClassVar[Traits] = Traits(
        title="LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning Large Language"
        " Models, Provably and Efficiently",
        arxiv="2502.01235",
        year=2025,
        formula="W x + (alpha / sqrt(r)) B A x, B0 A0 the best rank-r step of full fine-tuning",
        trains=("lora_A", "lora_B"),
        parameters="r (m + d)",
        start="moved",
        learning_rates=LearningRates(
            tiny=2e-3,
            small=5e-4,
            large=2e-4,
            huge=1e-4,
            source="The authors' example (YuanheZ/LoRA-One) for Llama-2-7B: 2e-4; else LoRA's.",
        ),
        reads="gradients",
        pools=True,
        source="tlora",
    )
    fields: ClassVar[dict[str, Any]] = {"use_rslora": True}

    def prepare(
        self, model: torch.nn.Module, options: Any, batches: Batches, plan: Any = None
    ) -> Prepared:
        """Compute A_0 and B_0, unless ``plan`` holds them, and wrap ``model``."""
        from peft import LoraConfig

        from tlora.adapter.initial import attach_initial, refuse_ranks
        from tlora.adapter.stock import targets_of

        targets = targets_of(model, options)
        refuse_ranks(targets, options.r)
        if plan is None:
            plan = _first_step(model, targets, options, batches)
        config = LoraConfig(**peft_fields(options, LoraConfig), **self.fields)
        prepared = Prepared(model=attach_initial(model, targets, config, plan), plan=plan)
        if options.precondition:
            prepared.optimizer = partial(_preconditioned, reg=options.reg)
        return prepared


def _first_step(model: Any, targets: Any, options: LoraOneOptions, batches: Batches) -> Any:
    """Return A_0 and B_0 of each target, by one forward and backward pass per sample."""
    import torch

    from tlora.adapter.initial import InitialAdapter
    from tlora.adapter.stock import calibration_config
    from tlora.calibration.probe import calibrate
    from tlora.errors import CalibrationError

    samples = Samples.of(batches)
    stats = calibrate(
        model, samples.batches, calibration_config(options, "gradient"), **samples.reading
    )
    modules = {}
    for target in targets:
        gradient = stats.modules[target.name].require("gradient")
        u, s, vh = torch.linalg.svd(-gradient, full_matrices=False)
        if not s[0] > 0:
            raise CalibrationError(
                f"{target.name}: no calibration sample's loss depends on it, so LoRA-One "
                "has no gradient for it; exclude it by `exclude_modules`."
            )
        largest = float(s[0]) if options.normalize else 1.0
        root = (s[: options.r] / (largest * options.gamma)).sqrt()
        modules[target.name] = (root[:, None] * vh[: options.r], u[:, : options.r] * root)
    return InitialAdapter(modules)


def _preconditioned(model: torch.nn.Module, arguments: Any, reg: float) -> torch.optim.Optimizer:
    """Make the optimizer that ``arguments`` names, preceded by PEFT's preconditioner."""
    from peft.optimizers import create_riemannian_optimizer
    from transformers import Trainer

    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    weight_decay = arguments.weight_decay
    return create_riemannian_optimizer(model, kind, reg=reg, weight_decay=weight_decay, **options)
