"""Attention over prefix-shared packs beside padded SDPA and FlexAttention with a prefix-sharing mask.

    python benchmarks/bench_attention.py [--device cuda] [--data ultrafeedback-like]

FlexAttention has no backward on a CPU: there its forward alone is measured, and the row says so.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import OURS, Benchmark, Case, Result, dtype_of, model_of, options, run, session, worker
from measuring import DTYPES, seconds
from shapes import SHAPES, config_of
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Lengths = list[tuple[int, int, int]]  # prompt, chosen, rejected


def measure(settings: dict[str, Any]) -> Result:
    """Pairs a second through one layer's attention: forward, and forward and backward where there is one."""
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    device, dtype = settings["device"], DTYPES[settings["dtype"]]
    lengths: Lengths = [tuple(row) for row in settings["lengths"]]
    config = config_of(settings["model"])
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    channels = getattr(config, "head_dim", None) or config.hidden_size // heads
    batch, rows, attend = ATTENTIONS[settings["attention"]](lengths, device)
    query, key, value = (
        torch.randn(batch, count, rows, channels, dtype=dtype, device=device, requires_grad=True)
        for count in (heads, groups, groups)
    )
    upstream = torch.randn_like(query)

    constant = (query.detach(), key.detach(), value.detach())

    def forward() -> Tensor:
        return attend(*constant)

    def both() -> None:
        torch.autograd.grad(attend(query, key, value), (query, key, value), upstream)

    times = settings["times"]
    rates = {"pairs/s, forward": len(lengths) / seconds(forward, device, times=times)}
    if settings["attention"] == "flex" and device == "cpu":
        return {**rates, "_note": "forward alone: FlexAttention has no backward on a CPU"}
    return {**rates, "pairs/s, forward and backward": len(lengths) / seconds(both, device, times=times)}


def _packed(lengths: Lengths, device: str) -> tuple[int, int, Attention]:
    """Ours, whichever it takes here: (batch, rows, function)."""
    from lorafocal.ops.attention import attend

    return _over_segments(attend, lengths, device)


def _segments(lengths: Lengths, device: str) -> tuple[int, int, Attention]:
    """The same packs, one SDPA call a segment."""
    from lorafocal.ops.attention import sdpa_shared_prefix_attention

    return _over_segments(sdpa_shared_prefix_attention, lengths, device)


def _over_segments(attend: Any, lengths: Lengths, device: str) -> tuple[int, int, Attention]:
    from lorafocal.ops.segments import PairSpan, Segments

    spans, start = [], 0
    for prompt, chosen, rejected in lengths:
        spans.append(PairSpan(start, prompt, chosen, rejected))
        start = spans[-1].stop
    segments = Segments.of(tuple(spans)).to(torch.device(device))

    def packed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, segments, scaling=query.shape[-1] ** -0.5)

    return 1, start, packed


def _padded(lengths: Lengths, device: str) -> tuple[int, int, Attention]:
    """Two rows a pair, padded to the longest, with the mask that transformers makes."""
    sequences = [p + c for p, c, _ in lengths] + [p + r for p, _, r in lengths]
    width = max(sequences)
    seen = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    there = torch.arange(width, device=device) < torch.tensor(sequences, device=device)[:, None]
    mask = seen & there[:, None, None, :]

    def padded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups = query.shape[1] // key.shape[1]  # repeated, as transformers does: with a mask no fast kernel has groups
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return scaled_dot_product_attention(query, key, value, attn_mask=mask)

    return len(sequences), width, padded


def _flex(lengths: Lengths, device: str) -> tuple[int, int, Attention]:
    """The same packs under one compiled mask: causal, within a pair, the rejected answer not on the chosen one."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    pairs = torch.tensor([pair for pair, row in enumerate(lengths) for _ in range(sum(row))], device=device)
    parts = torch.tensor([part for row in lengths for part, n in enumerate(row) for _ in range(n)], device=device)

    def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (pairs[q] == pairs[k]) & ~((parts[q] == 2) & (parts[k] == 1))

    rows = len(pairs)
    mask = create_block_mask(visible, None, None, rows, rows, device=device)
    compiled = torch.compile(flex_attention)
    return 1, rows, lambda query, key, value: compiled(query, key, value, block_mask=mask, enable_gqa=True)


ATTENTIONS = {"packed": _packed, "segments": _segments, "padded": _padded, "flex": _flex}
CASES = (
    (OURS, "packed", "prefix shared, two segments a pair"),
    ("torch", "segments", "SDPA, prefix shared, a call a segment"),
    ("torch", "padded", "SDPA, padded, each prompt twice"),
    ("torch", "flex", "FlexAttention, prefix shared, packed"),
)


def main(words: Sequence[str] | None = None) -> None:
    parser = options(argparse.ArgumentParser(description="attention over packs beside its peers"))
    parser.add_argument("--model", choices=tuple(SHAPES), help="default: tiny on a CPU, llama-3-8b on a GPU")
    parser.add_argument("--data", nargs="+", default=["256+2x384", "ultrafeedback-like"], help="distributions")
    parser.add_argument("--pairs", type=int, help="of a pack")
    given = parser.parse_args(words)
    at, gpu = session(given), given.device == "cuda"
    model, dtype = model_of(given), dtype_of(given)
    pairs = given.pairs or (8 if gpu else 2)
    for data in ["tiny"] if given.dry_run else given.data:
        lengths = drawn_lengths(data, pairs, at)
        common = {
            "model": model, "dtype": dtype, "device": given.device, "threads": given.threads, "lengths": lengths,
            "times": 1 if given.dry_run else 5,
        }  # fmt: skip
        cases = [Case(who, how, {**common, "attention": kind}, f"{pairs} pairs") for who, kind, how in CASES]
        better = {"pairs/s, forward": 1, "pairs/s, forward and backward": 1}
        run(Benchmark("bench_attention", {"model": model, "dtype": dtype, "data": data}, better), cases, at,
            name="attention")  # fmt: skip


def drawn_lengths(data: str, pairs: int, at: Any) -> Lengths:
    """Lengths of a distribution, or of a file of preferences."""
    from inputs import DISTRIBUTIONS

    with tempfile.TemporaryDirectory() as folder:
        place = data if data in DISTRIBUTIONS else str(Path(data).resolve())
        worker("inputs", {"folder": folder, "data": place, "pairs": pairs, "max_length": 1024, "vocabulary": 4096}, at)
        return json.loads((Path(folder) / "lengths.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
