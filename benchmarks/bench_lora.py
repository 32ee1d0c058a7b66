"""Adapted decoder layers, fused against PEFT: tokens/s forward and backward, bytes kept for the backward.

    python benchmarks/bench_lora.py [--device cuda] [--model llama-3-8b]

Both are the same model with the same adapter on all linear layers; attention is transformers' in both.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from harness import OURS, Benchmark, Case, Result, Skip, dtype_of, model_of, options, run, session
from measuring import DTYPES, SavedBytes, product_peak, seconds
from shapes import SHAPES, lora_config, random_base
from torch import Tensor


def measure(settings: dict[str, Any]) -> Result:
    """Tokens a second a layer, and the bytes that autograd keeps of a token in a layer."""
    from lorafocal.model.adapters import attach_lora
    from lorafocal.model.fused import fuse
    from lorafocal.model.head import causal_lm

    torch.set_num_threads(settings["threads"])
    device, dtype, layers = settings["device"], DTYPES[settings["dtype"]], settings["layers"]
    if settings["elementwise"] == "triton" and device != "cuda":
        raise Skip("Triton's kernels need a GPU")
    base = random_base(
        settings["model"], dtype=dtype, device=device, layers=layers, quantization=settings["quantization"]
    )
    torch.manual_seed(0)
    policy = attach_lora(base, lora_config())
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    note = ""
    if settings["fused"]:
        note = str(fuse(policy, settings["elementwise"], settings["recompute"]))
    body = causal_lm(policy).model
    x = torch.randn(1, settings["tokens"], base.config.hidden_size, dtype=dtype, device=device, requires_grad=True)
    upstream = torch.randn_like(x)

    def forward() -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16) if dtype == torch.bfloat16 else nullcontext():
            return body(inputs_embeds=x, use_cache=False).last_hidden_state

    def work() -> None:
        x.grad = None
        forward().backward(upstream)

    with SavedBytes([*policy.parameters(), x]) as saved:
        forward()
    per_token = saved.total / settings["tokens"] / layers
    taken = seconds(work, device, times=settings["times"], warmup=2)
    entries = sum(p.numel() for p in body.parameters() if p.requires_grad)
    linears = sum(p.numel() for n, p in body.named_parameters() if p.ndim == 2 and "embed" not in n) - entries
    if settings["quantization"]:
        linears *= 2  # two codes a byte
    hidden, inner = base.config.hidden_size, base.config.intermediate_size
    peak = product_peak([(2048, hidden, inner), (2048, inner, hidden)], dtype, device)
    share = (4 * linears + 6 * entries) * settings["tokens"] / taken / peak
    return {
        "tokens/s, a layer": settings["tokens"] * layers / taken,
        "saved KiB a token and layer": per_token / 1024,
        "share of product peak, attention not counted": share,
        "_grad": float(x.grad.double().norm()),
        "_note": note,
    }


def check_same(results: Sequence[Result]) -> None:
    norms = [r["_grad"] for r in results]
    if max(abs(norm / norms[0] - 1) for norm in norms) > 0.02:
        raise SystemExit(f"fused and PEFT's gradients differ: norms {norms}")


def main(words: Sequence[str] | None = None) -> None:
    parser = options(argparse.ArgumentParser(description="fused adapters beside PEFT's own"))
    parser.add_argument("--model", choices=tuple(SHAPES), help="default: tiny on a CPU, llama-3-8b on a GPU")
    given = parser.parse_args(words)
    at, gpu = session(given), given.device == "cuda"
    model, dtype = model_of(given), dtype_of(given)
    tokens = 64 if given.dry_run else 8192 if gpu else 2048
    common = {
        "model": model, "device": given.device, "dtype": dtype, "threads": given.threads,
        "layers": 2, "tokens": tokens, "quantization": None, "fused": True, "elementwise": "torch",
        "recompute": "none", "times": 1 if given.dry_run else 5,
    }  # fmt: skip
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        (OURS, "fused", {}),
        (OURS, "fused, gate and up again in the backward", {"recompute": "mlp"}),
        (OURS, "fused, Triton", {"elementwise": "triton"}),
        (OURS, "fused, NF4", {"quantization": "nf4"}),
        ("peft", "its own forward", {"fused": False}),
    ]
    for quantization in (None, "nf4"):
        named = [kind for kind in kinds if (kind[2].get("quantization") == "nf4") == (quantization == "nf4")]
        if quantization:
            named += [("peft", "its own forward, NF4", {"fused": False, "quantization": "nf4"})]
        cases = [
            Case(who, how, {**common, **more}, f"{tokens} tokens", tried="elementwise" in more)
            for who, how, more in named
        ]
        columns = {"model": model, "dtype": quantization or dtype, "data": "random"}
        better = {"tokens/s, a layer": 1, "saved KiB a token and layer": -1}
        run(Benchmark("bench_lora", columns, better, check_same), cases, at, name="lora")


if __name__ == "__main__":
    main()
