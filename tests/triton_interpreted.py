"""Runs every Triton kernel in Triton's interpreter on the CPU: python -m tests.triton_interpreted

Prints {"case dtype": [worst difference, where]} as JSON. A process of its own, because kernels are made for the
interpreter or the compiler once, when they are imported. bf16 is left to a card: the interpreter truncates it.
"""

from __future__ import annotations

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from lorafocal.ops.triton import TRITON
from tests.triton_cases import CASES, worst

DTYPES = (torch.float32, torch.float64)


def main() -> None:
    torch.set_num_threads(1)
    found = {f"{name} {dtype}": worst(case(TRITON, dtype, "cpu")) for name, case in CASES.items() for dtype in DTYPES}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
