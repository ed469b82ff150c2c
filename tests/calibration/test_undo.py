import pytest
import torch

from tlora.calibration.preserve import undo_after


def litter(model):
    """What another library's calibration does, halfway through."""
    layer = model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda *_: None)
    layer.register_full_backward_hook(lambda *_: None)
    layer.statistic = torch.zeros(2)
    layer.weight.requires_grad_(True)
    layer.weight.grad = torch.ones_like(layer.weight)
    model.train()


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_of_what_the_body_did(tiny_llama, fails):
    model = tiny_llama().requires_grad_(False)
    kept = model.lm_head.register_forward_hook(lambda *_: None)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    try:
        with undo_after(model):
            litter(model)
            if fails:
                raise RuntimeError
    except RuntimeError:
        pass
    layer = model.model.layers[0].mlp.up_proj
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not layer._forward_hooks
    assert not layer._backward_hooks
    assert layer.weight.grad is None
    assert not layer.weight.requires_grad
    assert not model.training
    assert kept.id in model.lm_head._forward_hooks
    assert (model.lm_head.weight.grad == 1).all()
