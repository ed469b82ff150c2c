"""Compare products, calibration and planning between GPU and CPU.

    python scripts/check_gpu.py

Uses a small random Llama. Prints the relative errors of 16-bit products against float64;
for float32 and bfloat16, the largest relative difference of sensitivities and of second moments,
the number of different ranks, the smallest overlap of a module's subspaces (1: equal), and whether
the same seed gives a bit-identical plan twice. On a GPU, it also prints, for the down_proj of
Llama-2-7B and 4 samples of 512 tokens in bfloat16, the cost of sum |W * G_s| with the Triton kernel
and with batched products, compared to the bare product of all tokens.

Exits with 1 if a difference exceeds its limit, the adapted model's output is not bit-identical to
the base's, or anything besides B gets a gradient.
"""

import argparse
import copy
import itertools
import time
from collections.abc import Callable, Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tlora import AdapterPlan, Calibration, TLoraConfig, attach, calibrate, plan
from tlora.adapter.attach import made_plan
from tlora.linalg.gradients import Rows, batched_magnitude, fused_magnitude
from tlora.linalg.products import product, product_of_terms, terms

LIMITS = {
    torch.float32: {"sensitivities": 1e-4, "second moments": 1e-4, "ranks": 0, "apart": 1e-3},
    # The passes themselves round to 16 bits, in a device-specific order.
    torch.bfloat16: {"sensitivities": 1e-2, "second moments": 3e-2, "ranks": 2, "apart": 1e-2},
}
PRODUCTS = {"bfloat16 by bfloat16": 1e-5, "three terms": 2e-6}

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
Batch = dict[str, torch.Tensor]


def make_batches(device: str) -> list[Batch]:
    """Return 16 samples in batches of four, with every other sample padded."""
    ids = torch.randint(0, 512, (16, 48), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[::2, 30:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    rows = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return [{k: v[i : i + 4].to(device) for k, v in rows.items()} for i in range(0, 16, 4)]


def planned(
    base: LlamaForCausalLM, device: str, dtype: torch.dtype
) -> tuple[Calibration, AdapterPlan]:
    """Calibrate, plan, attach and run backward on ``device``; return the results."""
    model = copy.deepcopy(base).to(device, dtype)
    batches, config = make_batches(device), TLoraConfig(r=16, lora_alpha=16)
    statistics = calibrate(model, batches, config)
    found = plan(model, statistics, config)
    before = model(**batches[0]).logits
    adapted = attach(model, found)
    outputs = adapted(**batches[0])
    if not torch.equal(before, outputs.logits):
        raise SystemExit(f"{device}: the adapted model's output differs from the base's")
    outputs.loss.backward()
    trained = [name for name, p in adapted.named_parameters() if p.grad is not None]
    if not trained or not all("lora_B" in name for name in trained):
        raise SystemExit(f"{device}: gradients reached {trained}")
    return statistics, found


def compared(base: LlamaForCausalLM, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Return the differences between the CPU and ``device``; "apart" is 1 - smallest overlap."""
    (stats, found), (other_stats, other) = (planned(base, each, dtype) for each in ("cpu", device))
    apart = dict.fromkeys(LIMITS[dtype], 0.0)
    for name, one in stats.modules.items():
        there = other_stats.modules[name]
        moment = one.covariance()
        a, b = found.modules[name].lora_A, other.modules[name].lora_A
        overlap = torch.linalg.svdvals(a @ b.T).square().sum().item() / min(len(a), len(b))
        new = {
            "sensitivities": abs(there.sensitivity / one.sensitivity - 1),
            "second moments": ((moment - there.covariance().cpu()).norm() / moment.norm()).item(),
            "apart": 1 - overlap,
        }
        apart = {key: max(value, new.get(key, 0.0)) for key, value in apart.items()}
        apart["ranks"] += len(a) != len(b)
    return apart


def errors_of_products(device: str) -> dict[str, float]:
    """Return the relative errors of products on ``device`` against float64."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(1024, 512, generator=generator).to(device) for _ in range(2))
    narrow = left.bfloat16()
    found = {
        "bfloat16 by bfloat16": (product(narrow.T, narrow), narrow, narrow),
        "three terms": (
            product_of_terms([part.T for part in terms(left, 3)], terms(right, 3)),
            left,
            right,
        ),
    }
    return {
        name: ((got - a.double().T @ b.double()).norm() / (a.double().T @ b.double()).norm()).item()
        for name, (got, a, b) in found.items()
    }


def repeats(base: LlamaForCausalLM, device: str, dtype: torch.dtype) -> bool:
    """Return whether the same seed gives a bit-identical plan again on a device."""
    model = copy.deepcopy(base).to(device, dtype)
    config = TLoraConfig(r=16, lora_alpha=16)
    one, other = (made_plan(model, make_batches(device), config) for _ in range(2))
    return all(torch.equal(one.modules[n].lora_A, other.modules[n].lora_A) for n in one)


def seconds(function: Callable[[], object], device: str, repeats: int = 10) -> float:
    """Return the mean time of a call after a warm-up call."""
    for count in (1, repeats):
        start = time.perf_counter()
        for _ in range(count):
            function()
        if device == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def sensitivity_costs(device: str, m: int, d: int, counts: tuple[int, ...]) -> None:
    """Print time, throughput and float64 error of each way to compute sensitivities."""
    generator = torch.Generator().manual_seed(2)
    weight, delta, x = (
        torch.randn(shape, generator=generator).bfloat16().to(device)
        for shape in ((m, d), (sum(counts), m), (sum(counts), d))
    )
    rows = Rows(delta, x, counts)
    ends = [0, *itertools.accumulate(counts)]
    exact = torch.stack(
        [
            (weight.double() * (delta[i:j].double().T @ x[i:j].double())).abs().sum()
            for i, j in itertools.pairwise(ends)
        ]
    )
    for name, function in (("kernel", fused_magnitude), ("batched", batched_magnitude)):
        taken = seconds(lambda function=function: function(weight, rows), device)
        error = (function(weight, rows) / exact - 1).abs().max().item()
        rate = 2e-12 * m * d * sum(counts) / taken
        print(f"{name}: {1e3 * taken:.2f} ms, {rate:.0f} TFLOP/s, error {error:.1e}")
    taken = seconds(lambda: product(delta.T, x), device)
    print(f"bare product: {1e3 * taken:.2f} ms, {2e-12 * m * d * sum(counts) / taken:.0f} TFLOP/s")


def main(words: Sequence[str] | None = None) -> None:
    """Print the differences; exit with 1 if one exceeds its limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args(words).device
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    beyond = _beyond("products", errors_of_products(device), PRODUCTS)
    for dtype, limits in LIMITS.items():
        beyond += _beyond(str(dtype), compared(base, device, dtype), limits)
        same = repeats(base, device, dtype)
        print(f"{dtype}: the same seed gives {'the same plan' if same else 'ANOTHER PLAN'}")
        beyond += [] if same else [f"{dtype}: the same seed gives another plan"]
    if device == "cuda":
        sensitivity_costs(device, 4096, 11008, (512,) * 4)
    if beyond:
        raise SystemExit("\n".join(beyond))


def _beyond(title: str, found: dict[str, float], limits: dict[str, float]) -> list[str]:
    print(f"{title}: {', '.join(f'{name} {value:.1e}' for name, value in found.items())}")
    return [
        f"{title}: {name} {value:.1e}, above {limits[name]:g}"
        for name, value in found.items()
        if not value <= limits[name]
    ]


if __name__ == "__main__":
    main()
