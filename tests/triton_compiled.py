"""Compiles what the library launches for GPUs that are not here, and reads registers and spills from ptxas.

Each function of the set is called on small tensors that stand for large ones; the launch is caught, its signature and
constants are read from the arguments, and the kernel is compiled for a target. So what is compiled is what is run.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from lorafocal.ops.logps import LogitTransform
from lorafocal.ops.triton import TRITON

TARGETS = (80, 89, 90)
ASSEMBLERS = sorted((Path(triton.__file__).parent / "backends/nvidia/bin").glob("ptxas*"))  # for older, newer PTX
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.int64: "i64"}


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with the arguments and constants it was launched with."""

    kernel: JITFunction
    arguments: dict[str, Any]
    warps: int

    @property
    def source(self) -> ASTSource:
        """Typed as a launch types it: pointers and strides that are multiples of 16 are told to be."""
        constants = [p.name for p in self.kernel.params if p.is_constexpr]
        signature, constexprs, hints = {}, {}, {}
        for number, (name, value) in enumerate(self.arguments.items()):
            if name in constants:
                signature[name], constexprs[name] = "constexpr", value
                continue
            pointer = isinstance(value, Tensor)
            signature[name] = f"*{TYPES[value.dtype]}" if pointer else "i32"
            if pointer or value % 16 == 0:
                hints[(number,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constexprs, hints)


@contextmanager
def caught() -> Iterator[list[Launch]]:
    """Within, no kernel runs: launches are noted down."""
    launches: list[Launch] = []

    def note(kernel: JITFunction, *given: Any, grid: Any, warmup: bool, num_warps: int, **constants: Any) -> None:
        names = [p.name for p in kernel.params]
        launches.append(Launch(kernel, dict(zip(names, given, strict=False)) | constants, num_warps))

    with mock.patch.object(JITFunction, "run", note):
        yield launches


def _calls(dtype: torch.dtype, hidden: int, inner: int, heads: int, vocabulary: int) -> dict[str, Callable[[], Any]]:
    """The functions of the set on meta tensors of one model's shape, packs of 4096 tokens."""
    tokens, width = 4096, hidden // heads

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def fold(transform: LogitTransform) -> Any:
        rows = 2**26 // vocabulary
        logits, labels = empty(rows, vocabulary, dtype=torch.float32), empty(rows, dtype=torch.int64)
        return TRITON.head_fold_(logits, labels, dtype, transform)

    x, gate, cos = empty(tokens, hidden), empty(tokens, inner), empty(tokens, width)
    turned, rstd = empty(tokens, heads, width), empty(tokens, dtype=torch.float32)
    return {
        "swiglu": lambda: TRITON.swiglu(gate, gate),
        "swiglu backward": lambda: TRITON.swiglu_backward_(gate, gate, gate),
        "rms_norm": lambda: TRITON.rms_norm(x, empty(hidden), 1e-5),
        "rms_norm backward": lambda: TRITON.rms_norm_backward(x, x, empty(hidden), rstd),
        "rms_norm backward, fp32 weight": lambda: TRITON.rms_norm_backward(
            x, x, empty(hidden, dtype=torch.float32), rstd
        ),
        "rope": lambda: TRITON.rope(turned, cos, cos),
        "rope backward": lambda: TRITON.rope_backward(turned, cos, cos),
        "head_fold": lambda: fold(LogitTransform()),
        "head_fold, soft-cap": lambda: fold(LogitTransform(0.5, 30.0)),
    }


SHAPES = {
    "Llama-3-8B": (4096, 14336, 32, 128256),
    "tiny": (32, 48, 4, 97),
}


def launches(shape: str, dtype: torch.dtype) -> dict[str, Launch]:
    """What each function of the set launches for a model's shape: by its name, and by theirs where there are two."""
    found = {}
    for name, call in _calls(dtype, *SHAPES[shape]).items():
        with caught() as noted:
            call()
        for launch in noted:
            kernel = launch.kernel.fn.__name__.strip("_")
            found[name if len(noted) == 1 else f"{name}: {kernel}"] = launch
    return found


@dataclass(frozen=True, slots=True)
class Compiled:
    """What ptxas says of a kernel: registers a thread, bytes spilled, shared memory in bytes."""

    registers: int
    spilled: int
    shared: int
    warps: int


def compiled(launch: Launch, capability: int, folder: Path) -> Compiled:
    """Compile for sm_<capability>; `folder` takes the PTX."""
    target = GPUTarget("cuda", capability, 32)
    kernel = triton.compile(launch.source, target=target, options={"num_warps": launch.warps})
    assert kernel.asm["cubin"]  # down to the machine's code
    said = _assembled(kernel.asm["ptx"], folder)
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", said)]
    registers = re.search(r"Used (\d+) registers", said)
    assert registers
    assert spills
    return Compiled(int(registers[1]), sum(spills), kernel.metadata.shared, launch.warps)


def _assembled(ptx: str, folder: Path) -> str:
    """What the first assembler that reads this PTX says of it."""
    source, target = folder / "kernel.ptx", re.search(r"\.target (sm_\w+)", ptx)
    assert target
    source.write_text(ptx)
    for ptxas in ASSEMBLERS:
        command = [ptxas, "-v", f"--gpu-name={target[1]}", source, "-o", folder / "kernel.cubin"]
        told = subprocess.run(command, capture_output=True, text=True)
        if told.returncode == 0:
            return told.stderr
    raise AssertionError(told.stderr)
