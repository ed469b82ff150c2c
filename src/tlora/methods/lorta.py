"""LoRTA: one CP tensor for the updates of all layers, heads and attention projections."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from tlora.checks import POSITIVE
from tlora.methods.base import Batches, Prepared, Traits
from tlora.methods.learningrates import LearningRates
from tlora.methods.lora import peft_fields
from tlora.methods.options import Scaled

if TYPE_CHECKING:
    import torch

_HEADS = ["q_proj", "k_proj", "v_proj", "query", "key", "value", "q_lin", "k_lin", "v_lin"]
_OUTPUTS = ["o_proj", "out_proj", "attention.output.dense", "out_lin"]


@dataclass(kw_only=True)
class LortaOptions(Scaled):
    """LoRA's options; the method fixes which modules are adapted."""

    lora_alpha: Annotated[float, POSITIVE] = 16
    """The adapter's output is multiplied by lora_alpha / r."""
    head_modules: list[str] | None = None
    """Names or suffixes of the projections that output heads; None: the usual names of queries,
    keys and values."""
    output_modules: list[str] | None = None
    """Names or suffixes of the projections that read heads; None: o_proj, out_proj,
    attention.output.dense and out_lin."""


class Lorta:
    """dW of every projection is a slice of one CP tensor over d, d_h, heads, layers and matrices.

    dW[l, p] = s sum_k a_k (b_k x h_k)^T L_lk P_pk, s = lora_alpha / r, transposed for the output
    projection: see `tlora.adapter.cp_tensor`. b starts at zero, the other factors at random. The
    saved adapter is a plain LoRA of rank r for each projection.

    Source: Hounie et al., arXiv 2410.04060; ihounie/lorta.
    """

    options: ClassVar[type] = LortaOptions
    traits: ClassVar[Traits] = Traits(
        title="LoRTA: Low Rank Tensor Adaptation of Large Language Models",
        arxiv="2410.04060",
        year=2024,
        formula="W x + s dW x, dW a slice of one CP tensor over heads, layers and projections",
        trains=("lora_A.default.tensor",),
        parameters="r (d + d_h + H + L + P) in all, of L layers, H heads and P projections",
        start="identical",
        learning_rates=LearningRates(
            tiny=1e-2,
            small=5e-3,
            large=4e-4,
            huge=1e-4,
            source="The authors' scripts (ihounie/lorta): 4e-4 for Llama-2-7B; for RoBERTa they"
            " search 1e-4 to 5e-2, of which 5e-3 is the middle. The rest is extrapolated.",
        ),
        source="tlora",
    )

    def prepare(
        self, model: torch.nn.Module, options: Any, batches: Batches, plan: Any = None
    ) -> Prepared:
        """Wrap ``model``. The factors are drawn from torch's global generator."""
        from peft import LoraConfig

        from tlora.adapter.cp_tensor import grouped, make_lorta
        from tlora.adapter.stock import targets_named, wrap_exactly
        from tlora.adapter.three_factors import save_written_out
        from tlora.errors import ConfigError

        heads = targets_named(model, options.head_modules or _HEADS, options)
        readers = targets_named(model, options.output_modules or _OUTPUTS, options)
        if not heads:
            raise ConfigError(
                f"no Linear of {type(model).__name__} is named "
                f"{' or '.join(options.head_modules or _HEADS)}; name its projections by "
                "`head_modules` (a fused matrix of q, k and v does not work).",
                where="adapter",
            )
        config, head_dim = LoraConfig(**peft_fields(options, LoraConfig)), _head_dim(model)
        groups = grouped(heads, readers, head_dim)
        adapted = wrap_exactly(model, [*heads, *readers], config)
        make_lorta(adapted, groups, head_dim, options.r)
        return Prepared(model=adapted, writer=partial(save_written_out, adapted))


def _head_dim(model: Any) -> int:
    config = model.config.get_text_config()
    for name in ("head_dim", "d_kv"):  # T5's name
        if width := getattr(config, name, None):
            return int(width)
    return int(config.hidden_size // config.num_attention_heads)
