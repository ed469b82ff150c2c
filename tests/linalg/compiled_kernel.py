"""Compile the kernel without a GPU, for rows of 16 bits, and say what it takes (test_kernels)."""

import inspect
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tlora.linalg import kernels

KERNEL = kernels._weighted_magnitudes
NAMES = list(inspect.signature(KERNEL.fn).parameters)
ALIGNED = ("weight", "delta", "x", "offsets", "parts", "m", "d", "weight_row")
DUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compile_for(capability: int, weight: str, tiles: tuple[int, ...]) -> None:
    blocks = dict(zip(("BM", "BN", "BK", "GROUP"), tiles, strict=True)) | {"weight_column": 1}
    types = {"weight": f"*{weight}", "delta": "*bf16", "x": "*bf16", "offsets": "*i32"}
    types["parts"] = "*fp32"
    source = ASTSource(
        KERNEL,
        {name: "constexpr" if name in blocks else types.get(name, "i32") for name in NAMES},
        {(NAMES.index(name),): value for name, value in blocks.items()},
        {(NAMES.index(name),): [["tt.divisibility", 16]] for name in ALIGNED},
    )
    made = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 8, "num_stages": kernels._STAGES},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [DUMP, "--dump-resource-usage", file.name]
        used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    case = {
        "capability": capability,
        "weight": weight,
        "shared": made.metadata.shared,
        "stack": max(int(each) for each in re.findall(r"STACK:(\d+)", used)),
        "tensor cores": bool(re.search(r"mma[._]", made.asm["ptx"])),
    }
    sys.stdout.write(json.dumps(case) + "\n")


for weight in ("bf16", "fp32"):
    for capability in (80, 86, 90, 100):
        compile_for(capability, weight, kernels._OTHERS)
compile_for(90, "bf16", kernels._HOPPER)
