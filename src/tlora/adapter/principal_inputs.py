"""EVA by PEFT: principal directions of each target's inputs, and a LoRA with these as A."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.eva import SVDHook
from torch import Tensor, nn

from tlora.adapter.freeze import lora_layers
from tlora.adapter.initial import InitialAdapter
from tlora.adapter.stock import exact, refuse_taken, wrap_exactly
from tlora.calibration.batches import TokenLayout, UnknownLayout, as_batch, token_layout
from tlora.calibration.hooks import ModuleRecord, recording
from tlora.calibration.placement import device_of
from tlora.calibration.preserve import undo_after
from tlora.calibration.weights import Target
from tlora.errors import CalibrationError, ConfigError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

logger = logging.getLogger(__name__)

_IGNORED_LABEL = -100
# PEFT repeats the batches until all directions settle, however long that takes.
_MOST_BATCHES = 2000
_REPORTED = 20
"""Number of batches between two progress lines."""


def principal_inputs(
    model: nn.Module,
    targets: Sequence[Target],
    config: LoraConfig,
    batches: Iterable[Mapping[str, Any]],
) -> InitialAdapter:
    """Return A (r_i x d), with a zero B, of each target with a positive rank.

    The model is restored afterwards, also if a batch raises. The batches stay in memory during the
    call; ``config`` has an `eva_config`.

    Raises:
        CalibrationError: no batch, a batch with fewer tokens than the largest rank, or directions
            that do not settle.
    """
    from peft import get_eva_state_dict

    device = device_of(model)
    kept = [as_batch(batch, device) for batch in batches]
    if not kept:
        raise CalibrationError("`batches` gave no sample; give at least one batch.")
    refuse_taken(model, [target.name for target in targets])
    with undo_after(model), torch.no_grad():
        eva: Any = config.eva_config
        rows = _Rows(model, eva.use_label_mask)
        read = _readers(targets, rows, kept, round(config.r * eva.rho))
        rows.left = _MOST_BATCHES
        for name, value in exact(model, read).items():
            setattr(config, name, value)
        found = get_eva_state_dict(
            model,
            kept,
            config,
            forward_fn=rows.forward,
            prepare_model_inputs_fn=rows.start,
            prepare_layer_inputs_fn=rows.of,
            gather_distributed_inputs=False,  # every process reads the same batches
            show_progress_bar=False,
        )
    widths = {target.name: target.d_out for target in targets}
    return InitialAdapter(
        {name: (a.float(), torch.zeros(widths[name], len(a))) for name, a in found.items()}
    )


def attach_eva(
    model: nn.Module, targets: Sequence[Target], config: LoraConfig, initial: InitialAdapter
) -> PeftModel:
    """Wrap ``model`` by PEFT with the given A; modules without ranks are skipped.

    Afterwards the config requests no special initialization and contains the ranks.
    """
    from peft import initialize_lora_eva_weights

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="lora with eva initialization")
        adapted = wrap_exactly(model, targets, config)
    state = {f"base_model.model.{name}": a for name, (a, _) in initial.modules.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the following layers were initialized with")
        initialize_lora_eva_weights(adapted, eva_state_dict=state, show_progress_bar=False)
    # When PEFT changes a rank it recreates A and B, in the base's dtype.
    adapted.base_model._cast_adapter_dtype("default", autocast_adapter_dtype=True)
    with torch.no_grad():
        for name, layer in lora_layers(adapted.base_model.model):
            if name in initial.modules:
                layer.lora_A["default"].weight.copy_(initial.modules[name][0])
    settled = adapted.peft_config["default"]
    settled.init_lora_weights, settled.eva_config = True, None
    return adapted


class _Rows:
    """Tells PEFT's hooks which rows of a module's input are real tokens, batch by batch."""

    def __init__(self, model: nn.Module, labeled: bool) -> None:
        self.model = model
        self.labeled = labeled
        self.left = _MOST_BATCHES
        self.layout = TokenLayout(0, None)
        self.counted: Tensor | None = None

    def start(self, batch: dict[str, Any], _: Any = None) -> None:
        """Read a batch's layout, before its forward pass."""
        self.layout = token_layout(batch, self.model)
        labels = batch.get("labels")
        self.counted = None
        if self.labeled and isinstance(labels, Tensor) and labels.dim() == 2:
            self.counted = labels != _IGNORED_LABEL

    def forward(
        self, model: nn.Module, batch: dict[str, Any], records: Iterable[ModuleRecord] = ()
    ) -> None:
        self.left -= 1
        if self.left < 0:
            raise CalibrationError(
                f"EVA's directions did not settle after {_MOST_BATCHES} batches, which "
                "repeat the same samples; give more samples, or lower `tau`, `r` or "
                "`rho`."
            )
        read = _MOST_BATCHES - self.left
        if read % _REPORTED == 0:
            hooks = [hook for it in model.modules() for hook in it._forward_hooks.values()]
            if unsettled := sum(isinstance(hook, SVDHook) for hook in hooks):
                logger.info("EVA: %d batches read, %d modules left to settle.", read, unsettled)
        with recording(model, records, self.layout, backward=False):
            model(**batch)

    def of(self, inputs: Any, _: Any, name: str) -> Tensor:
        """Return the real rows of a module's input, rows x d.

        Returns no rows for a module that reads one row per sample (a pooler), or rows mixed by
        routing.
        """
        given = inputs[0] if isinstance(inputs, (tuple, list)) else inputs
        try:
            tokens, mask = self.layout.split(self.model.get_submodule(name), given)
        except UnknownLayout:
            return torch.empty(0, given.shape[-1])
        if tokens.shape[1] == 1:
            return tokens[:0, 0]
        counted = self.counted
        if counted is not None and counted.shape == tokens.shape[:2]:
            mask = counted if mask is None else mask & counted
        return tokens.flatten(0, 1) if mask is None else tokens[mask]


def _readers(
    targets: Sequence[Target], rows: _Rows, batches: Sequence[dict[str, Any]], needed: int
) -> list[Target]:
    # Modules that read at least `needed` tokens in every batch; the others start as in LoRA.
    fewest: dict[str, int] = {}
    for batch in batches:
        records = [ModuleRecord(target) for target in targets]
        rows.start(batch)
        rows.forward(rows.model, batch, records)
        for record in records:
            name = record.target.name
            counts = [len(rows.of(call.inputs, None, name)) for call in record.calls]
            least = min(counts, default=0)
            fewest[name] = min(fewest.get(name, least), least)
    read = [target for target in targets if fewest[target.name]]
    if not read:
        raise CalibrationError(
            "no targeted module reads tokens, which EVA needs; choose other `target_modules`."
        )
    for target in read:
        if fewest[target.name] < needed:
            raise CalibrationError(
                f"{target.name}: a batch has {fewest[target.name]} tokens for it, and EVA "
                f"needs `r` times `rho`, {needed}, in each; give a larger "
                "--calibration.batch_size (and a multiple of it as samples), or lower "
                "one of them."
            )
        if needed > target.d_in:
            raise ConfigError(
                f"`r` times `rho` is {needed}, more than the {target.d_in} inputs of"
                f" {target.name}; lower one of them.",
                where="adapter",
            )
    if left_out := sorted({target.name for target in targets} - {t.name for t in read}):
        logger.warning(
            "%s: reads no tokens, so EVA does not apply; started as in LoRA.", ", ".join(left_out)
        )
    return read
