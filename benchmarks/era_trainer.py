"""What `bench_era.py` runs in the environment of tests/era/build.py: TRL 0.11.4 training what it is told.

python era_trainer.py '{...}'      prints what it measured as JSON, last line
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

PARTS = ("prompt", "chosen", "rejected")


class FocalPO(DPOTrainer):
    """In the order of the rows, with Eq. 4 of the paper for its loss; its reference pass is timed."""

    gamma = 0.0
    reference_s = 0.0

    def _get_train_sampler(self) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def get_train_dataloader(self) -> Any:
        start = time.perf_counter()
        loader = super().get_train_dataloader()  # where it precomputes
        self.reference_s += (time.perf_counter() - start) * self.precompute_ref_log_probs
        return loader

    def dpo_loss(self, *logps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        chosen, rejected = (self.beta * (logps[side] - logps[side + 2]) for side in range(2))
        log_p = logsigmoid(chosen - rejected)
        return -torch.exp(self.gamma * log_p) * log_p, chosen.detach(), rejected.detach()


class Watch(TrainerCallback):
    """When each optimiser step ended, on the wall clock and in CPU time, and its loss."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []
        self.losses: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def rendered(row: dict[str, Any], tokenizer: Any) -> dict[str, str]:
    """Prompt and answers apart, as recipes of that time rendered them."""
    texts = (row[part] for part in PARTS)
    if not isinstance(row["prompt"], str):
        texts = (tokenizer.apply_chat_template(row[part], tokenize=False) for part in PARTS)
    return dict(zip(PARTS, texts, strict=True))


def trained(told: dict[str, Any]) -> tuple[FocalPO, Watch]:
    torch.set_num_threads(told["threads"])
    folder, output = Path(told["folder"]), told["output"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer" / "tokenizer.json"), pad_token="<|pad|>", eos_token="<|end|>",
        chat_template=told["template"],
    )  # fmt: skip
    kind = getattr(transformers, told["kind"])
    model = kind(kind.config_class(**told["shape"]))
    model.load_state_dict(load_file(f"{output}/start"))
    args = DPOConfig(
        output_dir=output, max_steps=told["steps"], per_device_train_batch_size=told["batch"],
        gradient_accumulation_steps=told["pairs_per_step"] // told["batch"], remove_unused_columns=False,
        precompute_ref_log_probs=told["precompute"], **told["training"],
    )  # fmt: skip
    rows = [rendered(row, tokenizer) for row in json.loads(Path(output, "rows").read_text(encoding="utf-8"))]
    watch = Watch()
    trainer = FocalPO(model, args=args, train_dataset=Dataset.from_list(rows), tokenizer=tokenizer, callbacks=[watch])
    trainer.gamma = told["gamma"]
    trainer.train()
    return trainer, watch


def peak_gib() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


def main() -> None:
    trainer, watch = trained(json.loads(sys.argv[1]))
    data = trainer.train_dataset
    found = {
        "ends": watch.ends,
        "losses": watch.losses,
        "tokens": sum(len(row[f"{side}_input_ids"]) for row in data for side in ("chosen", "rejected")),
        "reference_s": trainer.reference_s,
        "peak_gib": peak_gib(),
        "note": f"transformers {transformers.__version__}, torch {torch.__version__}",
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
