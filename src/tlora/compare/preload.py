"""What the runs of a comparison import before they do anything else, for the fork server.

Importing starts no thread, so the process that has imported this may fork. It should not touch a
GPU either; `use_gpu` tells whether some library did.
"""

from typing import Any

import datasets  # noqa: F401
import peft  # noqa: F401
import scipy.stats  # noqa: F401
import sklearn.metrics  # noqa: F401
import torch
import transformers  # noqa: F401
import trl  # noqa: F401

import tlora.adapter.attach  # noqa: F401
import tlora.compare.onerun  # noqa: F401
import tlora.training.train  # noqa: F401


def use_gpu(_: dict[str, Any]) -> None:
    """Use the GPU; fails in a process forked from one that had woken the driver."""
    torch.zeros(1, device="cuda")
