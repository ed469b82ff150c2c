"""Merge in memory, for bases whose weights cannot be read one by one: quantized, fused.

Loads the model, converts it to float32, merges with PEFT and rounds once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tlora.adapter.load import load_adapter
from tlora.adapter.saved import PREFIX
from tlora.calibration.weights import Target, dense_weight, holds_floats
from tlora.errors import AdapterError, first_line, listed
from tlora.exporters.base import DTYPES, Source, write_lora
from tlora.exporters.checkpoint import check_space
from tlora.models.pretrained import Pretrained, dtype_of
from tlora.models.skeleton import auto_class
from tlora.models.tokens import make_rows

_PROMPT = 32  # tokens


@dataclass(frozen=True)
class Loaded:
    """A merge of a whole model.

    Attributes:
        source: the adapter and its base.
        base: the base model.
        bare: the base on the meta device, without quantization.
        head: configuration fields that describe the adapter's classifier.
        quantized: whether its weights are quantized.
    """

    source: Source
    base: Pretrained
    bare: Any
    head: Mapping[str, Any]
    quantized: bool

    def write(self, folder: Path) -> list[str]:
        """Write the merged model, and return notes about it.

        Raises:
            AdapterError: PEFT cannot merge it, or a weight has an unknown storage format.
        """
        _refuse_ties(self.source, self.bare)
        measured = self._before() if self.quantized else None
        model = self._model()
        stored = {name: each.dtype for name, each in model.named_parameters()}
        if self.quantized:
            _dequantize(model, self.bare)
        model = self._merged(model.float())
        usual = getattr(torch, str(dtype_of(model.config)).removeprefix("torch."))
        for name, parameter in model.named_parameters():
            before = stored.get(name, usual)
            own = before if before.is_floating_point else usual
            parameter.data = parameter.data.to(DTYPES.get(self.source.config.dtype, own))
        check_space(folder, sum(each.nbytes for each in model.state_dict().values()))
        model.save_pretrained(folder, max_shard_size="5GB")
        if measured is None:
            return []
        base, adapted = measured
        off = (_logits(model) - adapted).norm() / (adapted - base).norm()
        return [
            f"Dequantized: on a fixed prompt the merged model's logits differ from those of the"
            f" adapter on the quantized base by {float(off):.2%} of the adapter's effect."
        ]

    def _model(self) -> Any:
        lora = self.source.lora
        accelerator = torch.accelerator.current_accelerator() if self.quantized else None
        task_type = lora.fields.get("task_type")
        kind = auto_class(self.bare.config, task_type)
        model, drawn = self.base.model(kind, accelerator or torch.device("cpu"), head=self.head)
        if lost := [name for name in drawn if PREFIX + name not in lora.tensors]:
            raise AdapterError(
                f"{lora.path} has no trained {listed(lost)}; give an adapter with its head."
            )
        if lora.fields.get("trainable_token_indices"):
            make_rows(model, Pretrained(name=str(lora.path)).tokenizer())
        return model.eval().requires_grad_(False)

    def _adapted(self, model: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:  # ranks may have been truncated
            write_lora(Path(folder), self.source.lora.fields, dict(self.source.lora.tensors))
            return load_adapter(model, folder, freeze=False).eval()

    def _merged(self, model: Any) -> Any:
        try:
            return self._adapted(model).merge_and_unload(safe_merge=True)
        except (NotImplementedError, ValueError, AttributeError) as error:
            raise AdapterError(
                f"{self.source.lora.path} cannot be merged: {first_line(error).rstrip('.')}; use"
                " --format native."
            ) from error

    def _before(self) -> tuple[Tensor, Tensor]:
        """Return the logits of the quantized base, alone and with the adapter."""
        model = self._model()
        return _logits(model), _logits(self._adapted(model))


def _refuse_ties(source: Source, bare: Any) -> None:
    """Reject an adapter on tied weights, because PEFT would change both."""
    lora = source.lora
    tied = getattr(bare, "all_tied_weights_keys", None) or {}
    names = {name.removesuffix(".weight") for pair in tied.items() for name in pair}
    saved = {each for each in names if PREFIX + each + ".weight" in lora.tensors}
    if touched := sorted(names & (lora.keys.keys() | saved)):
        raise AdapterError(
            f"{lora.path} changes {listed(touched)}, whose tied weights cannot be merged in memory;"
            " merge into a full-precision base with --model."
        )


def _dequantize(model: Any, bare: Any) -> None:
    """Replace quantized linear layers by float32 ones."""
    for name, plain in bare.named_modules():
        if not isinstance(plain, nn.Linear):
            continue
        module = model.get_submodule(name)
        if type(module) is nn.Linear and holds_floats(module):
            continue
        layer = nn.Linear(plain.in_features, plain.out_features, bias=False, device="meta")
        target = Target(name, module, plain.in_features, plain.out_features)
        layer.weight = nn.Parameter(dense_weight(target), requires_grad=False)
        layer.bias = module.bias
        model.set_submodule(name, layer)
    model.hf_quantizer.remove_quantization_config(model)
    # On saving, transformers would revert its conversion of the quantized weights.
    model.__dict__.pop("_weight_conversions", None)


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    """Return the logits of a fixed prompt, float32, on the CPU."""
    device = model.get_input_embeddings().weight.device
    ids = (
        torch.arange(1, _PROMPT + 1, device=device)[None]
        % model.config.get_text_config().vocab_size
    )
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    logits: Tensor = model(**inputs).logits
    return logits.float().cpu()
