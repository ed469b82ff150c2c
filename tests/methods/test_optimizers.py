"""LoRA+ and LoRA-FA: which parameters move, and how fast."""

import pytest
import torch
import transformers

from tlora.adapter.freeze import lora_layers


def arguments(tmp_path, **fields):
    return transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", learning_rate=1e-3, **fields
    )


def test_b_learns_faster_than_a_all_along_the_schedule(prepared_by, tiny_llama, tmp_path):
    prepared = prepared_by("loraplus", tiny_llama(), r=2, lr_ratio=5)
    optimizer = prepared.optimizer(prepared.model, arguments(tmp_path))
    schedule = transformers.get_scheduler("linear", optimizer, 2, 6)
    names = {id(p): name for name, p in prepared.model.named_parameters()}
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(trained) == len(set(map(id, trained)))
    assert {id(p) for p in trained} == {
        id(p) for p in prepared.model.parameters() if p.requires_grad
    }
    seen = []
    for _ in range(6):
        rates = {"A": set(), "B": set()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                rates["B" if "lora_B" in names[id(parameter)] else "A"].add(group["lr"])
        [a], [b] = rates["A"], rates["B"]
        assert b == pytest.approx(5 * a)
        seen.append(a)
        optimizer.step()
        schedule.step()
    assert max(seen) == pytest.approx(1e-3)
    assert len(set(seen)) > 3


def test_the_optimizer_is_the_one_that_the_trainer_names(prepared_by, tiny_llama, tmp_path):
    prepared = prepared_by("loraplus", tiny_llama(), r=2)
    fields = arguments(tmp_path, optim="adamw_torch", adam_beta2=0.5, weight_decay=0.3)
    optimizer = prepared.optimizer(prepared.model, fields)
    assert type(optimizer) is torch.optim.AdamW
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.5)}
    decays = {group["weight_decay"] for group in optimizer.param_groups if group["params"]}
    assert decays == {0.3}
    plain = prepared.optimizer(prepared.model, arguments(tmp_path, optim="sgd"))
    assert type(plain) is torch.optim.SGD


def matrices(model, part):
    return {
        name: getattr(layer, part)["default"].weight.detach().clone()
        for name, layer in lora_layers(model)
    }


@pytest.mark.parametrize("projected", [False, True])
def test_a_stays_frozen_through_pefts_switches(
    prepared_by, tiny_llama, batches, tmp_path, projected
):
    prepared = prepared_by("lora-fa", tiny_llama(), r=2, lora_alpha=6, projected=projected)
    model = prepared.model
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    if projected:
        optimizer = prepared.optimizer(model, arguments(tmp_path))
    else:
        assert prepared.optimizer is None
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    first_a, first_b = matrices(model, "lora_A"), matrices(model, "lora_B")
    for _ in range(2):
        model(**batches[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after_a, after_b = matrices(model, "lora_A"), matrices(model, "lora_B")
    assert all(torch.equal(after_a[name], value) for name, value in first_a.items())
    assert not any(torch.equal(after_b[name], value) for name, value in first_b.items())
    assert [type(callback).__name__ for callback in prepared.callbacks] == ["FrozenACallback"]


def test_a_projected_step_is_the_least_squares_fit_of_full_fine_tunings(
    prepared_by, tiny_llama, batches, tmp_path
):
    # Of all G_B, s G_B A is closest to the gradient of W: then its remainder is orthogonal to A.
    prepared = prepared_by("lora-fa", tiny_llama(), r=2, lora_alpha=6, projected=True)
    model = prepared.model
    optimizer = prepared.optimizer(model, arguments(tmp_path))
    model(**batches[0]).loss.backward()
    before = {n: layer.lora_B["default"].weight.grad.clone() for n, layer in lora_layers(model)}
    optimizer.step()
    stem = "base_model.model."
    for name, layer in lora_layers(model):
        a, scale = layer.lora_A["default"].weight, layer.scaling["default"]
        moment = optimizer.state[f"{stem}{name.removeprefix(stem)}.lora"]["exp_avg_B"] / 0.1
        wanted = before[name] @ torch.linalg.inv(a @ a.T) / scale**2
        torch.testing.assert_close(moment, wanted, rtol=0.05, atol=1e-2 * wanted.abs().max().item())
