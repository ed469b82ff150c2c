"""The attached adapter: stock PEFT, the base's output to the bit, and loadable without us."""

from __future__ import annotations

import copy
import gc
import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

import support
from support import logits_of, train
from tlora import AdapterPlan, ModulePlan, TLoraConfig, attach, freeze_a, load_adapter
from tlora.adapter.attach import lora_config
from tlora.errors import AdapterError

FAMILIES = ["gpt2-right", "bert", "t5"]


def layer_of(adapted: PeftModel, name: str) -> LoraLayer:
    return adapted.base_model.model.get_submodule(name)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def loss_of(model: nn.Module, batch: support.Sample) -> float:
    with torch.no_grad():
        return model(**batch).loss.item()


def with_b(adapted: PeftModel, scale: float = 0.3) -> PeftModel:
    """Give every B numbers, as training would."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return adapted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_output_stays_that_of_the_base_to_the_bit(calibrated, name, dtype):
    base = calibrated(name, dtype)
    before = logits_of(base.model, base.batch)

    adapted = attach(base.model, base.plan(lora_dropout=0.3)).eval()

    assert torch.equal(logits_of(adapted, base.batch), before)
    # The same comparison fails once B is not zero.
    assert not torch.equal(logits_of(with_b(adapted), base.batch), before)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_module_gets_its_own_rank_scale_and_a(calibrated, name):
    base = calibrated(name)
    planned = base.plan(lora_alpha=3.5, r=3)
    adapted = attach(base.model, planned, adapter_name="task")

    layers = {
        layer: module
        for layer, module in adapted.base_model.model.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert list(layers) == list(planned.modules)
    for layer, module in layers.items():
        want = planned.modules[layer]
        assert module.r["task"] == want.rank
        assert module.scaling["task"] == pytest.approx(want.scale, rel=1e-12)
        assert torch.equal(module.lora_A["task"].weight, want.lora_A)
        assert module.lora_B["task"].weight.shape == (want.d_out, want.rank)
        assert not module.lora_B["task"].weight.any()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_update_is_s_b_a_x(calibrated, name):
    base = calibrated(name)
    planned = base.plan(r=3)
    original = copy.deepcopy(base.model)
    generator = torch.Generator().manual_seed(0)
    adapted = with_b(attach(base.model, planned).eval())
    with torch.no_grad():
        for module in planned.modules.values():
            layer = layer_of(adapted, module.name)
            x = torch.randn(4, module.d_in, generator=generator)
            update = module.scale * x @ module.lora_A.T @ layer.lora_B["default"].weight.T
            expected = original.get_submodule(module.name)(x) + update
            assert torch.allclose(layer(x), expected, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_b_alone_trains_and_the_new_head(calibrated, name):
    base = calibrated(name)
    planned = base.plan()
    adapted = attach(base.model, planned)

    prefix = "base_model.model."
    expected = {f"{prefix}{module}.lora_B.default.weight" for module in planned.modules}
    if name == "bert":
        head = f"{prefix}classifier.modules_to_save.default"
        expected |= {f"{head}.weight", f"{head}.bias"}
    assert trainable(adapted) == expected
    matrices = {n: p for n, p in adapted.named_parameters() if "lora_B" in n}
    assert sum(p.numel() for p in matrices.values()) == planned.trainable_parameters


def test_a_trains_where_it_is_not_frozen(calibrated):
    base = calibrated("llama-right")
    planned = base.plan(freeze_a=False)
    adapted = attach(base.model, planned)
    expected = {
        f"base_model.model.{module}.lora_{matrix}.default.weight"
        for module in planned.modules
        for matrix in "AB"
    }
    assert trainable(adapted) == expected
    assert planned.trainable_parameters == sum(
        p.numel() for p in adapted.parameters() if p.requires_grad
    )


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_train_where_asked(calibrated, bias):
    base = calibrated("gpt2-right")
    adapted = attach(base.model, base.plan(bias=bias, target_modules=["c_attn"]))
    biases = {name for name in trainable(adapted) if name.endswith(".bias")}
    if bias == "lora_only":
        assert len(biases) == 2
        assert all("c_attn" in name for name in biases)
    else:
        assert biases == {n for n, _ in adapted.named_parameters() if n.endswith(".bias")}
    assert not any("lora_A" in name for name in trainable(adapted))


@pytest.mark.parametrize("name", FAMILIES)
def test_five_steps_move_b_and_leave_a_and_the_base_alone(calibrated, name):
    base = calibrated(name)
    planned = base.plan(lora_dropout=0.1)
    adapted = attach(base.model, planned)
    loss = loss_of(adapted, base.batch)
    before = {key: value.clone() for key, value in adapted.named_parameters()}
    moving = trainable(adapted)

    torch.manual_seed(0)
    train(adapted.train(), base.batch, steps=5)

    assert loss_of(adapted.eval(), base.batch) < loss
    for key, value in adapted.named_parameters():
        assert torch.equal(value, before[key]) == (key not in moving), key
    for module in planned.modules.values():
        assert torch.equal(layer_of(adapted, module.name).lora_A["default"].weight, module.lora_A)


def test_attaching_leaves_the_random_states_alone(calibrated):
    base = calibrated("llama-right")
    planned = base.plan()
    torch.manual_seed(3), random.seed(4), np.random.seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    attach(base.model, planned)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tobytes() == before[2]


def test_the_saved_configuration_is_stock_peft(calibrated, tmp_path):
    base = calibrated("llama-right")
    planned = base.plan(r=3, lora_dropout=0.1)
    attach(base.model, planned).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())

    assert saved["peft_type"] == "LORA"
    assert saved["init_lora_weights"] is True
    assert (saved["r"], saved["lora_alpha"], saved["lora_dropout"]) == (3, 2, 0.1)
    assert not (saved["use_rslora"] or saved["use_dora"] or saved["fan_in_fan_out"])
    for name, module in planned.modules.items():
        key = "^" + name.replace(".", r"\.")
        assert saved["rank_pattern"].get(key, 3) == module.rank
        assert saved["alpha_pattern"].get(key, 2) == pytest.approx(module.scale * module.rank)
    ours = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert {path.name for path in tmp_path.iterdir()} <= ours


def test_a_module_of_rank_zero_is_left_as_it_is(calibrated):
    base = calibrated("llama-right")
    for module in list(base.stats.modules.values())[:5]:
        module.sensitivity = 0.0
    planned = base.plan(rank_min=0)
    adapted = attach(base.model, planned)
    ranks = {name: module.rank for name, module in planned.modules.items()}
    assert list(ranks.values())[:5] == [0] * 5
    for name, rank in ranks.items():
        assert isinstance(layer_of(adapted, name), LoraLayer) == (rank > 0)


# --- a plan that does not fit


def misfits(base: Any, calibrated: Any) -> dict[str, tuple[AdapterPlan, str]]:
    good = base.plan()
    name = "model.layers.1.mlp.up_proj"

    def changed(**fields: Any) -> AdapterPlan:
        other = copy.deepcopy(good)
        for field, value in fields.items():
            setattr(other.modules[name], field, value)
        return other

    nothing = copy.deepcopy(good)
    for module in nothing.modules.values():
        module.rank, module.lora_A = 0, module.lora_A[:0]
    unknown = copy.deepcopy(good)
    unknown.modules["model.layers.9.mlp.up_proj"] = unknown.modules.pop(name)
    return {
        "rows": (changed(d_out=64), r"up_proj is 32 x 16 but planned as 64 x 16"),
        "a": (changed(lora_A=torch.zeros(1, 7)), r"up_proj has a lora_A of shape \(1, 7\)"),
        "rank": (changed(rank=9), r"up_proj has a lora_A of shape"),
        "unknown": (unknown, r"model\.layers\.9\.mlp\.up_proj is planned but is not a target"),
        "nothing": (nothing, "no module has a rank above 0"),
    }


@pytest.mark.parametrize("kind", ["rows", "a", "rank", "unknown", "nothing"])
def test_a_misfit_is_refused_and_the_model_stays(calibrated, kind):
    base = calibrated("llama-right")
    planned, message = misfits(base, calibrated)[kind]
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    types = [(name, type(module), id(module)) for name, module in base.model.named_modules()]
    needs = [parameter.requires_grad for parameter in base.model.parameters()]

    with pytest.raises(AdapterError, match=message):
        attach(base.model, planned)

    assert [(n, type(m), id(m)) for n, m in base.model.named_modules()] == types
    assert [parameter.requires_grad for parameter in base.model.parameters()] == needs
    after = base.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not hasattr(base.model, "peft_config")


def test_a_plan_of_another_architecture_names_some_misfits(calibrated):
    planned = calibrated("llama-right").plan(target_modules="all-linear")
    with pytest.raises(AdapterError, match=r"does not fit this GPT2LMHeadModel: .*and 9 more"):
        attach(calibrated("gpt2-right").model, planned)


# --- names


class Named(nn.Module):
    """Linears under names whose ends are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"proj": nn.Linear(4, 4), "xproj": nn.Linear(4, 4)})
        self.deep = nn.ModuleDict({"inner": nn.ModuleDict({"proj": nn.Linear(4, 4)})})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner["xproj"](self.inner["proj"](self.proj(x)))
        return self.deep["inner"]["proj"](x)


