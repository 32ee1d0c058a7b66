"""One measured training run in its own process, so that peak memory is its own: `bench_step.py` starts it.

    python step_worker.py '{"implementation": "lorafocal" | "trl" | "prepare", ...}'

prints one JSON object as its last line.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from step_inputs import SEED, load_adapter, lora_config, prepare, read_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainerCallback

from lorafocal import FocalPOConfig, FocalPOTrainer
from lorafocal.sampler import shuffled


@dataclass(frozen=True, slots=True)
class Run:
    """Settings of one run; `batch` and `precompute` are TRL's."""

    implementation: str
    folder: str
    steps: int  # optimiser steps, warm-up included
    warmup: int  # steps that are not timed
    pairs_per_step: int
    max_length: int
    threads: int
    batch: int = 8
    precompute: bool = False

    @property
    def shared(self) -> dict[str, Any]:
        """What both trainers are told in the same words."""
        return {
            "beta": 0.1, "learning_rate": 1e-4, "lr_scheduler_type": "constant", "max_length": self.max_length,
            "max_steps": self.steps, "logging_first_step": True, "logging_steps": 10, "save_strategy": "no",
            "report_to": "none", "use_cpu": True, "bf16": False, "seed": SEED, "disable_tqdm": True,
        }  # fmt: skip


class Stopwatch(TrainerCallback):
    """Notes when each optimiser step ended, on the wall clock and in CPU time of this process."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))

    def since(self, step: int) -> tuple[float, float]:
        """Wall and CPU seconds from the end of `step` (from 1) to the end of the last one."""
        (start, cpu_start), (end, cpu_end) = self.ends[step - 1], self.ends[-1]
        return end - start, cpu_end - cpu_start


def our_trainer(run: Run, output: str) -> FocalPOTrainer:
    """FocalPO at gamma 0 with our defaults: prefix-shared packs, live reference."""
    folder = Path(run.folder)
    args = FocalPOConfig(
        output_dir=output, gamma=0.0, pairs_per_step=run.pairs_per_step,
        identity_probe=False, **run.shared,
    )  # fmt: skip
    trainer = FocalPOTrainer(
        base(folder), args=args, train_dataset=read_rows(folder), processing_class=tokenizer(folder),
        peft_config=lora_config(),
    )  # fmt: skip
    load_adapter(trainer.model, folder)
    return trainer


def their_trainer(run: Run, output: str) -> tuple[Trainer, float]:
    """TRL's DPO with its defaults, but no activation checkpointing; and the seconds its reference pass took."""
    from trl import DPOConfig, DPOTrainer  # here, so that TRL's memory is not counted as ours

    class Timed(DPOTrainer):
        precompute_s = 0.0

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Dataset:
            start = time.perf_counter()
            dataset = super()._precompute_ref_logps(*args, **kwargs)
            self.precompute_s += time.perf_counter() - start
            return dataset

    folder = Path(run.folder)
    args = DPOConfig(
        output_dir=output, per_device_train_batch_size=run.batch, precompute_ref_log_probs=run.precompute,
        gradient_accumulation_steps=run.pairs_per_step // run.batch, gradient_checkpointing=False,
        train_sampling_strategy="sequential", **run.shared,
    )  # fmt: skip
    rows = read_rows(folder)
    in_our_order = [rows[i] for i in shuffled(len(rows), SEED, 0)]
    trainer = Timed(
        base(folder), args=args, train_dataset=Dataset.from_list(in_our_order),
        processing_class=tokenizer(folder), peft_config=lora_config(),
    )  # fmt: skip
    load_adapter(trainer.model, folder)
    return trainer, trainer.precompute_s


def base(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)


def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder / "model")


def tokens_of(trainer: Trainer) -> int:
    """Tokens of the pairs as the trainer cut them, a check that both cut alike."""
    rows = trainer.train_dataset
    parts = ("prompt_ids", "chosen_ids", "rejected_ids")
    if isinstance(rows, Dataset):
        return sum(len(row[part]) for row in rows for part in parts)
    return sum(len(getattr(pair, part)) for pair in rows for part in parts)


def measure(run: Run) -> dict[str, float]:
    """Train, and report time and memory of the steps after the warm-up."""
    torch.set_num_threads(run.threads)
    with tempfile.TemporaryDirectory() as output:
        if run.implementation == "trl":
            trainer, precompute_s = their_trainer(run, output)
        else:
            trainer, precompute_s = our_trainer(run, output), 0.0
        watch = Stopwatch()
        trainer.add_callback(watch)
        trainer.train()
    wall_s, cpu_s = watch.since(run.warmup)
    pairs = (run.steps - run.warmup) * run.pairs_per_step
    precompute_s = precompute_s * pairs / len(trainer.train_dataset)  # type: ignore[arg-type]
    return {
        "first_loss": trainer.state.log_history[0]["loss"],
        "tokens": tokens_of(trainer),
        "pairs/s": pairs / wall_s,
        "pairs/s, reference pass included": pairs / (wall_s + precompute_s),
        "pairs/CPU s": pairs / cpu_s,
        "peak_gib": peak_gib(),
    }


def peak_gib() -> float:
    """Largest resident memory of this process; `ru_maxrss` would carry the parent's over."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


def main() -> None:
    settings = json.loads(sys.argv[1])
    if settings["implementation"] == "prepare":
        data = Path(settings["data"]) if settings["data"] else None
        result = prepare(Path(settings["folder"]), data, pairs=settings["pairs"], max_length=settings["max_length"])
    else:
        result = measure(Run(**settings))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
