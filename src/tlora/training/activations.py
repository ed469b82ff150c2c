"""Bytes of the activations that training keeps for the backward pass, by formula.

Per token and layer, of hidden size h, attention width a (heads x head size), MLP width i, e bytes a
value, with the base model frozen:

- norms: their inputs, in float32 for an RMS norm and in e bytes for a layer norm;
- attention by a fused kernel: queries, keys, values and the result, 4 a e, and as much again for
  cross-attention; where the model has no fused kernel, heads x T (2 e + 5) more;
- MLP: 3 i e if it is gated (gate, its activation, the other half), else i e, or 5 i e where GELU is
  written out (`gelu_new`); of k experts a token, i is their sum, and their inputs and outputs are
  2 k h e more;
- dropout: a byte of mask for each of two outputs of width h.

Training every weight also keeps the inputs of the linear layers: (3 h + a + i) e. The loss keeps
and makes, for each of V logits, e bytes and three values in float32. With gradient checkpointing
h e a layer stays, and one layer at a time is whole.

Source: Korthikanti et al. 2022 (arXiv 2205.05198), section 4, who count every weight as trained;
fused attention and frozen weights as PyTorch 2 has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FLOAT = 4  # bytes of a float32
_WRITTEN_OUT = ("gelu_new", "gelu_fast", "quick_gelu")
_GATES = ("gate_proj", "gate_up_proj", "wi_1", "w3", "Wi")


@dataclass(frozen=True)
class Layers:
    """What a model says of its layers, of encoder and decoder together.

    Attributes:
        count: how many.
        crossing: how many of them attend to an encoder too.
        hidden: h.
        attention: a.
        heads: attention heads.
        inner: i.
        experts: k; 0 for an MLP without experts.
        norms: bytes a token of the inputs of all norms.
        element: e.
        gated: whether the MLP has a gate.
        written_out: whether the MLP's activation is composed of elementary operations.
        dropout: whether layers drop out.
        fused: whether attention has a fused kernel.
        logits: V; 0 if there is one row of them a sample.
    """

    count: int
    crossing: int
    hidden: int
    attention: int
    heads: int
    inner: int
    experts: int
    norms: int
    element: int
    gated: bool
    written_out: bool
    dropout: bool
    fused: bool
    logits: int

    def kept(self, tokens: int, length: int, trained: bool = False) -> int:
        """Return the bytes that all layers keep for ``tokens`` in samples of ``length`` tokens.

        Args:
            tokens: in a batch.
            length: of a sample.
            trained: whether every weight trains; else the base model is frozen.
        """
        layers = self.count * self._layer(length, trained)
        return tokens * (layers + self.crossing * self._attention(length) + self.norms)

    def checkpointed(self, tokens: int, length: int, trained: bool = False) -> int:
        """Return the bytes that they keep with gradient checkpointing."""
        boundaries = tokens * self.count * self.hidden * self.element
        return boundaries + self.kept(tokens, length, trained) // max(1, self.count)

    def loss(self, tokens: int) -> int:
        """Return the bytes of the logits and of the loss's backward pass."""
        return tokens * self.logits * (self.element + 3 * FLOAT)

    def _layer(self, length: int, trained: bool) -> int:
        activation = 3 if self.gated else 5 if self.written_out else 1
        values = activation * self.inner + 2 * self.experts * self.hidden
        if trained:
            values += 3 * self.hidden + self.attention + self.inner
        masks = 2 * self.hidden if self.dropout else 0
        return self._attention(length) + values * self.element + masks

    def _attention(self, length: int) -> int:
        matrix = 0 if self.fused else self.heads * length * (2 * self.element + 5)
        return 4 * self.attention * self.element + matrix


def layers_of(model: Any) -> Layers:
    """Return the layers of ``model``, whose weights may be on `meta`."""
    config = model.config.get_text_config()

    def first(*names: str, default: Any = 0) -> Any:
        return next((v for n in names if (v := getattr(config, n, None)) is not None), default)

    hidden, heads = first("hidden_size"), first("num_attention_heads", default=1)
    attention = heads * first("head_dim", "d_kv", default=hidden // heads)
    decoder = first("decoder_layers", "num_decoder_layers") if config.is_encoder_decoder else 0
    experts = first("num_experts_per_tok")
    inner = first("intermediate_size", "ffn_dim", "encoder_ffn_dim", "d_ff", "n_inner")
    leaves = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    leaves |= {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    dropouts = ("hidden_dropout_prob", "dropout", "dropout_rate", "resid_pdrop")
    head = model.get_output_embeddings()
    return Layers(
        count=first("num_hidden_layers") + decoder,
        crossing=decoder,
        hidden=hidden,
        attention=attention,
        heads=heads,
        inner=((experts and first("moe_intermediate_size")) or inner or 4 * hidden)
        * max(1, experts),
        experts=experts,
        norms=sum(_norm_bytes(module, hidden, attention) for module in model.modules()),
        element=model.dtype.itemsize,
        gated=not leaves.isdisjoint(_GATES),
        written_out=first("hidden_act", "activation_function", "dense_act_fn") in _WRITTEN_OUT,
        dropout=any(first(name, default=0.0) > 0 for name in dropouts),
        fused=config._attn_implementation != "eager",
        logits=0 if head is None else head.weight.shape[0],
    )


def _norm_bytes(module: Any, hidden: int, attention: int) -> int:
    """Return the bytes a token that a norm keeps; one of heads is applied to each of them."""
    if "Norm" not in (kind := type(module).__name__):
        return 0
    rms = "RMSNorm" in kind or kind == "T5LayerNorm"
    size = module.weight.numel() if getattr(module, "weight", None) is not None else hidden
    width = hidden if size == hidden else attention
    return width * (FLOAT if rms else next(module.parameters()).element_size())
