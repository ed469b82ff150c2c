"""Bytes of a model's weights as bitsandbytes quantizes them, by arithmetic.

Source: Dettmers et al. 2023 (arXiv 2305.14314), section 3, for blocks and quantized scales.
"""

from __future__ import annotations

from typing import Any

from tlora.training.activations import FLOAT


def weight_bytes(model: Any, quantization: str) -> int:
    """Return the bytes of a model's parameters, quantized by bitsandbytes as the run requests.

    The output layer and the last layer are not quantized. NF4 takes half a byte per weight, a byte
    per block of 64 and a float per 256 blocks, plus two tables of 16 and 256 floats; int8 takes a
    byte per weight and a float per row.
    """
    from torch import nn

    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if quantization == "none":
        return size
    last = list(model.named_parameters())[-1][0].rpartition(".")[0]
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == last:
            continue
        if module is model.get_output_embeddings():
            continue
        entries, blocks = module.weight.numel(), -(-module.weight.numel() // 64)
        size -= entries * module.weight.element_size()
        if quantization == "nf4":
            size += entries // 2 + blocks + FLOAT * (-(-blocks // 256) + 16 + 256 + 1)
        else:
            size += entries + FLOAT * module.out_features
    return size
