"""What a process of a sharded model holds; the function runs in every process at once."""

from __future__ import annotations

from typing import Any

import torch
from jobs import load, sharded
from torch.distributed.tensor import DTensor

from support import causal_samples
from tlora import TLoraConfig, get_tlora_model
from tlora.calibration.placement import local_part


def held(folder: str, rank: int) -> dict[str, int]:
    """Attach, shard, take a step; return the bytes that this process holds of each thing."""
    sample = causal_samples()[0]
    config = TLoraConfig(r=rank, lora_alpha=rank, allocate_rank=False, task_type="CAUSAL_LM")
    # Each process plans for itself: the statistics of a group would be of samples dealt out.
    adapted = get_tlora_model(load(folder), config, [sample], progress=False)
    sharded(adapted.base_model.model)
    parameters = [*adapted.parameters()]
    assert all(isinstance(p, DTensor) for p in parameters)
    trained = [p for p in parameters if p.requires_grad]
    adapted(**sample).loss.backward()
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    states = [v for each in optimizer.state.values() for n, v in each.items() if n != "step"]
    return {
        "weights": size(parameters),
        "gradients": size([p.grad for p in trained]),
        "optimizer": size(states),
    }


def size(tensors: list[Any]) -> int:
    return sum(local_part(tensor).nbytes for tensor in tensors)
