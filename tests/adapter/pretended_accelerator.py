"""Plan on a device that torch knows as no CPU, though the CPU computes; see test_accelerator.

A tensor there holds one of the CPU. An operation on tensors of both is refused, as on a GPU, and
what the host reads is counted. The mathematics takes the ways of a GPU: 16-bit products (computed
in float32), Cholesky QR, batches.
"""

import json
import sys
from types import SimpleNamespace

import torch
import transformers
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import support
from tlora import TLoraConfig
from tlora.adapter.blocks import plan_in_blocks
from tlora.calibration import weights
from tlora.linalg import gradients, moments, orthogonal, packed, products, streamed

NAME = "pretended"
CPU = torch.device("cpu")
COPIES = {"aten::_to_copy", "aten::copy_"}
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal"}
reads: list[str] = []


class Module(backend_registration._DummyBackendModule):
    def get_device_properties(self, device):
        return SimpleNamespace(total_memory=2**40)


class There(Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        shape, strides, dtype = held.size(), held.stride(), held.dtype
        return Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=dtype, device=torch.device(NAME, 0)
        )

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})

    def data_ptr(self):
        return self.held.data_ptr()

    def untyped_storage(self):
        return self.held.untyped_storage()

    def tolist(self):
        return self.to("cpu").tolist()

    def __getitem__(self, key):
        if type(key) is list:
            key = make(key, dtype=torch.long).to(self.device)
        return Tensor.__getitem__(self, key)


class Everywhere(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


def computed(func, args, kwargs):
    name = func._schema.name
    given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    there = {id(each.held): each for each in given if isinstance(each, There)}
    if there and name not in COPIES:
        here = [each for each in given if not isinstance(each, There) and each.dim()]
        if here:
            shapes = [tuple(each.shape) for each in given]
            raise RuntimeError(f"{name} of tensors on two devices: {shapes}")
        reads.extend([name] if name in READS else [])
    goal = args[0].device if name == "aten::copy_" else kwargs.get("device")
    if goal is not None and torch.device(goal).type == "cpu":
        reads.extend([name] if there and name in COPIES else [])
        there = {}
    elif goal is None and not there:
        return func(*args, **kwargs)
    held = {k: (CPU if k == "device" and v is not None else v) for k, v in kwargs.items()}
    args, held = tree_map(lambda each: each.held if isinstance(each, There) else each, (args, held))
    found = func(*args, **held)
    if goal is not None and torch.device(goal).type == "cpu":
        return found

    def back(each):
        if id(each) in there:
            return there[id(each)]  # changed in place
        return There(each) if isinstance(each, Tensor) else each

    return tree_map(back, found)


def tensor(values, device=None, **options):
    made = make(values, **options)
    return made if device is None else made.to(device)


def llama(layers):
    config = transformers.LlamaConfig(
        vocab_size=160,
        hidden_size=320,
        intermediate_size=352,
        num_hidden_layers=layers,
        num_attention_heads=4,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    return support.seeded(lambda: transformers.LlamaForCausalLM(config)).bfloat16()


def pretend():
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    torch.tensor = tensor
    for module in (products, gradients, packed, moments, streamed):
        module.multiplies_narrow = lambda device: device.type == NAME
    products._narrow_product = lambda left, right: left.float() @ right.float()
    gradients._fuses = lambda *_: False
    orthogonal.BATCHED.add(NAME)
    weights.is_float = lambda module, parameter: True


def planned(layers, device, **fields):
    batches = support.in_batches(support.causal_samples((60, 80, 70, 64)), 2)
    config = TLoraConfig(r=8, lora_alpha=8, subspace="randomized", **fields)
    return plan_in_blocks(llama(layers).to(device), batches, config, progress=False).modules


make = torch.tensor
pretend()
with Everywhere(), torch.autograd.set_multithreading_enabled(False):
    for fields in ({}, {"covariance": "streamed"}, {"memory_budget": "1MiB"}):
        counts = []
        for layers in (1, 3):
            reads.clear()
            found = planned(layers, NAME, **fields)
            counts.append(len(reads))
        expected = planned(3, "cpu", **fields)
        case = {
            "case": fields,
            "reads": counts,
            "modules": len(found) // 3,
            "ranks": [[each.rank for each in plans.values()] for plans in (found, expected)],
            "energy": max(
                abs(each.captured_energy - expected[name].captured_energy)
                for name, each in found.items()
            ),
            "sensitivity": max(
                abs(each.sensitivity / expected[name].sensitivity - 1)
                for name, each in found.items()
            ),
        }
        sys.stdout.write(json.dumps(case) + "\n")
