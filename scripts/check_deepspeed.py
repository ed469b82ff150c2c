"""Compare ZeRO-2 and ZeRO-3 with one process, using real DeepSpeed; run it with torchrun::

    pip install deepspeed
    torchrun --standalone --nproc_per_node 2 scripts/check_deepspeed.py

`tests/distributed/test_deepspeed.py` runs it if DeepSpeed is installed. On a CPU, DeepSpeed uses
gloo and compiles an extension at its first start. For each stage and each distribution of five
samples, the script prints the largest relative difference of a sensitivity and of a second moment,
the smallest overlap of a subspace, and whether all processes have the same plan.
"""

from __future__ import annotations

import hashlib
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from tlora import AdapterPlan, Calibration, TLoraConfig, calibrate, plan

BASE = str(files("tlora.demo") / "base")
CONFIG = TLoraConfig(r=4)
DEALT = {"3 and 2 samples": [[0, 1, 2], [3, 4]], "5 and none": [[0, 1, 2, 3, 4], []]}


def load() -> Any:
    """Return the shipped base model."""
    return transformers.AutoModelForCausalLM.from_pretrained(BASE).eval()


def samples() -> list[dict[str, torch.Tensor]]:
    """Return five short samples of different lengths."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 40, (1, n), generator=generator) for n in (7, 3, 10, 5, 12)]
    return [{"input_ids": text, "labels": text} for text in texts]


def engine(stage: int) -> Any:
    """Return the base model in a DeepSpeed engine; stage 3 keeps no parameter gathered."""
    import deepspeed

    model = load()
    made, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    return made


def compare(found: Calibration, expected: Calibration) -> tuple[float, float]:
    """Return the largest relative difference of a sensitivity, and of a second moment."""
    sensitivity = moment = 0.0
    for name, module in expected.modules.items():
        other = found.modules[name]
        want = module.sensitivity
        sensitivity = max(sensitivity, abs(other.sensitivity - want) / want)
        covariance = module.covariance()
        apart = (other.covariance() - covariance).norm() / covariance.norm()
        moment = max(moment, apart.item())
    return sensitivity, moment


def overlap(found: AdapterPlan, expected: AdapterPlan) -> float:
    """Return the smallest mean squared overlap of two subspaces of a module."""
    pairs = [(m.lora_A, expected.modules[name].lora_A) for name, m in found.modules.items()]
    return min(((a @ b.T).square().sum() / len(b)).item() for a, b in pairs if len(a) == len(b))


def digest(found: AdapterPlan) -> str:
    """Return a hash of a plan as it is saved."""
    with tempfile.TemporaryDirectory() as folder:
        return hashlib.sha256(Path(found.save(folder)).read_bytes()).hexdigest()


def main() -> None:
    """Compare, and print on the first process."""
    import deepspeed

    # Before the process group exists: a single process.
    expected = calibrate(load(), samples(), CONFIG)
    planned = plan(load(), expected, CONFIG)
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
    for stage in (2, 3):
        for title, dealt in DEALT.items():
            made = engine(stage)
            own = [samples()[i] for i in dealt[dist.get_rank()]]
            stats = calibrate(made, own, CONFIG)
            found = plan(made, stats, CONFIG)
            digests: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(digests, digest(found))
            sensitivity, moment = compare(stats, expected)
            if dist.get_rank() == 0:
                print(
                    f"ZeRO-{stage}, {title}: sensitivities within {sensitivity:.1e}, second"
                    f" moments within {moment:.1e}, overlap {overlap(found, planned):.6f}, one"
                    f" plan: {len(set(digests)) == 1}"
                )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
