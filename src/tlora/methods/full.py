"""Full fine-tuning, the other baseline: no adapter, every parameter trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from tlora.methods.base import Batches, Prepared, Traits
from tlora.methods.learningrates import LearningRates
from tlora.methods.options import MethodOptions

if TYPE_CHECKING:
    import torch


class FullFineTuning:
    """y = (W + dW) x with dW unconstrained: the model itself trains.

    The only method without a PEFT folder: its `adapter` folder is the whole model, written by
    `save_pretrained` of transformers and loaded by `from_pretrained`.

    Source: the baseline "Full" of arXiv 2604.18124, table 1.
    """

    options: ClassVar[type] = MethodOptions
    traits: ClassVar[Traits] = Traits(
        title="TLoRA: Task-aware Low Rank Adaptation of Large Language Models (its baseline)",
        arxiv="2604.18124",
        year=2026,
        formula="(W + dW) x",
        trains=("",),
        parameters="m d, and all other weights",
        start="identical",
        saved="a model",
        learning_rates=LearningRates(
            tiny=3e-4,
            small=5e-5,
            large=2e-5,
            huge=1e-5,
            source="Llama 2 (arXiv 2307.09288, section 3.1): 2e-5; Alpaca: 2e-5 at 7B, 1e-5 at"
            " 13B; BERT (arXiv 1810.04805, appendix A.3): 2e-5, 3e-5 or 5e-5. Extrapolated below"
            " 100 million.",
        ),
        changes_base=True,
        source="tlora",
        leaves="model",
    )

    def prepare(
        self, model: torch.nn.Module, options: Any, batches: Batches, plan: Any = None
    ) -> Prepared:
        """Make every parameter trainable; nothing is drawn, no batch is read."""
        from tlora.calibration.placement import is_dtensor
        from tlora.calibration.weights import is_float
        from tlora.errors import ConfigError

        for place, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not is_float(module, parameter) and not is_dtensor(parameter):
                    full_name = f"{place}.{name}".removeprefix(".")
                    raise ConfigError(
                        f"{full_name} is stored as {type(parameter).__name__} of "
                        f"{parameter.dtype}, which gradients cannot change; load the model "
                        "unquantized, or choose an adapter.",
                        where="method",
                    )
        return Prepared(model=model.requires_grad_(True))
