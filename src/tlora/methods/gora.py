"""GoRA: ranks from the sensitivity of each weight, and B initialized from its gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from tlora.checks import POSITIVE, at_least
from tlora.methods.base import Batches, Prepared, Samples, Traits
from tlora.methods.learningrates import LearningRates
from tlora.methods.rslora import RsLoraOptions

if TYPE_CHECKING:
    import torch

    from tlora.adapter.initial import InitialAdapter


@dataclass(kw_only=True)
class GoraOptions(RsLoraOptions):
    """rsLoRA's options, the bounds of the ranks, and the size of the initial step."""

    lora_alpha: Annotated[float, POSITIVE] = 16
    """The adapter's output is multiplied by lora_alpha / sqrt(rank)."""
    r_min: Annotated[int, at_least(1)] | None = None
    """Smallest rank of a module; None: half of r."""
    r_max: Annotated[int, at_least(1)] | None = None
    """Largest rank of a module; None: four times r."""
    gamma: Annotated[float, at_least(0)] = 0.05
    """Size of the initial step of W against its gradient."""

    @property
    def bounds(self) -> tuple[int, int]:
        """The smallest and the largest rank."""
        least = max(self.r // 2, 1) if self.r_min is None else self.r_min
        return least, 4 * self.r if self.r_max is None else self.r_max

    def relations(self) -> Iterator[str]:
        """Yield errors in combinations of fields."""
        yield from super().relations()
        least, most = self.bounds
        if least > most:
            yield f"`r_min` is {least}; give at most `r_max` ({most})."


class Gora:
    """y = W x + (lora_alpha / sqrt(r_i)) B A x; B_0 A_0 is a step against the gradient G of W.

    r_i = b a_i / sqrt(m_i + d_i), rounded and clamped to r_min..r_max, with the budget b = sum_i r
    sqrt(m_i + d_i) and a_i the module's share of avg |W * G|. A_0 is LoRA's, and B_0 = -(gamma
    sqrt(d) / lora_alpha) G A_0^T (A_0 A_0^T)^(-1): the B whose B A_0 is closest to -G, scaled so
    that the step is about as long as -gamma G. A and B train, and W does not change. G is the mean
    over the calibration samples. A resumed run reads A_0 and B_0 from its folder.

    Source: He et al., arXiv 2502.12171, section 3.
    """

    options: ClassVar[type] = GoraOptions
    traits: ClassVar[Traits] = Traits(
        title="GoRA: Gradient-driven Adaptive Low Rank Adaptation",
        arxiv="2502.12171",
        year=2025,
        formula="W x + (alpha / sqrt(r_i)) B A x, r_i by |W * G|, B0 A0 a step against G",
        trains=("lora_A", "lora_B"),
        parameters="r_i (m + d)",
        start="moved",
        saved="LoRA of rank r_i",
        learning_rates=LearningRates(
            tiny=1e-3,
            small=2e-4,
            large=5e-5,
            huge=2e-5,
            source="The authors' scripts (hhnqqq/MyTransformers): 5e-5 on Llama-3.1-8B, and "
            "2e-5 to 5e-5 on Llama-2-7B, of A; B learns 16 times as fast there, here "
            "as fast. Below a billion extrapolated, as for rsLoRA.",
        ),
        reads="gradients",
        pools=True,
        source="tlora",
    )

    def prepare(
        self, model: torch.nn.Module, options: Any, batches: Batches, plan: Any = None
    ) -> Prepared:
        """Measure G, unless ``plan`` holds the adapter; wrap ``model``."""
        from peft import LoraConfig

        from tlora.adapter.initial import attach_initial
        from tlora.adapter.stock import targets_of
        from tlora.methods.lora import peft_fields

        targets = targets_of(model, options)
        if plan is None:
            plan = self._start(model, targets, options, batches)
        config = LoraConfig(**peft_fields(options, LoraConfig), use_rslora=True)
        return Prepared(model=attach_initial(model, targets, config, plan), plan=plan)

    def _start(self, model: Any, targets: Any, options: Any, batches: Batches) -> InitialAdapter:
        from tlora.adapter.initial import InitialAdapter, random_start
        from tlora.adapter.stock import calibration_config
        from tlora.calibration.probe import calibrate
        from tlora.calibration.weights import dense_weight
        from tlora.linalg.gradients import compressed

        samples = Samples.of(batches)
        config = calibration_config(options, basis="gradient")
        measured = calibrate(model, samples.batches, config, **samples.reading).modules
        gradients: dict[str, Any] = {t.name: measured[t.name].gradient for t in targets}
        importances = []
        for target in targets:
            weight = dense_weight(target)
            product = weight * gradients[target.name].to(weight.device)
            importances.append(float(product.abs().mean()))
        sizes = [target.d_out + target.d_in for target in targets]
        ranks = shared_ranks(importances, sizes, options.r, options.bounds)
        modules = {}
        for target, rank in zip(targets, ranks, strict=True):
            a, _ = random_start(target, rank)
            gradient = gradients.pop(target.name)
            scale = options.gamma * target.d_in**0.5 / options.lora_alpha
            modules[target.name] = a, -scale * compressed(gradient.to(a.device), a)
        return InitialAdapter(modules)


def shared_ranks(
    importances: Sequence[float], sizes: Sequence[int], rank: int, bounds: tuple[int, int]
) -> list[int]:
    """Return the rank of each module.

    Args:
        importances: avg |W * G| of each module.
        sizes: m + d of each module.
        rank: r that the budget would give each module if all were equal.
        bounds: the smallest and the largest rank.
    """
    budget = sum(rank * size**0.5 for size in sizes)
    whole = sum(importances) or 1.0
    least, most = bounds
    return [
        min(max(round(budget * importance / whole / size**0.5), least), most)
        for importance, size in zip(importances, sizes, strict=True)
    ]
