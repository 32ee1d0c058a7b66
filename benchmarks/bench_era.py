"""A full-parameter step beside the paper's own stack, TRL 0.11.4 on transformers 4.45.2: pairs/s, peak memory.

    python tests/era/build.py --check --environment ERA        # once: makes the environment, checks its numbers
    python benchmarks/bench_era.py --environment ERA [--data pairs.jsonl --label my-pairs] [--minutes 12]

Both train FocalPO (Eq. 4 of the paper) on the same weights, pairs and ids (`truncation: recipe`) with the same AdamW;
see README.md in this folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_step import BETTER, PAIRS_PER_STEP, WITH_PASS, check_same, vocabulary_of
from harness import HERE, OURS, Benchmark, Case, Result, Session, Skip, model_of, options, run, session, worker

ERA = "trl 0.11.4"
LENGTHS = {"max_length": 1024, "max_prompt_length": 512}  # Zephyr's
TRAINING = {  # told to both in the same words; losses move at once, so that equal ones mean equal gradients
    "beta": 0.1, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0,
    "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
    **LENGTHS,
}  # fmt: skip
GAMMA = 0.05


# ---- in the worker ------------------------------------------------------------------------------------------------


def measure(settings: dict[str, Any]) -> Result:
    """Train, and report time and memory of the steps after the warm-up."""
    found = ours(settings) if settings["implementation"] == OURS else theirs(settings)
    (start, cpu_start), (end, cpu_end) = found["ends"][settings["warmup"] - 1], found["ends"][-1]
    pairs = (settings["steps"] - settings["warmup"]) * settings["pairs_per_step"]
    given = settings["steps"] * settings["pairs_per_step"]
    wall_s = end - start
    return {
        "pairs/s": pairs / wall_s,
        "pairs/CPU s": pairs / (cpu_end - cpu_start),
        "tokens/s": found["tokens"] / given * pairs / wall_s,
        WITH_PASS: pairs / (wall_s + found["reference_s"] * pairs / given),
        "peak GiB": found["peak_gib"],
        "_losses": found["losses"],
        "_tokens": found["tokens"],
        "_note": found["note"],
    }


def ours(settings: dict[str, Any]) -> dict[str, Any]:
    """Full parameters, with our defaults and the reference asked for."""
    import torch
    from inputs import SEED, read_rows, read_tokenizer
    from measuring import peak_gib
    from shapes import random_base
    from trainers import Watch

    from lorafocal import FocalPOConfig, FocalPOTrainer

    torch.set_num_threads(settings["threads"])
    folder, cached, watch = Path(settings["folder"]), settings["reference"] == "cached", Watch("cpu")
    start = [random_base(settings["model"], dtype=torch.float32, device="cpu") for _ in range(1 if cached else 2)]
    with tempfile.TemporaryDirectory() as output:
        store = {"reference_store": f"{output}/store"} if cached else {}
        args = FocalPOConfig(
            output_dir=output, gamma=GAMMA, pairs_per_step=settings["pairs_per_step"], max_steps=settings["steps"],
            truncation="recipe", seed=SEED, reference=settings["reference"], **store, **TRAINING,
        )  # fmt: skip
        trainer = FocalPOTrainer(
            *start, args=args, train_dataset=read_rows(folder), processing_class=read_tokenizer(folder),
            callbacks=[watch],
        )  # fmt: skip
        began = time.perf_counter()
        if cached:
            trainer.cache_reference()
        reference_s = time.perf_counter() - began
        trainer.train()
    return {
        "ends": watch.ends,
        "losses": watch.losses,
        "tokens": sum(pair.shared_length + len(pair.prompt_ids) for pair in trainer.train_dataset),
        "reference_s": reference_s if cached else 0.0,
        "peak_gib": peak_gib("cpu"),
        "note": "; ".join(f"{name}: {value}" for name, value in trainer.kernels.items()),
    }


def theirs(settings: dict[str, Any]) -> dict[str, Any]:
    """The same by `era_trainer.py` in its own environment, on the same weights and rows in our order."""
    python = Path(settings["environment"] or "nowhere", "bin", "python")
    if not python.exists():
        raise Skip("its environment is not there: python tests/era/build.py --check --environment FOLDER makes one")
    import torch
    from inputs import SEED, TEMPLATE, read_rows
    from safetensors.torch import save_file
    from shapes import SHAPES, config_of, random_base

    from lorafocal.sampler import shuffled

    rows, config = read_rows(Path(settings["folder"])), config_of(settings["model"])
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shape = {**SHAPES[settings["model"]][1], "max_position_embeddings": config.max_position_embeddings, **ids}
    with tempfile.TemporaryDirectory() as output:
        model = random_base(settings["model"], dtype=torch.float32, device="cpu")
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, f"{output}/start")
        Path(output, "rows").write_text(json.dumps([rows[i] for i in shuffled(len(rows), SEED, 0)]), encoding="utf-8")
        told = {
            **settings, "output": output, "training": TRAINING, "gamma": GAMMA, "shape": shape,
            "kind": type(model).__name__, "template": TEMPLATE,
        }  # fmt: skip
        done = subprocess.run([python, HERE / "era_trainer.py", json.dumps(told)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---- cases --------------------------------------------------------------------------------------------------------


def cases_of(common: dict[str, Any], batches: Sequence[int]) -> list[Case]:
    """Ours with the reference stored and live, theirs with every batch, live and precomputed."""
    words = {"cached": "full parameters, stored reference", "separate_model": "full parameters, live reference"}
    cases = [
        Case(OURS, how, {**common, "implementation": OURS, "reference": reference}, batch="packs, auto")
        for reference, how in words.items()
    ]
    for precompute in (False, True):
        for batch in batches:
            how = f"full parameters, batch {batch}, {'precomputed' if precompute else 'live'} reference"
            settings = {**common, "implementation": ERA, "batch": batch, "precompute": precompute}
            cases.append(Case(ERA, how, settings, batch=f"{batch} pairs"))
    return cases


def main(words: Sequence[str] | None = None) -> None:
    parser = options(
        argparse.ArgumentParser(description="a full-parameter step beside the paper's own stack, on a CPU")
    )
    parser.add_argument("--environment", type=Path, help="made by tests/era/build.py; its runs are skipped without")
    parser.add_argument("--model", choices=("tiny",), help="whose shapes; random weights")
    parser.add_argument("--data", default="ultrafeedback-like", help="a distribution's name, or a file of preferences")
    parser.add_argument("--label", help="what the results call a file; its path is never recorded")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 2, 1], help="theirs, of 8 pairs a step")
    parser.add_argument("--steps", type=int, default=3, help="timed steps a run, of 8 pairs each")
    parser.add_argument("--warmup", type=int, default=1, help="steps before the clock starts")
    given = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        compare(given, folder, session(given))


def compare(given: argparse.Namespace, folder: str, at: Session) -> None:
    """Prepare the inputs and measure everything side by side."""
    from inputs import DISTRIBUTIONS

    model, data = model_of(given), "tiny" if given.dry_run else given.data
    label = data if data in DISTRIBUTIONS else given.label or "own data"
    pairs_per_step, steps = PAIRS_PER_STEP, (1 if given.dry_run else given.steps) + given.warmup
    source = data if data in DISTRIBUTIONS else str(Path(data).resolve())
    drawn = {"folder": folder, "data": source, "pairs": steps * pairs_per_step, "max_length": LENGTHS["max_length"]}
    worker("inputs", {**drawn, "vocabulary": vocabulary_of(model)}, at)
    common = {
        "folder": folder, "model": model, "threads": given.threads, "steps": steps, "warmup": given.warmup,
        "pairs_per_step": pairs_per_step, "environment": str(given.environment.resolve()) if given.environment else "",
    }  # fmt: skip
    benchmark = Benchmark(
        "bench_era", {"model": model, "dtype": "float32", "data": label}, BETTER, lambda r: check_same("float32", r)
    )
    run(benchmark, cases_of(common, given.batches), at, name="era")


if __name__ == "__main__":
    main()
