"""Compare calibration and planning on a GPU with the same on the CPU, on a small random Llama.

    python scripts/check_gpu.py

Prints, for float32 and bfloat16, the largest relative difference of sensitivities and of second
moments, how many ranks differ, and the least overlap of a module's subspaces (1: the same). Stops
where the adapted model's output is not the base's to the bit, or anything but B gets a gradient.
Then, for the down_proj of Llama-2-7B and 4 samples of 512 tokens in bfloat16, what sum |W * G_s|
costs by the Triton kernel and by batched products, beside the bare product of all tokens.
"""

import copy
import itertools
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tlora import AdapterPlan, Calibration, TLoraConfig, attach, calibrate, plan
from tlora.linalg.gradients import Rows, batched_magnitude, fused_magnitude
from tlora.linalg.products import product

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
    """Return 16 samples in batches of four, every other one padded."""
    ids = torch.randint(0, 512, (16, 48), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[::2, 30:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    rows = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return [{k: v[i : i + 4].to(device) for k, v in rows.items()} for i in range(0, 16, 4)]


def planned(
    base: LlamaForCausalLM, device: str, dtype: torch.dtype
) -> tuple[Calibration, AdapterPlan]:
    """Calibrate, plan, attach and step back on ``device``; return what was found."""
    model = copy.deepcopy(base).to(device, dtype)
    batches, config = make_batches(device), TLoraConfig(r=16, lora_alpha=16)
    statistics = calibrate(model, batches, config)
    found = plan(model, statistics, config)
    before = model(**batches[0]).logits
    adapted = attach(model, found)
    outputs = adapted(**batches[0])
    if not torch.equal(before, outputs.logits):
        raise SystemExit(f"{device}: the adapted model's output is not the base's")
    outputs.loss.backward()
    trained = [name for name, p in adapted.named_parameters() if p.grad is not None]
    if not trained or not all("lora_B" in name for name in trained):
        raise SystemExit(f"{device}: gradients reached {trained}")
    return statistics, found


def seconds(function: Callable[[], object], device: str, repeats: int = 10) -> float:
    """Return the mean time of a call after a first one."""
    for count in (1, repeats):
        start = time.perf_counter()
        for _ in range(count):
            function()
        if device == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def sensitivity_costs(device: str, m: int, d: int, counts: tuple[int, ...]) -> None:
    """Print time and rate of each way to sensitivities, and how far it is from float64."""
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


def main() -> None:
    """Print the differences, then the costs."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    for dtype in (torch.float32, torch.bfloat16):
        (stats, found), (stats_gpu, found_gpu) = (planned(base, d, dtype) for d in ("cpu", "cuda"))
        sensitivity = covariance = 0.0
        overlap, differ = 1.0, 0
        for name, one in stats.modules.items():
            other = stats_gpu.modules[name]
            sensitivity = max(sensitivity, abs(other.sensitivity / one.sensitivity - 1))
            moment = one.covariance()
            gap = (moment - other.covariance().cpu()).norm() / moment.norm()
            covariance = max(covariance, gap.item())
            a, b = found.modules[name].lora_A, found_gpu.modules[name].lora_A
            differ += len(a) != len(b)
            shared = torch.linalg.svdvals(a @ b.T).square().sum().item()
            overlap = min(overlap, shared / min(len(a), len(b)))
        print(
            f"{dtype}: sensitivities {sensitivity:.1e}, second moments {covariance:.1e},"
            f" {differ} ranks differ, subspaces overlap to {overlap:.5f}"
        )
    sensitivity_costs("cuda", 4096, 11008, (512,) * 4)


if __name__ == "__main__":
    main()
