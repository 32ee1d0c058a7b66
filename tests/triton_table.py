"""Writes the table of docs/kernels.md: python -m tests.triton_table

Registers a thread and bytes spilled of every kernel at Llama-3-8B's shape in bf16, from ptxas, without a GPU.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from tests.made_parts import made_anew

PAGE = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"
SHAPE = "Llama-3-8B"


def table() -> str:
    """Markdown, a kernel a row: warps a program, then registers and spills for each target."""
    from tests.triton_compiled import TARGETS, compiled, launches

    heads = [f"sm_{capability}" for capability in TARGETS]
    lines = ["| function | warps | " + " | ".join(heads) + " |", "|---|--:|" + "--:|" * len(heads)]
    with tempfile.TemporaryDirectory() as folder:
        for name, launch in launches(SHAPE, torch.bfloat16).items():
            told = [compiled(launch, capability, Path(folder)) for capability in TARGETS]
            cells = [f"{each.registers}, {each.spilled} B" for each in told]
            lines.append(f"| {name} | {launch.warps} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    import triton

    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        written = (
            f"Triton {triton.__version__}, {SHAPE}, bf16, packs of 4096 tokens: registers a thread, bytes spilled.\n\n"
        )
        written += table()
    PAGE.write_text(made_anew(PAGE.read_text(encoding="utf-8"), registers=written.splitlines()), encoding="utf-8")
    print(written)


if __name__ == "__main__":
    main()
