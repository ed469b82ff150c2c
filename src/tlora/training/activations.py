"""Bytes of the activations that training keeps for the backward pass, by one formula.

Per token and layer, with hidden size h, attention width a (heads x head size), MLP width i and e
bytes per value, with the base model frozen:

- norms: their inputs, in float32 for an RMS norm and in e bytes for a layer norm;
- attention by a fused kernel: queries, keys, values and the result, 4 a e, and the same again for
  cross-attention; without a fused kernel, heads x T (2 e + 5) more;
- MLP: 3 i e if it is gated (gate, its activation, the other half), else i e, or 5 i e if GELU is
  composed of elementary operations (`gelu_new`); with k experts per token, i is their sum, and
  their inputs and outputs add 2 k h e;
- dropout: a byte of mask for each of two outputs of width h.

Training every weight also keeps the inputs of the linear layers: (3 h + a + i) e. The loss takes,
for each of V logits, e bytes and three values in float32. With gradient checkpointing h e per layer
stays, and one layer at a time is complete.

Source: Korthikanti et al. 2022 (arXiv 2205.05198), section 4, which counts every weight as trained;
fused attention and frozen weights follow PyTorch 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tlora.calibration.language_model import language_model

FLOAT = 4  # bytes of a float32
_WRITTEN_OUT = ("gelu_new", "gelu_fast", "quick_gelu")
_GATES = ("gate_proj", "gate_up_proj", "wi_1", "w3", "Wi")
_DROPOUTS = ("hidden_dropout_prob", "dropout", "dropout_rate", "resid_pdrop")


@dataclass(frozen=True)
class Activations:
    """Bytes per token of all layers together, in samples of one length."""

    layers: int
    """Number of layers, of encoder and decoder together."""
    element: int
    """e"""
    boundary: int
    """h e"""
    frozen: int
    """With the base model frozen."""
    full: int
    """With every weight trained."""
    loss: int
    """Bytes of the logits and of the loss's backward pass."""

    def checkpointed(self, kept: int, tokens: int) -> int:
        """Return the bytes that gradient checkpointing leaves of ``kept`` bytes of ``tokens``."""
        return tokens * self.layers * self.boundary + kept // max(1, self.layers)


def activations_of(model: Any, length: int) -> Activations:
    """Return the activations of ``model``, whose weights may be on `meta`.

    Args:
        model: a transformers model.
        length: tokens of a sample.
    """
    config = model.config.get_text_config()
    _, body = language_model(model) or ("", model)

    def first(*names: str, default: Any = 0) -> Any:
        return next((v for n in names if (v := getattr(config, n, None)) is not None), default)

    hidden, heads = first("hidden_size"), first("num_attention_heads", default=1)
    width = heads * first("head_dim", "d_kv", default=hidden // heads)
    decoder = first("decoder_layers", "num_decoder_layers") if config.is_encoder_decoder else 0
    layers, element = first("num_hidden_layers") + decoder, model.dtype.itemsize
    experts = first("num_experts_per_tok")
    inner = first("intermediate_size", "ffn_dim", "encoder_ffn_dim", "d_ff", "n_inner")
    inner = ((experts and first("moe_intermediate_size")) or inner or 4 * hidden) * max(1, experts)
    leaves = {name.rpartition(".")[2] for name, _ in body.named_modules()}
    leaves |= {name.rpartition(".")[2] for name, _ in body.named_parameters()}
    written_out = first("hidden_act", "activation_function", "dense_act_fn") in _WRITTEN_OUT
    factor = 5 if written_out else 1
    if not leaves.isdisjoint(_GATES):
        factor = 3
    eager = config._attn_implementation == "eager"
    attention = 4 * width * element + (heads * length * (2 * element + 5) if eager else 0)
    layer = attention + (factor * inner + 2 * experts * hidden) * element
    if any(first(name, default=0.0) > 0 for name in _DROPOUTS):
        layer += 2 * hidden
    norms = sum(_norm_bytes(module, hidden, width) for module in body.modules())
    frozen = layers * layer + decoder * attention + norms
    head = model.get_output_embeddings()
    return Activations(
        layers=layers,
        element=element,
        boundary=hidden * element,
        frozen=frozen,
        full=frozen + layers * (3 * hidden + width + inner) * element,
        loss=0 if head is None else head.weight.shape[0] * (element + 3 * FLOAT),
    )


def _norm_bytes(module: Any, hidden: int, width: int) -> int:
    """Return the bytes per token that a norm keeps; a norm on heads applies to each of them."""
    if "Norm" not in (kind := type(module).__name__):
        return 0
    own = next(module.parameters(), None)
    rms = "RMSNorm" in kind or kind == "T5LayerNorm"
    size = module.weight.numel() if getattr(module, "weight", None) is not None else hidden
    values = hidden if size == hidden else width
    return values * (FLOAT if rms or own is None else own.element_size())
