"""The implementations that `bench_step.py` puts side by side: each trains one `Job` and says how long steps took.

All train the same fresh adapter from the same seed on the same pairs in the same order, by the same AdamW, so that
their losses, step by step, are those of each other.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from harness import Skip
from inputs import SEED, read_rows, read_tokenizer
from measuring import DTYPES, wait
from peft import PeftModel
from shapes import lora_config, random_base
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, set_seed

from lorafocal import FocalPOConfig, FocalPOTrainer
from lorafocal.data.tokens import TokenizedPair
from lorafocal.model.adapters import adapter_parameters
from lorafocal.sampler import shuffled

LEARNING_RATE = 1e-3  # so that losses move at once, and equal losses mean equal gradients
BETA = 0.1


@dataclass(frozen=True)
class Job:
    """What is trained; `batch`, `precompute` and `checkpointing` are the peers', `more` is FocalPOConfig's."""

    folder: str
    model: str
    dtype: str
    device: str
    steps: int  # optimiser steps, warm-up included
    pairs_per_step: int
    max_length: int
    quantization: str | None = None
    layers: int | None = None
    reference: str = "disabled_adapter"
    batch: int = 8
    precompute: bool = False
    checkpointing: bool = False
    more: dict[str, Any] = field(default_factory=dict)

    def base(self) -> PreTrainedModel:
        return random_base(
            self.model, dtype=DTYPES[self.dtype], device=self.device, quantization=self.quantization, layers=self.layers
        )

    @property
    def shared(self) -> dict[str, Any]:
        """What trainers of transformers are told in the same words."""
        return {
            "beta": BETA, "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant",
            "max_length": self.max_length, "max_steps": self.steps, "logging_steps": 1, "save_strategy": "no",
            "report_to": "none", "use_cpu": self.device == "cpu", "bf16": self.dtype == "bfloat16", "seed": SEED,
            "disable_tqdm": True, "weight_decay": 0.0, "max_grad_norm": 1.0,
        }  # fmt: skip


@dataclass
class Watch(TrainerCallback):
    """When each optimiser step ended, on the wall clock and in CPU time of this process, and its loss."""

    device: str
    ends: list[tuple[float, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def tick(self) -> None:
        wait(self.device)
        self.ends.append((time.perf_counter(), time.process_time()))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.tick()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])

    def since(self, step: int) -> tuple[float, float]:
        """Wall and CPU seconds from the end of `step` (from 1) to the end of the last one."""
        (start, cpu_start), (end, cpu_end) = self.ends[step - 1], self.ends[-1]
        return end - start, cpu_end - cpu_start


@dataclass
class Trained:
    """A finished job."""

    watch: Watch
    pairs: int  # that were given
    tokens: int  # of all of them, as they were cut
    reference_s: float = 0.0  # of a pass before training, over all pairs
    kernels: dict[str, str] = field(default_factory=dict)  # what ours ran on


# ---- ours -------------------------------------------------------------------------------------------------------


def train_ours(job: Job) -> Trained:
    """FocalPO at gamma 0, which is DPO, with our defaults."""
    with tempfile.TemporaryDirectory() as output:
        trainer, reference_s = our_trainer(job, output)
        watch = Watch(job.device)
        trainer.add_callback(watch)
        trainer.train()
    tokens = sum(pair.shared_length + len(pair.prompt_ids) for pair in trainer.train_dataset)
    return Trained(watch, len(trainer.train_dataset), tokens, reference_s, dict(trainer.kernels))


def our_trainer(job: Job, output: str) -> tuple[FocalPOTrainer, float]:
    """The trainer, its reference stored where asked, and the seconds that took."""
    folder = Path(job.folder)
    stored = {"reference_store": f"{output}/store"} if job.reference == "cached" else {}
    shared = {name: value for name, value in job.shared.items() if name != "bf16"}  # ours takes the base's dtype
    args = FocalPOConfig(
        output_dir=output, gamma=0.0, pairs_per_step=job.pairs_per_step, reference=job.reference,
        **stored, **shared, **job.more,
    )  # fmt: skip
    base = job.base()
    set_seed(SEED)
    trainer = FocalPOTrainer(
        base, args=args, train_dataset=read_rows(folder), processing_class=read_tokenizer(folder),
        peft_config=lora_config(),
    )  # fmt: skip
    same_start(trainer.model)
    if job.reference != "cached":
        return trainer, 0.0
    start = time.perf_counter()
    trainer.cache_reference()
    wait(job.device)
    return trainer, time.perf_counter() - start


@torch.no_grad()
def same_start(policy: PeftModel) -> PeftModel:
    """Give every lora_A the same random values whoever made it; lora_B is zero."""
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in sorted(adapter_parameters(policy).items()):
        if "lora_A" in name:
            bound = parameter.shape[1] ** -0.5
            parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)
    return policy


# ---- TRL --------------------------------------------------------------------------------------------------------


def train_trl(job: Job, *, base: Callable[[], Any] | None = None) -> Trained:
    """TRL's DPO; `base` gives another model, with its adapter on."""
    from datasets import Dataset  # where it is needed: a machine may have neither
    from trl import DPOConfig, DPOTrainer  # here, so that its memory is not counted as ours

    class Timed(DPOTrainer):
        precompute_s = 0.0

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Dataset:
            start = time.perf_counter()
            dataset = super()._precompute_ref_logps(*args, **kwargs)
            wait(job.device)
            self.precompute_s += time.perf_counter() - start
            return dataset

    folder, model = Path(job.folder), (base or job.base)()
    rows = read_rows(folder)
    in_our_order = [rows[i] for i in shuffled(len(rows), SEED, 0)]
    with tempfile.TemporaryDirectory() as output:
        args = DPOConfig(
            output_dir=output, per_device_train_batch_size=job.batch, precompute_ref_log_probs=job.precompute,
            gradient_accumulation_steps=job.pairs_per_step // job.batch, gradient_checkpointing=job.checkpointing,
            train_sampling_strategy="sequential", **job.shared,
        )  # fmt: skip
        trainer = Timed(
            model, args=args, train_dataset=Dataset.from_list(in_our_order), processing_class=read_tokenizer(folder),
            peft_config=None if isinstance(model, PeftModel) else lora_config(),
        )  # fmt: skip
        same_start(trainer.model)
        watch = Watch(job.device)
        trainer.add_callback(watch)
        trainer.train()
        parts = ("prompt_ids", "prompt_ids", "chosen_ids", "rejected_ids")
        tokens = sum(len(row[part]) for row in trainer.train_dataset for part in parts)
    return Trained(watch, len(rows), tokens, trainer.precompute_s)