def made_up(model: nn.Module, config: TLoraConfig, ranks: dict[str, int]) -> AdapterPlan:
    """A plan with given ranks, a scale of its own for every module, and a random A."""
    modules = {}
    generator = torch.Generator().manual_seed(0)
    for index, (name, rank) in enumerate(ranks.items()):
        linear = model.get_submodule(name)
        modules[name] = ModulePlan(
            name=name,
            d_in=linear.in_features,
            d_out=linear.out_features,
            rank=rank,
            scale=1.0 + index % 250 / 64,
            lora_A=torch.randn(rank, linear.in_features, generator=generator),
            captured_energy=None,
            sensitivity=None,
            solver="random",
        )
    return AdapterPlan(modules, config)


@pytest.mark.parametrize(
    "ranks",
    [
        {"proj": 2},
        {"proj": 2, "inner.proj": 3},
        {"inner.proj": 3},
        {"proj": 2, "deep.inner.proj": 1},
        {"proj": 2, "inner.proj": 0, "deep.inner.proj": 1},
    ],
    ids=str,
)
def test_a_name_that_ends_another_adapts_that_module_alone(ranks, tmp_path):
    model = support.seeded(Named)
    fresh, x = copy.deepcopy(model), torch.linspace(-1, 1, 12).view(3, 4)
    planned = made_up(model, TLoraConfig(r=2, lora_alpha=2), ranks)

    adapted = with_b(attach(model, planned))

    wrapped = {
        name: (layer.r["default"], layer.scaling["default"])
        for name, layer in adapted.base_model.model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    used = {name: rank for name, rank in ranks.items() if rank}
    assert wrapped == {name: (rank, planned.modules[name].scale) for name, rank in used.items()}
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(loaded(x), adapted(x))


def test_hundreds_of_modules_each_get_their_own_rank_and_scale():
    count = 520

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # Names of which some are the beginning, or the end, of others.
            self.layers = nn.ModuleDict({f"p{i}": nn.Linear(3, 3) for i in range(count)})

    model = Wide()
    ranks = {f"layers.p{i}": 1 + (i * 7) % 3 for i in range(count)}
    planned = made_up(model, TLoraConfig(r=2, lora_alpha=2), ranks)

    adapted = attach(model, planned)

    for name, module in planned.modules.items():
        layer = layer_of(adapted, name)
        assert layer.r["default"] == module.rank
        assert layer.scaling["default"] == pytest.approx(module.scale, rel=1e-12)
        assert torch.equal(layer.lora_A["default"].weight, module.lora_A)


def test_the_keys_of_both_patterns_fit_pythons_cache_of_regexes():
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(300)])
    planned = made_up(
        model, TLoraConfig(r=4, lora_alpha=4), {str(i): 1 + i % 3 for i in range(300)}
    )
    for module in planned.modules.values():
        module.scale = 2.0
    config = lora_config(planned, model)
    assert set(config.rank_pattern.values()) == {1, 2, 3}
    # 600 keys where each module has its own; Python keeps 512 compiled.
    assert len(config.rank_pattern) + len(config.alpha_pattern) == 5


