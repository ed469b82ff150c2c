"""AILoRA: queries start from the principal part of their weight, values from the minor part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tlora.methods.base import Batches, Traits
from tlora.methods.learningrates import RESIDUAL_RATES
from tlora.methods.options import Scaled
from tlora.methods.residual import ResidualLora

_QUERIES = ["q_proj", "query", "q_lin", "q"]
_VALUES = ["v_proj", "value", "v_lin", "v"]


@dataclass(kw_only=True)
class AiloraOptions(Scaled):
    """LoRA's options; the method fixes which modules are adapted."""

    query_modules: list[str] | None = None
    """Names or suffixes of the query projections; None: q_proj, query, q_lin and q."""
    value_modules: list[str] | None = None
    """Names or suffixes of the value projections; None: v_proj, value, v_lin and v."""


class Ailora(ResidualLora):
    """W = U S V^T: B_0 = U_r S_r^(1/2), A_0 = S_r^(1/2) V_r^T, of W^Q the first r, of W^V the last.

    Only the query and value projections are adapted. A and B train; the base keeps W - s B_0 A_0
    with s = lora_alpha / r, so that W is reproduced at the start for any s; at s = 1 exactly the r
    components are taken out.

    Source: arXiv 2510.08034, section 3.
    """

    options: ClassVar[type] = AiloraOptions
    traits: ClassVar[Traits] = Traits(
        title="AILoRA: Function-Aware Asymmetric Initialization for Low-Rank Adaptation of Large"
        " Language Models",
        arxiv="2510.08034",
        year=2025,
        formula="(W - s B0 A0) x + s B A x, B0 A0 the first r singular components of W^Q, the last"
        " r of W^V",
        trains=("lora_A", "lora_B"),
        parameters="r (m + d), of queries and values alone",
        start="rounding",
        saved="LoRA of rank 2 r",
        learning_rates=RESIDUAL_RATES,
        changes_base=True,
        source="tlora",
    )

    def targets(self, model: Any, options: AiloraOptions) -> Any:
        """Return the query and value projections, in the model's order."""
        queries, values = self._groups(model, options)
        chosen = {target.name: target for target in (*queries, *values)}
        return [chosen[name] for name, _ in model.named_modules() if name in chosen]

    def _groups(self, model: Any, options: AiloraOptions) -> tuple[list[Any], list[Any]]:
        from tlora.adapter.stock import targets_named
        from tlora.calibration.names import unmatched
        from tlora.errors import ConfigError

        groups: list[list[Any]] = []
        faults: list[str] = []
        for field, usual in (("query_modules", _QUERIES), ("value_modules", _VALUES)):
            given = getattr(options, field)
            wanted = given or usual
            groups.append(targets_named(model, wanted, options))
            if groups[-1]:
                found = [target.name for target in groups[-1]]
                kind = f"{type(model).__name__} has this name"
                faults += unmatched(field, given or [], found, kind)
            else:
                faults.append(
                    f"no Linear of {type(model).__name__} is named {' or '.join(wanted)}; "
                    f"name its projections by `{field}` (a fused matrix of q, k and v does "
                    "not work)."
                )
        if faults:
            raise ConfigError(faults, where="adapter")
        return groups[0], groups[1]

    def start(self, model: Any, targets: Any, options: AiloraOptions, batches: Batches) -> Any:
        """Start from the principal part of query weights and the minor part of value weights."""
        from tlora.calibration.weights import dense_weight
        from tlora.linalg.bases import singular_part

        values = {target.name for target in self._groups(model, options)[1]}

        def part(target: Any) -> Any:
            minor = target.name in values
            b, a = singular_part(dense_weight(target), options.r, minor=minor)
            return a, b

        return part
