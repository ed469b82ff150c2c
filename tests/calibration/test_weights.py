"""How a target's weight is read."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from tlora import TLoraConfig
from tlora.calibration.targets import find_targets
from tlora.calibration.weights import dense_weight
from tlora.errors import AdapterError


@pytest.mark.parametrize("family", ["gpt2-right", "llama-right"])
def test_the_dense_weight_is_the_matrix_that_maps_input_to_output(family_of, family):
    model = family_of(family).model.to(torch.bfloat16)
    for target in find_targets(model, TLoraConfig()):
        weight = dense_weight(target)
        assert weight.dtype == torch.float32
        assert not weight.requires_grad
        # Columns of W are the outputs of unit vectors, which bfloat16 gives exactly.
        module = copy.deepcopy(target.module)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
        unit = torch.eye(target.d_in, dtype=torch.bfloat16)
        assert torch.equal(weight, module(unit).T.float())


def test_a_weight_that_is_no_matrix_of_floats_is_refused(tiny_llama):
    target = find_targets(tiny_llama(), TLoraConfig())[0]
    target.module.weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(AdapterError, match=rf"{re.escape(target.name)}.*torch\.int8.*unquantised"):
        dense_weight(target)


def test_a_weight_on_meta_is_refused(tiny_llama):
    target = find_targets(tiny_llama().to("meta"), TLoraConfig())[0]
    with pytest.raises(AdapterError, match=rf"{re.escape(target.name)}.*meta"):
        dense_weight(target)
