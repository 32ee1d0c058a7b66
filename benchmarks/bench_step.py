"""A training step beside its peers: pairs/s, model TFLOP/s, share of the matrix-product peak, peak memory.

    python benchmarks/bench_step.py --data pairs.jsonl --label my-pairs [--sweep] [--minutes 12]

See README.md in this folder for what is compared and how.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import OURS, Benchmark, Case, Result, Session, dtype_of, model_of, options, run, session, worker

PAIRS_PER_STEP = 8  # TRL's default step: one batch of 8
TOLERANCE = {"float32": 2e-4, "bfloat16": 0.05}  # of a loss near 0.7, at every step that is compared
COMPARED_STEPS = 3  # after that, roundings of Adam's first steps have grown
WITH_PASS = "pairs/s, reference pass included"  # as for one epoch
BETTER = {"pairs/s": 1, WITH_PASS: 1, "pairs/CPU s": 1, "peak GiB": -1}
TRIED = (  # off by default on a GPU, until they win here
    ("Triton's elementwise kernels", {"elementwise_kernels": "triton"}),
    ("compiled layers", {"compile_layers": True}),
)
MODELS = ("tiny", "stories-42m", "llama-3.2-1b", "mistral-7b", "llama-3-8b")


# ---- in the worker ------------------------------------------------------------------------------------------------


def measure(settings: dict[str, Any]) -> Result:
    """Train, and report time and memory of the steps after the warm-up."""
    import torch
    from measuring import DTYPES, peak_gib, product_peak, start_counting
    from trainers import TRAINERS, Job

    asked = dict(settings)
    implementation, warmup, threads = asked.pop("implementation"), asked.pop("warmup"), asked.pop("threads")
    cap_gib = asked.pop("cap_gib", None)
    torch.set_num_threads(threads)
    job = Job(**asked)
    if cap_gib is not None:
        whole = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(cap_gib / whole)
    start_counting(job.device)
    trained = TRAINERS[implementation](job)
    peak = peak_gib(job.device)  # before the products below, which take memory too
    wall_s, cpu_s = trained.watch.since(warmup)
    pairs = (job.steps - warmup) * job.pairs_per_step
    live = not job.precompute and job.reference != "cached"
    rates = {
        "pairs/s": pairs / wall_s,
        "pairs/CPU s": pairs / cpu_s,
        "tokens/s": trained.tokens / trained.pairs * pairs / wall_s,
        "peak GiB": peak,
    }
    if trained.reference_s:
        rates[WITH_PASS] = pairs / (wall_s + trained.reference_s * pairs / trained.pairs)
        rates["reference pass, pairs/s"] = trained.pairs / trained.reference_s
    elif live:
        rates[WITH_PASS] = rates["pairs/s"]
    flops, shapes = work_of(job, live=live)
    useful = flops * rates["pairs/s"]
    rates["model TFLOP/s"] = useful / 1e12
    rates["share of product peak"] = useful / product_peak(shapes, DTYPES[job.dtype], job.device)
    note = "; ".join(f"{name}: {value}" for name, value in trained.kernels.items())
    return {**rates, "_losses": trained.watch.losses, "_tokens": trained.tokens, "_note": note}


def work_of(job: Any, *, live: bool) -> tuple[float, list[tuple[int, int, int]]]:
    """Mean operations of a pair that the exact result needs, and the model's own matrix products at 2048 rows."""
    from inputs import read_lengths
    from shapes import config_of, lora_config

    from lorafocal import memory
    from lorafocal.memory import Lengths, Setup, Shape

    config = config_of(job.model)
    config.num_hidden_layers = job.layers or config.num_hidden_layers
    shape = Shape.of(config.to_dict())
    setup = Setup(dtype=job.dtype, r=lora_config().r, reference="disabled_adapter")
    lengths = [Lengths(*map(float, row)) for row in read_lengths(Path(job.folder))]
    flops = sum(memory.flops_per_pair(shape, setup, at, live_reference=live) for at in lengths) / len(lengths)
    hidden, inner = config.hidden_size, config.intermediate_size
    return flops, [(2048, hidden, inner), (2048, inner, hidden), (2048, hidden, hidden)]


# ---- cases --------------------------------------------------------------------------------------------------------


def ours(common: dict[str, Any], *, stored: bool, how: str = "", **more: Any) -> Case:
    reference = "cached" if stored else "disabled_adapter"
    words = how or f"packs, {'stored' if stored else 'live'} reference"
    settings = {**common, "implementation": OURS, "reference": reference, **more}
    return Case(OURS, words, settings, batch="packs, auto")


def peer(implementation: str, common: dict[str, Any], batch: int, **more: Any) -> Case:
    reference = "precomputed" if more.get("precompute") else "live"
    words = f"batch {batch}, {reference} reference" + (", checkpointing" if more.get("checkpointing") else "")
    settings = {**common, "implementation": implementation, "batch": batch, **more}
    return Case(implementation, words, settings, batch=f"{batch} pairs")


def best_of(cases: Sequence[Case], benchmark: Benchmark, at: Session) -> list[Case]:
    """The fastest of `cases` in pairs/s by one run each: of those with a live reference, and of those without."""
    print("short runs, to find the peer's best settings:", flush=True)
    found = run(benchmark, cases, replace(at, repeats=1), name="step_sweep")
    rates = [(results[0].get("pairs/s", 0.0), case) for case, results in zip(cases, found, strict=True)]
    best = []
    for precompute in (False, True):
        kind = [entry for entry in rates if bool(entry[1].settings.get("precompute")) is precompute]
        rate, case = max(kind, key=lambda entry: entry[0])
        best += [case] if rate else []
    return best


