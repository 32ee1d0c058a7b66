"""The golden numbers, computed by TRL 0.11.4: `python produce.py golden.json` in the environment of `build.py`.

TRL's own functions make the ids and its trainer the trajectory; this file renders conversations as the recipes of
that time did before they called it, and tells it Eq. 4 of the paper.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import subjects
import torch
import transformers
import trl
from datasets import Dataset
from torch.nn.functional import logsigmoid
from torch.utils.data import SequentialSampler
from transformers import LlamaForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import _tokenize

PARTS = ("prompt", "chosen", "rejected")


# ---- ids


def rendered(row: subjects.Row, tokenizer: Any) -> dict[str, str]:
    """Prompt and answers apart and without a generation prompt; a BOS before an answer goes, as in SimPO's script."""
    if not tokenizer.chat_template:
        return row
    texts = {part: tokenizer.apply_chat_template(row[part], tokenize=False) for part in PARTS}
    return {part: text if part == "prompt" else text.removeprefix(tokenizer.bos_token) for part, text in texts.items()}


def ids_of(row: subjects.Row, tokenizer: Any, limits: tuple[int, int]) -> list[Any] | None:
    """`[prompt, answer]` of chosen and of rejected; None where TRL ends with an error."""
    args = SimpleNamespace(
        max_length=limits[0], max_prompt_length=limits[1], truncation_mode="keep_end", label_pad_token_id=-100
    )
    features = {part: [text] for part, text in rendered(row, tokenizer).items()}
    try:
        made = _tokenize(features, tokenizer, args)
    except ValueError:
        return None
    sides = []
    for side in ("chosen", "rejected"):
        [ids], [labels] = made[f"{side}_input_ids"], made[f"{side}_labels"]
        prompt = sum(label == -100 for label in labels)
        assert labels[prompt:] == ids[prompt:]
        sides.append([ids[:prompt], ids[prompt:]])
    return sides


def all_ids() -> dict[str, dict[str, list[Any]]]:
    """By tokenizer, then by limits, in the order of its rows."""
    return {
        name: {
            f"{limits[0]} {limits[1]}": [ids_of(row, tokenizer, limits) for row in subjects.rows_for(tokenizer)]
            for limits in subjects.LIMITS
        }
        for name, tokenizer in subjects.all_tokenizers().items()
    }


# ---- trajectories


class Watched(DPOTrainer):
    """In the order of the rows; notes what the loss was given, and is DPO or Eq. 4 of the paper."""

    gamma: float = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.logps: list[list[float]] = []  # of each pair: policy chosen and rejected, reference chosen and rejected
        self.losses: list[float] = []
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def dpo_loss(self, *logps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        losses, chosen_rewards, rejected_rewards = super().dpo_loss(*logps)
        if self.gamma:
            log_p = logsigmoid(self.beta * ((logps[0] - logps[1]) - (logps[2] - logps[3])))
            losses = -torch.exp(self.gamma * log_p) * log_p
        self.logps += torch.stack(logps, dim=-1).detach().double().tolist()
        self.losses += losses.detach().double().tolist()
        return losses, chosen_rewards, rejected_rewards


class Norms(TrainerCallback):
    def __init__(self) -> None:
        self.gradient_norms: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "grad_norm" in logs:
            self.gradient_norms.append(float(logs["grad_norm"]))


def trajectory(gamma: float) -> dict[str, Any]:
    """A full-parameter fp32 training against a copy of its start."""
    tokenizer = subjects.all_tokenizers()["zephyr"]
    model = subjects.fill(LlamaForCausalLM(subjects.model_config(len(tokenizer))))
    rows = [rendered(row, tokenizer) for row in subjects.training_rows()]
    norms = Norms()
    with tempfile.TemporaryDirectory() as output:
        max_length, max_prompt_length = subjects.TRAINING_LIMITS
        args = DPOConfig(
            output_dir=output, beta=subjects.BETA, max_length=max_length, max_prompt_length=max_prompt_length,
            per_device_train_batch_size=subjects.BATCH, remove_unused_columns=False,
            gradient_accumulation_steps=subjects.PAIRS_PER_STEP // subjects.BATCH, **subjects.SETTINGS,
        )  # fmt: skip
        trainer = Watched(
            model, args=args, train_dataset=Dataset.from_list(rows), tokenizer=tokenizer, callbacks=[norms]
        )
        trainer.gamma = gamma
        trainer.train()
    size = subjects.PAIRS_PER_STEP
    means = [sum(trainer.losses[start : start + size]) / size for start in range(0, len(trainer.losses), size)]
    return {
        "losses": means,
        "logps": trainer.logps,
        "gradient_norms": norms.gradient_norms,
        "parameters": subjects.summary(model),
    }


def main() -> None:
    torch.set_num_threads(1)
    golden = {
        "versions": {library.__name__: library.__version__ for library in (trl, transformers, torch)},
        "ids": all_ids(),
        "dpo": trajectory(0.0),
        "focalpo": trajectory(subjects.GAMMA),
    }
    Path(sys.argv[1]).write_text(json.dumps(golden, separators=(",", ":")).replace('},"', '},\n"') + "\n")


if __name__ == "__main__":
    main()
