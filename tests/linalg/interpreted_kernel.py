"""Compare the kernel, run by Triton's interpreter, with the float64 definition; see test_kernels.

The interpreter multiplies the bit patterns of bfloat16 in `tl.dot`, so bfloat16 rows are left out:
bfloat16 weights are read and converted like any.
"""

import itertools
import json
import sys

import torch

from tlora.linalg import kernels
from tlora.linalg.gradients import Rows, batched_magnitude, fused_magnitude

SHAPES = {
    (144, 272): (64, 0, 33),
    (13, 7): (1,),
    (1030, 24): (3, 3, 3),  # more tiles of rows than run side by side
}
WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs() / expected.clamp_min(1e-30)).max().item()


def compare(shape: tuple[int, int], rows_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    counts, generator = SHAPES[shape], torch.Generator().manual_seed(0)
    delta, x = (torch.randn(sum(counts), size, generator=generator) for size in shape)
    delta[:, 2] *= 1e4
    x[0] *= 1e4
    # Transposed in memory for every other dtype, as Conv1D stores it.
    weight = torch.randn(shape, generator=generator).to(weight_dtype)
    weight = weight.T.contiguous().T if weight_dtype == torch.bfloat16 else weight
    rows = Rows(delta.to(rows_dtype), x.to(rows_dtype), counts)
    each = zip(rows.delta.double().split(counts), rows.x.double().split(counts), strict=True)
    expected = torch.stack([(weight.double() * (d.T @ x)).abs().sum() for d, x in each])
    found = fused_magnitude(weight, rows)
    case = {
        "case": f"{shape} {rows_dtype} {weight_dtype}",
        "error": far(found.double(), expected),
        "from torch path": far(found, batched_magnitude(weight, rows)),
        "same again": torch.equal(found, fused_magnitude(weight, rows)),
    }
    sys.stdout.write(json.dumps(case) + "\n")


for each in itertools.product(SHAPES, (torch.float32, torch.float16), WEIGHTS):
    compare(*each)
kernels._tiles = lambda _: kernels._HOPPER
compare((144, 272), torch.float16, torch.float16)
