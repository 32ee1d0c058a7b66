"""Runs every Triton kernel in Triton's interpreter on the CPU: python -m tests.triton_interpreted

Prints {"case dtype": [worst difference, where]} as JSON, and under "a model DTYPE" what `fuse` says of one that it has
checked and fused with them. A process of its own, because kernels are made for the interpreter or the compiler once,
when they are imported. Cases in bf16 are left to a card: the interpreter truncates it, by less than `fuse` allows.
"""

from __future__ import annotations

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from lorafocal.errors import InputError
from lorafocal.model.fused import _Door
from lorafocal.ops.elementwise import TORCH
from lorafocal.ops.triton import TRITON
from tests.tiny import tiny_policy
from tests.triton_cases import CASES, worst

DTYPES = (torch.float32, torch.float64)


def main() -> None:
    torch.set_num_threads(1)
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
