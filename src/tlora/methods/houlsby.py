"""Bottleneck adapters: a small network after each attention and feed-forward layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from tlora.checks import at_least
from tlora.methods.base import Batches, Prepared, Traits
from tlora.methods.learningrates import LearningRates
from tlora.methods.lora import peft_fields
from tlora.methods.options import AdapterOptions

if TYPE_CHECKING:
    import torch

_ENDS = [
    *("o_proj", "out_proj", "output.dense", "out_lin", "attention.dense", "Attention.o"),
    *("down_proj", "c_proj", "fc2", "lin2", "dense_4h_to_h", "wo"),
]


@dataclass(kw_only=True)
class HoulsbyOptions(AdapterOptions):
    """Which modules get an adapter, and its width."""

    r: Annotated[int, at_least(1)] = 64
    """Width of every adapter's bottleneck."""
    after_modules: list[str] | None = None
    """Names or suffixes of the modules to put adapters after; None: the usual output projections of
    attention and feed-forward layers."""
    train_norms: bool = True
    """Also train the normalizations of the adapted blocks, as the paper does."""


class Houlsby:
    """y + U gelu(D y + b) + c after a module, y = W x its output; the base stays frozen.

    D and U start near zero, so the output starts near the base's. The adapter is not linear, so it
    cannot be merged, and only tlora reads the folder.

    Source: Houlsby et al., arXiv 1902.00751, section 2.1; google-research/adapter-bert. Departures:
    the module's own dropout comes after the adapter; normalizations outside the adapted blocks do
    not train.
    """

    options: ClassVar[type] = HoulsbyOptions
    traits: ClassVar[Traits] = Traits(
        title="Parameter-Efficient Transfer Learning for NLP",
        arxiv="1902.00751",
        year=2019,
        formula="y + U gelu(D y + b) + c, y = W x",
        trains=("lora_A.default", "lora_B.default"),
        parameters="2 r m + r + m, and the blocks' normalizations",
        start="moved",
        learning_rates=LearningRates(
            tiny=1e-3,
            small=3e-4,
            large=1e-4,
            source="The authors' README (google-research/adapter-bert): 3e-4 for BERT base. The"
            " rest is extrapolated.",
        ),
        source="tlora",
        leaves="own",
        saved="no plain adapter",
        merges=False,
    )

    def prepare(
        self, model: torch.nn.Module, options: Any, batches: Batches, plan: Any = None
    ) -> Prepared:
        """Wrap ``model``. D and U are drawn from torch's global generator; no batch is read."""
        from peft import LoraConfig

        from tlora.adapter.bottleneck import make_bottlenecks, save
        from tlora.adapter.stock import targets_named, wrap_exactly
        from tlora.calibration.hidden_states import block_of
        from tlora.errors import ConfigError

        names = options.after_modules or _ENDS
        targets = targets_named(model, names, options)
        if not targets:
            raise ConfigError(
                f"no Linear of {type(model).__name__} is named {' or '.join(names)}; name "
                "the output projections of attention and feed-forward layers by "
                "`after_modules`.",
                where="adapter",
            )
        config = LoraConfig(**peft_fields(options, LoraConfig), lora_alpha=options.r)
        if options.train_norms:
            blocks = {block_of(target.name) for target in targets} - {None}
            norms = [name for name in _norms(model) if block_of(name) in blocks]
            config.modules_to_save = [*(options.modules_to_save or []), *norms] or None
        adapted = wrap_exactly(model, targets, config)
        make_bottlenecks(adapted, options.r)
        return Prepared(model=adapted, writer=partial(save, adapted))


def _norms(model: torch.nn.Module) -> list[str]:
    """Return the modules that normalize, recognized by class name, and have weights."""
    return [
        name
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and [*module.parameters(recurse=False)]
    ]