def test_a_folder_without_an_adapter(calibrated, tmp_path):
    with pytest.raises(AdapterError, match=r"holds no adapter_config\.json.*save_pretrained"):
        load_adapter(calibrated("llama-right").model, tmp_path)


def remains(model: nn.Module) -> tuple[int, int]:
    """The number of tensors alive, and of hooks on the model."""
    gc.collect()
    tensors = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
    held = [item for module in model.modules() for item in vars(module).items()]
    return tensors, sum(len(hooks) for name, hooks in held if name.endswith("_hooks"))


def test_adapters_that_come_and_go_leave_nothing_behind(calibrated, tmp_path):
    base = calibrated("llama-right")
    planned = base.plan()
    adapted = attach(base.model, planned)
    adapted.save_pretrained(tmp_path)
    base.model = adapted.unload()

    def turn() -> None:
        for way in (
            lambda model: attach(model, planned),
            lambda model: load_adapter(model, tmp_path, is_trainable=True),
        ):
            adapted = way(base.model)
            adapted(**base.batch).loss.backward()
            adapted.load_adapter(str(tmp_path), "other", is_trainable=True)
            adapted.set_adapter("other")
            freeze_a(adapted, "other")
            adapted(**base.batch).loss.backward()
            adapted.delete_adapter("other")
            base.model = adapted.unload()

    turn()
    first = remains(base.model)
    for _ in range(3):
        turn()
    assert remains(base.model) == first
