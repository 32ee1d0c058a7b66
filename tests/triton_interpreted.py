"""Runs every Triton kernel in Triton's interpreter on the CPU: python -m tests.triton_interpreted

Prints {"case dtype": [worst difference, where]} as JSON, and under "a model DTYPE" what `fuse` says of one that it has
checked and fused with them; or {"interpreter": why} alone, where Triton's interpreter cannot run a plain loop.
A process of its own, because kernels are made for the interpreter or the compiler once, when they are imported. Cases
in bf16 are left to a card: the interpreter truncates it, by less than `fuse` allows.
"""

from __future__ import annotations

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy
import torch
import triton
import triton.language as tl

from lorafocal.errors import InputError
from lorafocal.model.fused import _Door
from lorafocal.ops.elementwise import TORCH
from lorafocal.ops.triton import TRITON
from tests.tiny import tiny_policy
from tests.triton_cases import CASES, worst

DTYPES = (torch.float32, torch.float64)


@triton.jit
def _count(out, stop):
    for i in range(stop):
        tl.store(out, i)


def broken() -> str | None:
    """Why this interpreter runs nobody's kernels, if so: that of Triton 3.6 cannot loop under numpy 2.4."""
    try:
        _count[(1,)](torch.zeros(1, dtype=torch.int32), 2)
    except triton.runtime.errors.InterpreterError as error:
        versions = f"Triton {triton.__version__} on numpy {numpy.__version__}"
        return f"a plain loop fails in the interpreter of {versions}: {error}"
    return None


def main() -> None:
    torch.set_num_threads(1)
    if why := broken():
        print(json.dumps({"interpreter": why}))
        return
    found = {f"{name} {dtype}": worst(case(TRITON, dtype, "cpu")) for name, case in CASES.items() for dtype in DTYPES}
    print(json.dumps(found | {f"a model {dtype}": checked(dtype) for dtype in (*DTYPES, torch.bfloat16)}, indent=1))


def checked(dtype: torch.dtype) -> str:
    door = _Door(tiny_policy(dtype=dtype), TORCH, recompute=False)
    door.functions = TRITON  # which `fuse` lets in on CUDA alone
    try:
        door.open()
    except InputError as refusal:
        return str(refusal)
    return str(door.report())


if __name__ == "__main__":
    main()