def check_same(dtype: str, results: Sequence[Result]) -> None:
    """All trained on the same tokens, and their losses agree at the first steps: so did their gradients."""
    for other in results[1:]:
        gaps = [abs(a - b) for a, b in zip(results[0]["_losses"], other["_losses"], strict=False)][:COMPARED_STEPS]
        if other["_tokens"] != results[0]["_tokens"] or not max(gaps, default=1.0) <= TOLERANCE[dtype]:
            shown = [(r["_tokens"], r["_losses"][:COMPARED_STEPS]) for r in (results[0], other)]
            raise SystemExit(f"the implementations do not compute the same thing: {shown[0]} and {shown[1]}")


def main(words: Sequence[str] | None = None) -> None:
    parser = options(argparse.ArgumentParser(description="a training step beside its peers"))
    parser.add_argument("--model", choices=MODELS, help="default: tiny on a CPU, llama-3-8b on a GPU")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--data", default="ultrafeedback-like", help="a distribution's name, or a file of preferences")
    parser.add_argument("--label", help="what the results call a file; its path is never recorded")
    parser.add_argument("--sweep", action="store_true", help="find TRL's best batch, live and precomputed, first")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 2, 1], help="tried; 8, the default's, is too")
    parser.add_argument("--peers", action="store_true", help="also TRL + Liger, PEFT by hand, unsloth")
    parser.add_argument("--steps", type=int, default=4, help=f"timed steps a run, of {PAIRS_PER_STEP} pairs each")
    parser.add_argument("--warmup", type=int, default=1, help="steps before the clock starts")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of prompt and one answer")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    given = parser.parse_args(words)
    if given.warmup < 1:
        parser.error("--warmup: the clock starts at the end of a step, so 1 or more")
    at = session(given)
    with tempfile.TemporaryDirectory() as folder:
        compare(given, folder, at)


def compare(given: argparse.Namespace, folder: str, at: Session) -> None:
    """Prepare the inputs, find the peers' best settings where asked, measure everything side by side."""
    from inputs import DISTRIBUTIONS

    model, dtype = model_of(given), given.dtype or dtype_of(given)
    data = "tiny" if given.dry_run else given.data
    label = data if data in DISTRIBUTIONS else given.label or "own data"
    pairs_per_step = 4 if given.dry_run else PAIRS_PER_STEP
    common = {
        "model": model, "dtype": dtype, "device": given.device, "threads": given.threads,
        "warmup": given.warmup, "pairs_per_step": pairs_per_step, "max_length": given.max_length,
        "layers": 2 if given.dry_run else given.layers,
    }  # fmt: skip

    def prepared(name: str, timed: int) -> dict[str, Any]:
        """Settings of runs with `timed` steps after the warm-up, and their inputs."""
        steps, place = timed + given.warmup, Path(folder, name)
        place.mkdir()
        source = data if data in DISTRIBUTIONS else str(Path(data).resolve())
        drawn = {"folder": str(place), "data": source, "pairs": steps * pairs_per_step, "max_length": given.max_length}
        clock = {"steps": (pairs_per_step, given.warmup)}
        means = worker("inputs", {**drawn, **clock, "vocabulary": vocabulary_of(model)}, at)
        print(f"{label}: {steps} steps of {pairs_per_step} pairs, {_tokens(means)}", flush=True)
        return {**common, "folder": str(place), "steps": steps}

    benchmark = Benchmark(
        "bench_step", {"model": model, "dtype": dtype, "data": label}, BETTER, lambda r: check_same(dtype, r)
    )
    best: list[Case] = []
    if given.sweep:
        short = prepared("short", 1)
        sizes = {size for size in given.batches if size <= pairs_per_step}
        grid = [peer("trl", short, size) for size in sorted(sizes)]
        grid += [peer("trl", short, size, precompute=True) for size in sorted(sizes | {pairs_per_step})]
        best = best_of(grid, benchmark, at)
    whole = prepared("whole", 1 if given.dry_run else given.steps)
    default = peer("trl", whole, pairs_per_step, checkpointing=given.device == "cuda")
    cases = [ours(whole, stored=False), ours(whole, stored=True), default]
    cases += [replace(case, settings={**case.settings, **whole}) for case in best if case.how != default.how]
    if given.peers:
        cases += [peer(name, whole, min(4, pairs_per_step)) for name in ("trl + liger", "peft by hand", "unsloth")]
    if given.device == "cuda":
        tried = [ours(whole, stored=True, how=f"packs, stored reference, {how}", more=more) for how, more in TRIED]
        cases += [replace(case, tried=True) for case in tried]
    run(benchmark, cases, at, name="step")


def our_steps(given: argparse.Namespace, folder: str, at: Session, steps: int) -> tuple[dict[str, str], dict[str, Any]]:
    """Inputs of `steps` steps of made-up pairs in `folder`: the columns of what is measured, settings of our runs."""
    model, dtype, data = model_of(given), dtype_of(given), "tiny" if given.dry_run else "256+2x384"
    shared = {"folder": folder, "max_length": 1024}
    drawn = {**shared, "data": data, "pairs": steps * PAIRS_PER_STEP, "vocabulary": vocabulary_of(model)}
    worker("inputs", drawn, at)
    settings = {
        **shared, "model": model, "dtype": dtype, "device": given.device, "threads": given.threads, "steps": steps,
        "pairs_per_step": PAIRS_PER_STEP, "layers": 2 if given.dry_run else None,
    }  # fmt: skip
    return {"model": model, "dtype": dtype, "data": data}, settings


def _tokens(means: Result) -> str:
    return ", ".join(f"{value:.0f} {name}" for name, value in means.items())


def vocabulary_of(model: str) -> int:
    from shapes import SHAPES

    return SHAPES[model][1]["vocab_size"]


if __name__ == "__main__":
    main()
