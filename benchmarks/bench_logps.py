"""The head: log-probs of completion tokens from hidden states, forward and backward, and what they need of memory.

    python benchmarks/bench_logps.py [--device cuda]

Ours against TRL's chunked function (log-probs alone, none of its other outputs), all logits at once, and Liger's fused
linear cross-entropy, which has one gradient for a sum only. The head is frozen, as it is under LoRA.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from harness import OURS, Benchmark, Case, Result, Skip, dtype_of, options, run, session
from measuring import DTYPES, held_gib, peak_gib, product_peak, seconds, start_counting
from torch import Tensor

Head = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (N, D), weight (V, D), labels (N,) -> log-probs (N,)
TRL_COLUMNS = 32768  # of the vocabulary in one of its tiles


def measure(settings: dict[str, Any]) -> Result:
    """Tokens a second through forward and backward, and the memory above the inputs."""
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    device, dtype = settings["device"], DTYPES[settings["dtype"]]
    rows, width, vocabulary = settings["rows"], settings["width"], settings["vocabulary"]
    head = HEADS[settings["head"]](device)
    hidden = torch.randn(rows, width, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, device=device) * width**-0.5
    labels = torch.randint(vocabulary, (rows,), device=device)
    upstream = torch.randn(rows, device=device) if settings["head"] != "liger" else torch.ones(rows, device=device)

    def work() -> Tensor:
        hidden.grad = None
        logps = head(hidden, weight, labels)
        logps.backward(upstream if logps.ndim else None)
        return logps

    held = held_gib(device)
    start_counting(device)
    total = float(work().detach().double().sum())
    extra = peak_gib(device) - held
    taken = seconds(work, device, times=settings["times"], warmup=1)
    peak = product_peak([(2048, width, 4 * width), (2048, 4 * width, width)], dtype, device)
    share = 4 * rows * width * vocabulary / taken / peak  # two products are needed
    return {"tokens/s": rows / taken, "share of product peak": share, "extra GiB": max(extra, 0.0), "_total": total}


def _ours(device: str) -> Head:
    from lorafocal.ops.logps import token_logps

    return token_logps


def _ours_triton(device: str) -> Head:
    if device != "cuda":
        raise Skip("Triton's kernels need a GPU")
    from lorafocal.ops.elementwise import load
    from lorafocal.ops.logps import token_logps

    fold = load("triton").head_fold_
    return lambda hidden, weight, labels: token_logps(hidden, weight, labels, fold=fold)


def _trl(device: str) -> Head:
    if importlib.util.find_spec("trl.kernels") is None:
        raise Skip("this trl has no head in chunks")
    from trl.kernels import ChunkedLogProbFunction

    def head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, TRL_COLUMNS, None, 1.0, ())[0]

    return head


def _naive(device: str) -> Head:
    def head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(hidden, weight).float()
        return logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)

    return head


def _liger(device: str) -> Head:
    if importlib.util.find_spec("liger_kernel") is None:
        raise Skip("liger-kernel is not installed")
    if device != "cuda":
        raise Skip("Liger's kernels are Triton's, which need a GPU")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden, weight, labels: -loss(weight, hidden, labels)


HEADS: dict[str, Callable[[str], Head]] = {
    "ours": _ours, "ours, triton": _ours_triton, "trl": _trl, "naive": _naive, "liger": _liger,
}  # fmt: skip
CASES = (
    (OURS, "ours", "one pass, gradient in the forward"),
    (OURS, "ours, triton", "one pass, Triton fold"),
    ("trl", "trl", "chunked, tiles again in the backward"),
    ("torch", "naive", "all logits"),
    ("liger", "liger", "fused linear cross-entropy of a sum"),
)


def check_same(results: Sequence[Result]) -> None:
    totals = [r["_total"] for r in results]
    if max(abs(t / totals[0] - 1) for t in totals) > 0.01:
        raise SystemExit(f"the heads do not compute the same log-probs: sums {totals}")


def main(words: Sequence[str] | None = None) -> None:
    given = options(argparse.ArgumentParser(description="the log-prob head beside its peers")).parse_args(words)
    at, gpu = session(given), given.device == "cuda"
    width, vocabulary, rows = (4096, 128256, 8192) if gpu else (256, 32000, 2048)
    if given.dry_run:
        width, vocabulary, rows = 64, 512, 128
    dtype = dtype_of(given)
    common = {
        "device": given.device, "dtype": dtype, "rows": rows, "width": width, "vocabulary": vocabulary,
        "threads": given.threads, "times": 1 if given.dry_run else 5,
    }  # fmt: skip
    cases = [
        Case(who, how, {**common, "head": head}, f"{rows} tokens", tried="triton" in head) for who, head, how in CASES
    ]
    columns = {"model": f"head {width} x {vocabulary}", "dtype": dtype, "data": "random"}
    run(Benchmark("bench_logps", columns, {"tokens/s": 1, "extra GiB": -1}, check_same), cases, at, name="logps")


if __name__ == "__main__":
    main()
