"""What attends in packs, and why: on a GPU torch's variable-length kernel, or flash-attn 2, 3 or 4 where installed.

None is a dependency. A wheel that does not import, lacks what the model asks for, or computes something else (masks
aligned at the top left, windows counted otherwise) is passed over with one line, and each segment is then one call of
torch's SDPA, or of a plain softmax where scores are capped or have sinks. On a CPU, in fp32 or wider, blocks of rows
attend where scores are neither.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from lorafocal.errors import ran_out
from lorafocal.ops.plain_attention import causal_mask, softmax_attention
from lorafocal.versions import installed

HALF = (torch.bfloat16, torch.float16)
WIDE = (torch.float32, torch.float64)

# What a broken build raises when it is imported or called: compilers of kernels have classes of their own.
BROKEN: tuple[type[Exception], ...] = (Exception,)


@dataclass(frozen=True, slots=True)
class Needs:
    """What a model asks of its attention beyond causal masks."""

    window: bool = False
    softcap: bool = False
    sinks: bool = False


@dataclass(frozen=True)
class Kernel:
    """A library's variable-length function behind one signature; what it takes is read off its own."""

    name: str
    function: Callable[..., Any]

    @cached_property
    def _takes(self) -> dict[str, Any]:
        return {name: given.default for name, given in inspect.signature(self.function).parameters.items()}

    def lacks(self, needs: Needs) -> str:
        """What it has no argument for, in words; "" where it has all."""
        asked = (
            (needs.window, "window_size", "windows"),
            (needs.softcap, "softcap", "soft-capped scores"),
            (needs.sinks, "learnable_sink", "sinks"),
        )
        return ", ".join(words for wanted, name, words in asked if wanted and name not in self._takes)

    def __call__(
        self,
        query: Tensor,  # (T, H, D)
        key: Tensor,  # (K, H_kv, D)
        value: Tensor,  # (K, H_kv, D)
        query_bounds: Tensor,  # (S + 1,) int32
        key_bounds: Tensor,  # (S + 1,) int32
        longest_query: int,
        longest_key: int,
        *,
        scaling: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of S segments, masks aligned at the bottom right: (T, H, D)."""
        takes = self._takes
        bounds, longest = ("cu_seqlens_", "max_seqlen_") if "cu_seqlens_q" in takes else ("cu_seq_", "max_")
        options: dict[str, Any] = {
            f"{bounds}q": query_bounds,
            f"{bounds}k": key_bounds,
            f"{longest}q": longest_query,
            f"{longest}k": longest_key,
        }
        options |= dict.fromkeys(takes.keys() & {"causal", "is_causal"}, True)
        if "window_size" in takes:
            unlimited = takes["window_size"][0]  # -1, or None in flash-attn 4
            options["window_size"] = (unlimited if window is None else window - 1, 0)
        if "deterministic" in takes:
            options["deterministic"] = torch.are_deterministic_algorithms_enabled()
        if softcap is not None:
            options["softcap"] = softcap
        if sinks is not None:
            options["learnable_sink"] = sinks.to(query.dtype)
        if scale := takes.keys() & {"scale", "softmax_scale"}:
            options |= dict.fromkeys(scale, scaling)
        else:
            query = query * (scaling * query.shape[-1] ** 0.5)
        if query.shape[1] != key.shape[1] and "enable_gqa" in takes:  # without the word, groups are always taken
            options["enable_gqa"] = True
        out = self.function(query, key, value, **options)
        return out[0] if isinstance(out, tuple) else out


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """What attends in packs: `function`, or None for blocks of rows (`ROW_BLOCKS`) and for a call a segment; `reason`
    is one line."""

    name: str
    function: Kernel | None
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose(
    device: torch.device,
    dtype: torch.dtype,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    head_dim: int = 64,
) -> KernelChoice:
    """The attention of packs on `device`; looked for and checked once, then remembered."""
    return _choose(device, dtype, head_dim, Needs(window is not None, softcap is not None, sinks))


def all_of(layers: Iterable[KernelChoice]) -> KernelChoice:
    """What attends in these layers: all names and reasons where they differ, as each calls its own."""
    found = [*dict.fromkeys(layers)]
    if len(found) == 1:
        return found[0]
    names, reasons = (dict.fromkeys(words) for words in zip(*((one.name, one.reason) for one in found), strict=True))
    return KernelChoice(" and ".join(names), None, "; ".join(reasons))


ROW_BLOCKS = KernelChoice("blocks of rows", None, "on cpu")


@cache
def _choose(device: torch.device, dtype: torch.dtype, head_dim: int, needs: Needs) -> KernelChoice:
    if device.type == "cpu" and dtype in WIDE and not (needs.softcap or needs.sinks):
        return ROW_BLOCKS
    if device.type != "cuda":
        return a_call_a_segment(needs, f"on {device.type}")
    if dtype not in HALF:
        return a_call_a_segment(needs, f"{str(dtype).removeprefix('torch.')}: variable-length kernels are for 16 bits")
    return first_that_works(sources(torch.cuda.get_device_capability(device)), device, dtype, head_dim, needs)


def a_call_a_segment(needs: Needs, reason: str) -> KernelChoice:
    written_out = needs.softcap or needs.sinks
    return KernelChoice("softmax per segment" if written_out else "SDPA per segment", None, reason)


Source = Callable[[], Kernel]


def sources(capability: tuple[int, int]) -> Sequence[Source]:
    """Kernels in the order they are tried. flash-attn 3 is written for Hopper, 4 for what came after it."""
    if capability[0] == 9:
        return flash_attn_3, torch_varlen, flash_attn_2, flash_attn_4
    if capability[0] >= 10:
        return flash_attn_4, torch_varlen, flash_attn_2
    return torch_varlen, flash_attn_2


def torch_varlen() -> Kernel:
    return Kernel(f"torch {torch.__version__} varlen", importlib.import_module("torch.nn.attention.varlen").varlen_attn)


def flash_attn_2() -> Kernel:
    library = importlib.import_module("flash_attn")
    version = library.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 1):
        raise ImportError(f"{version} aligns causal masks at the top left; 2.1 or newer is needed")
    return Kernel(f"flash-attn {version}", library.flash_attn_varlen_func)


def flash_attn_3() -> Kernel:
    function = importlib.import_module("flash_attn_interface").flash_attn_varlen_func
    return Kernel(f"flash-attn {installed('flash-attn-3') or 3}", function)


def flash_attn_4() -> Kernel:
    function = importlib.import_module("flash_attn.cute").flash_attn_varlen_func
    return Kernel(f"flash-attn {installed('flash-attn-4') or 4}", function)


def first_that_works(
    found: Sequence[Source], device: torch.device, dtype: torch.dtype, head_dim: int, needs: Needs
) -> KernelChoice:
    """The first kernel that imports, has what is needed and computes it; the reason names those passed over."""
    passed: list[str] = []
    for source in found:
        try:
            kernel = source()
        except BROKEN as error:
            if not _absent(error):
                passed.append(f"{source.__name__.replace('_', '-')} does not load: {_one_line(error)}")
            continue
        fault = kernel.lacks(needs)
        fault = (
            f"has no {fault}" if fault else check_bottom_right(kernel, device, dtype, head_dim=head_dim, needs=needs)
        )
        if not fault:
            return KernelChoice(kernel.name, kernel, "; ".join(["checked on this device", *passed]))
        passed.append(f"{kernel.name} {fault}")
    return a_call_a_segment(needs, "; ".join(passed) or "no variable-length kernel is installed")


def _absent(error: Exception) -> bool:
    """Whether a library is just not there, which is no news."""
    names = ("torch.nn.attention.varlen", "flash_attn", "flash_attn_interface", "flash_attn.cute")
    return isinstance(error, ModuleNotFoundError) and error.name in names


def _one_line(error: Exception) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 160 else words[:157] + "..."


# Queries and keys of the segments that are tried. Some backends are chosen by length, so one is long.
TRIED = ((3, 7), (5, 5), (1, 4), (130, 200))
TRIED_WINDOW = 3


def check_bottom_right(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, *, head_dim: int = 64, needs: Needs = Needs()
) -> str:
    """What is wrong with a kernel on a device, "" if nothing: values and gradients against the definition.

    Fewer queries than keys must be the last ones of the sequence, and a window of W must show W keys.
    """
    for window in (None, TRIED_WINDOW) if needs.window else (None,):
        try:
            with autograd_anywhere():
                error = _distance(kernel, device, dtype, head_dim, needs, window)
        except BROKEN as problem:
            if ran_out(problem):  # says nothing of the kernel
                raise
            return f"does not run here: {_one_line(problem)}"
        if not error <= (0.05 if dtype in HALF else 1e-4):
            kind = f"a window of {window}" if window else "causal masks aligned at the bottom right"
            return f"does not compute {kind} (off by {error:.2g})"
    return ""


def _distance(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int, needs: Needs, window: int | None
) -> float:
    """The largest relative distance of a segment's output or gradients from the definition."""
    options: dict[str, Any] = {"scaling": head_dim**-0.5, "softcap": 2.0 if needs.softcap else None}
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, heads: int) -> Tensor:
        return torch.randn(rows, heads, head_dim, generator=generator).to(device, dtype)

    queries, keys = (list(lengths) for lengths in zip(*TRIED, strict=True))
    inputs = [random(sum(queries), 4), random(sum(keys), 2), random(sum(keys), 2)]
    upstream = random(sum(queries), 4)
    sinks = torch.tensor([-1.0, 0.0, 0.5, 2.0], device=device) if needs.sinks else None

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = zip(query.split(queries), key.split(keys), value.split(keys), strict=True)
        return torch.cat([segment(*part) for part in parts])

    def segment(*part: Tensor) -> Tensor:
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in part)
        seen = causal_mask(q.shape[2], k.shape[2], window, device)
        return softmax_attention(q, k, v, seen, sinks=sinks, **options)[0].transpose(0, 1)

    def bounds(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device)

    def theirs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        places = bounds(queries), bounds(keys), max(queries), max(keys)
        return kernel(query, key, value, *places, window=window, sinks=sinks, **options)

    exact = _value_and_gradients(ours, [tensor.float() for tensor in inputs], upstream.float())
    given = _value_and_gradients(theirs, inputs, upstream)
    lengths = (queries, queries, keys, keys)
    return max(
        float((a.float() - b).norm() / b.norm())
        for x, y, sizes in zip(given, exact, lengths, strict=True)
        for a, b in zip(x.split(sizes), y.split(sizes), strict=True)
    )


def _value_and_gradients(attend: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    with torch.autocast(upstream.device.type, enabled=False):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        out = attend(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@contextmanager
def autograd_anywhere() -> Iterator[None]:
    """Within, gradients are recorded, even inside a custom operator or where the caller wants none."""
    key = torch._C.DispatchKey.AutogradFunctionality
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch._C._SetExcludeDispatchKeyGuard(key, False),
    ):
        yield
