"""What the Triton kernels are compared on: odd shapes and strides, each result beside its definition's.

A case takes the set of functions, a dtype and a device; `tests.triton_interpreted` runs them in Triton's interpreter,
`tests/ops/test_triton_gpu.py` on a card. Neither torch's definitions nor this file need Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lorafocal.ops.elementwise import TORCH, Elementwise
from lorafocal.ops.logps import LogitTransform, head_fold_

Pairs = Iterator[tuple[str, Tensor, Tensor]]  # (what, ours, the definition's)


class Draw:
    """Tensors of one dtype on one device, the same in every run."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.generator, self.dtype, self.device = torch.Generator().manual_seed(0), dtype, device

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(*shape, generator=self.generator, dtype=torch.float64) * scale
        return drawn.to(self.device, dtype or self.dtype)


def strided(draw: Draw, rows: int, width: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Two matrices in each of the ways they may lie in memory."""
    yield "dense", draw(rows, width, scale=3), draw(rows, width)
    yield "halves of one", *draw(rows, 2 * width, scale=3).chunk(2, dim=-1)
    yield "transposed", draw(width, rows, scale=3).T, draw(width, rows).T
    yield "every other row", draw(2 * rows, width)[::2], draw(2 * rows, width)[1::2]


def swiglu(ours: Elementwise, dtype: torch.dtype, device: str) -> Pairs:
    draw = Draw(dtype, device)
    for rows, width in ((1, 1), (3, 7), (2, 1024), (5, 1500)):
        for how, gate, up in strided(draw, rows, width):
            what = f"{rows}x{width} {how}"
            yield f"forward {what}", ours.swiglu(gate, up), TORCH.swiglu(gate, up)
            upstream = draw(rows, width)
            theirs = TORCH.swiglu_backward_(upstream.clone(), gate, up)
            got = ours.swiglu_backward_(upstream, gate, up)
            for name, one, other in zip(("product", "to_gate", "to_up"), got, theirs, strict=True):
                yield f"{name} {what}", one, other
    extreme = torch.tensor([[-1e4, -200.0, -30.0, 0.0, 30.0, 200.0, 1e4]], dtype=dtype, device=device)
    yield "far gates", ours.swiglu(extreme, torch.ones_like(extreme)), TORCH.swiglu(extreme, torch.ones_like(extreme))
    ones = torch.ones_like(extreme)
    theirs = TORCH.swiglu_backward_(ones.clone(), extreme, ones)
    yield "to far gates", ours.swiglu_backward_(ones.clone(), extreme, ones)[1], theirs[1]


def rms_norm(ours: Elementwise, dtype: torch.dtype, device: str) -> Pairs:
    draw = Draw(dtype, device)
    for rows, width in ((1, 1), (4, 5), (3, 128), (2, 4096), (2, 4500)):
        for how, x, upstream in strided(draw, rows, width):
            for weight in (draw(width), draw(width, dtype=torch.promote_types(dtype, torch.float32))):
                what = f"{rows}x{width} {how}, weight {weight.dtype}"
                y, rstd = ours.rms_norm(x, weight, 1e-5)
                theirs, their_rstd = TORCH.rms_norm(x, weight, 1e-5)
                yield f"y {what}", y, theirs
                yield f"rstd {what}", rstd, their_rstd
                to_x = TORCH.rms_norm_backward(upstream, x, weight, their_rstd)
                yield f"to_x {what}", ours.rms_norm_backward(upstream, x, weight, their_rstd), to_x


def rope(ours: Elementwise, dtype: torch.dtype, device: str) -> Pairs:
    draw = Draw(dtype, device)
    for tokens, heads, width in ((1, 1, 2), (3, 5, 6), (4, 3, 80), (2, 32, 128)):
        cos, sin = draw(tokens, width), draw(tokens, width)  # any numbers: halves need not be alike
        for how, x in (
            ("dense", draw(tokens, heads, width)),
            ("heads first", draw(heads, tokens, width).transpose(0, 1)),
            ("part of a wider product", draw(tokens, heads + 2, width)[:, 1 : heads + 1]),
            ("width first", draw(width, heads, tokens).transpose(0, 2)),
        ):
            what = f"{tokens}x{heads}x{width} {how}"
            yield f"forward {what}", ours.rope(x, cos, sin), TORCH.rope(x, cos, sin)
            yield f"backward {what}", ours.rope_backward(x, cos, sin), TORCH.rope_backward(x, cos, sin)


TRANSFORMS = [LogitTransform(), LogitTransform(scale=0.3), LogitTransform(softcap=3.0), LogitTransform(2.0, 5.0)]


def head_fold(ours: Elementwise, dtype: torch.dtype, device: str) -> Pairs:
    """`dtype` is the error's; logits are fp32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    draw = Draw(wide, device)
    for rows, width in ((1, 1), (3, 5), (4, 97), (5, 4109)):
        for transform in TRANSFORMS:
            logits = draw(rows, width, scale=4)
            labels = torch.tensor([0, width - 1, width // 2, 1, 2], device=device)[:rows] % width
            yield from _folds(ours, logits, labels, dtype, transform, f"{rows}x{width} {transform}")
    far = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4 + 1, -1e4], [-torch.inf, 2.0, 3.0]], dtype=wide, device=device)
    yield from _folds(ours, far, torch.tensor([0, 1, 2], device=device), dtype, LogitTransform(), "far apart")


def _folds(
    ours: Elementwise, logits: Tensor, labels: Tensor, dtype: torch.dtype, transform: LogitTransform, what: str
) -> Pairs:
    theirs = head_fold_(logits.clone(), labels, logits.dtype, transform)
    alone = ours.head_fold_(logits.clone(), labels, None, transform)
    assert alone.error is None
    yield f"logps alone {what}", alone.logps, theirs.logps
    for asked in (dtype, logits.dtype):
        fold = ours.head_fold_(logits.clone(), labels, asked, transform)
        assert fold.error is not None
        assert fold.error.dtype == asked
        assert torch.equal(fold.logps, alone.logps), what  # to the last bit
        yield f"logps {what}", fold.logps, theirs.logps
        yield f"gradient {what}", fold.error.to(logits.dtype) * fold.factor, theirs.error * theirs.factor
    expected, found = (torch.empty_like(theirs.logps) for _ in range(2))
    head_fold_(logits.clone(), labels, None, transform, expected)
    beside = ours.head_fold_(logits.clone(), labels, dtype, transform, found)
    yield f"collisions {what}", found, expected
    assert torch.equal(beside.logps, alone.logps), what


CASES: dict[str, Callable[[Elementwise, torch.dtype, str], Pairs]] = {
    "swiglu": swiglu,
    "rms_norm": rms_norm,
    "rope": rope,
    "head_fold": head_fold,
}


def worst(pairs: Pairs) -> tuple[float, str]:
    """The largest difference relative to the largest entry of the definition's result, and where it is."""
    found = [(_difference(ours, theirs), what) for what, ours, theirs in pairs]
    assert found
    return max(found)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    gap, size = (ours.double() - theirs.double()).abs().max(), theirs.double().abs().max()
    return float(gap / size.clamp(min=1.0)) if gap.isfinite() else float("inf")