def train_trl_liger(job: Job) -> Trained:
    """TRL's DPO on a model whose norms, rotations and MLPs are Liger's; the head stays TRL's."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise Skip("liger-kernel is not installed")
    if job.device != "cuda":
        raise Skip("Liger's kernels are Triton's, which need a GPU")
    from liger_kernel.transformers import apply_liger_kernel_to_llama, apply_liger_kernel_to_mistral

    exchange = apply_liger_kernel_to_mistral if job.model.startswith("mistral") else apply_liger_kernel_to_llama
    exchange(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False)
    return train_trl(job)


def train_unsloth(job: Job) -> Trained:
    """TRL's DPO on a model that unsloth has loaded and patched."""
    if importlib.util.find_spec("unsloth") is None:
        raise Skip("unsloth is not installed; it cannot share an environment with the newest TRL")
    if job.device != "cuda":
        raise Skip("unsloth needs a GPU")
    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory() as saved:
        base = random_base(job.model, dtype=DTYPES[job.dtype], device="cuda", layers=job.layers)
        base.save_pretrained(saved)
        read_tokenizer(Path(job.folder)).save_pretrained(saved)
        del base
        model, _ = FastLanguageModel.from_pretrained(
            saved, max_seq_length=job.max_length, dtype=DTYPES[job.dtype], load_in_4bit=job.quantization is not None
        )
        config = lora_config()
        policy = FastLanguageModel.get_peft_model(
            model, r=config.r, lora_alpha=config.lora_alpha, use_gradient_checkpointing=False, lora_dropout=0.0,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        )  # fmt: skip
        return train_trl(job, base=lambda: policy)


# ---- a loop by hand -----------------------------------------------------------------------------------------------


def train_plain(job: Job) -> Trained:
    """PEFT and PyTorch as one would write them down: padded batches, all logits, adapters off for the reference."""
    from peft import get_peft_model

    from lorafocal.data.sources import read_preferences
    from lorafocal.data.tokens import tokenize_preferences

    folder = Path(job.folder)
    preferences = read_preferences(folder / "rows.jsonl").pairs
    pairs = tokenize_preferences(preferences, read_tokenizer(folder), max_length=job.max_length).pairs
    pairs = [pairs[i] for i in shuffled(len(pairs), SEED, 0)]
    policy = same_start(get_peft_model(job.base(), lora_config())).train()
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    watch = Watch(job.device)
    for step in range(job.steps):
        whole = pairs[step * job.pairs_per_step : (step + 1) * job.pairs_per_step]
        loss = 0.0
        for start in range(0, len(whole), job.batch):
            part = _plain_losses(policy, whole[start : start + job.batch], job.device).sum() / len(whole)
            part.backward()
            loss += float(part.detach())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        watch.losses.append(loss)
        watch.tick()
    tokens = sum(pair.shared_length + len(pair.prompt_ids) for pair in pairs)
    return Trained(watch, len(pairs), tokens)


def _plain_losses(policy: PeftModel, pairs: list[TokenizedPair], device: str) -> Tensor:
    """DPO's loss a pair, (B,)."""
    with torch.no_grad(), policy.disable_adapter():
        reference = _plain_margins(policy, pairs, device)
    return -torch.nn.functional.logsigmoid(BETA * (_plain_margins(policy, pairs, device) - reference))


def _plain_margins(policy: PeftModel, pairs: list[TokenizedPair], device: str) -> Tensor:
    """Log-prob of the chosen answer less that of the rejected one, (B,), in nats."""
    answers = [(p.prompt_ids, p.chosen_ids) for p in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]
    width = max(len(prompt) + len(answer) for prompt, answer in answers)
    ids, mask, scored = (torch.zeros(len(answers), width, dtype=torch.long) for _ in range(3))
    for row, (prompt, answer) in enumerate(answers):
        stop = len(prompt) + len(answer)
        ids[row, :stop] = torch.tensor([*prompt, *answer])
        mask[row, :stop] = 1
        scored[row, len(prompt) : stop] = 1
    ids, mask, scored = ids.to(device), mask.to(device), scored.to(device)
    half = policy.dtype == torch.bfloat16
    with torch.autocast(device, dtype=torch.bfloat16) if half else nullcontext():
        logits = policy(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logps = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    chosen, rejected = (logps * scored[:, 1:]).sum(-1).chunk(2)
    return chosen - rejected


TRAINERS: dict[str, Callable[[Job], Trained]] = {
    "lorafocal": train_ours,
    "trl": train_trl,
    "trl + liger": train_trl_liger,
    "peft by hand": train_plain,
    "unsloth": train_unsloth,
}
