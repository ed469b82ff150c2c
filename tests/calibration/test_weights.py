"""How a target's weight is read."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from tlora import TLoraConfig
from tlora.calibration.targets import find_targets
from tlora.calibration.weights import dense_weight, stored_weight
from tlora.errors import AdapterError


@pytest.mark.parametrize("family", ["gpt2-right", "llama-right"])
def test_the_dense_weight_is_the_matrix_that_maps_input_to_output(family_of, family):
    model = family_of(family).model.to(torch.bfloat16)
    for target in find_targets(model, TLoraConfig()):
        weight = dense_weight(target)
        assert weight.dtype == torch.float32
        assert not weight.requires_grad
        stored = stored_weight(target)
        assert stored.dtype == torch.bfloat16
        assert stored.data_ptr() == target.module.weight.data_ptr()  # no copy
        assert torch.equal(stored.float(), weight)
        # Columns of W are the outputs of unit vectors, which bfloat16 gives exactly.
        module = copy.deepcopy(target.module)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
        unit = torch.eye(target.d_in, dtype=torch.bfloat16)
        assert torch.equal(weight, module(unit).T.float())


class Eighths(torch.Tensor):
    """A weight of a library that nobody knows: says that it is of floats."""


@pytest.mark.parametrize(
    ("weight", "described"),
    [
        (torch.zeros(16, 16, dtype=torch.int8), r"Linear of Parameter of torch\.int8"),
        (torch.zeros(16, 16).to(torch.float8_e4m3fn), r"Linear of Parameter of torch\.float8"),
        (torch.zeros(16, 16).as_subclass(Eighths), r"Linear of Eighths of torch\.float32"),
    ],
    ids=str,
)
def test_an_unknown_storage_is_refused_and_the_known_ones_named(tiny_llama, weight, described):
    target = find_targets(tiny_llama(), TLoraConfig())[0]
    del target.module.weight
    target.module.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(AdapterError) as caught:
        dense_weight(target)
    message = str(caught.value)
    assert re.search(rf"{re.escape(target.name)}.*{described}", message)
    for name in ("floating point", "bitsandbytes 4-bit", "bitsandbytes 8-bit", "torchao", "HQQ"):
        assert name in message


def test_a_weight_of_another_shape_than_the_module_says_is_refused(tiny_llama):
    target = find_targets(tiny_llama(), TLoraConfig())[0]
    target.module.weight = nn.Parameter(torch.zeros(256))
    with pytest.raises(AdapterError, match=r"reads as \(256,\), but it maps 16 to 16"):
        dense_weight(target)


def test_a_weight_on_meta_is_refused(tiny_llama):
    target = find_targets(tiny_llama().to("meta"), TLoraConfig())[0]
    with pytest.raises(AdapterError, match=rf"{re.escape(target.name)}.*meta"):
        dense_weight(target)
