"""gamma = 0 against TRL's `DPOTrainer`: the same text, adapters and optimiser; their padding, our prefix-shared packs.

Both sides start from the same non-zero adapter, take the base with the adapter off as the reference, and run
transformers' loop with the same AdamW, schedule and clipping. Everything is compared at every step, so a difference
would also show in what follows from it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.utils as trl_utils
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from trl import DPOConfig, DPOTrainer

from lorafocal import FocalPOConfig, FocalPOTrainer
from lorafocal.comparison import Part
from lorafocal.model.adapters import adapter_parameters
from lorafocal.objectives import PairLogps, PairLosses
from lorafocal.sampler import shuffled
from tests.tiny import VOCABULARY, disturb, lora, relative_difference, tiny_base

pytestmark = pytest.mark.newest  # taps the log-probs inside TRL's step, which earlier releases compute elsewhere

PAIRS, PAIRS_PER_STEP, SEED, BETA = 76, 8, 3, 0.1  # the tenth and last step is short: 4 pairs
STEPS = -(-PAIRS // PAIRS_PER_STEP)
SIDES = ("prompt", "chosen", "rejected")
OPTIMISER: dict[str, Any] = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 1,
    "weight_decay": 0.01,
    "max_grad_norm": 0.5,  # below the gradient norms of this task, so that clipping takes part
    "num_train_epochs": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "seed": SEED,
}


@dataclass(slots=True)
class Trace:
    """What one trainer computed: per step its loss and log-probs, and the trained weights it ended with."""

    losses: list[float] = field(default_factory=list)
    logps: list[Tensor] = field(default_factory=list)  # (policy and reference, chosen and rejected, S)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def margins(self) -> list[Tensor]:
        """Rewards' differences, (S,) a step, in float64 from the log-probs."""
        ratios = [(step[0] - step[1]).double() for step in self.logps]
        return [BETA * (chosen - rejected) for chosen, rejected in ratios]


# ---- the task --------------------------------------------------------------------------------------------------


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: w2 is token 2; no merges, so both libraries must cut at the same place."""
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def rows() -> list[dict[str, str]]:
    """Ragged plain-text pairs with their place as id; among them one-token prompts and answers."""
    draw = random.Random(1)

    def text(length: int) -> str:
        return " ".join(f"w{draw.randrange(2, VOCABULARY)}" for _ in range(length))

    lengths = [(1, 1, 1), (1, 9, 2), (12, 1, 14)]
    lengths += [tuple(draw.randint(1, 14) for _ in range(3)) for _ in range(PAIRS - len(lengths))]
    return [
        {"id": str(i), "prompt": text(p) + " ", "chosen": text(c), "rejected": text(r)}
        for i, (p, c, r) in enumerate(lengths)
    ]


# ---- the two sides ---------------------------------------------------------------------------------------------


def trained(trainer: Trainer, trace: Trace, logps_of_step: Callable[[], Tensor]) -> Trace:
    """Train, noting loss and log-probs of each step and the adapter at the end."""
    step = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Tensor:
        loss = step(*args, **kwargs)
        trace.losses.append(float(loss))
        trace.logps.append(logps_of_step())
        return loss

    trainer.training_step = training_step  # type: ignore[method-assign]
    trainer.train()
    ended = adapter_parameters(trainer.model) or dict(trainer.model.named_parameters())
    trace.weights = {name: parameter.detach().clone() for name, parameter in ended.items()}
    return trace


class Watched(FocalPOTrainer):
    """Our trainer, noting which pairs lay in which pack and what the objective was given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scored: dict[str, Tensor] = {}  # id -> (2, 2)
        self.packs: list[tuple[str, ...]] = []
        self.compared.objective = replace(self.objective, loss=self._note(self.objective.loss))

    def _note(self, loss: Callable[..., PairLosses]) -> Callable[..., PairLosses]:
        def noted(policy: PairLogps, *, reference: PairLogps, **others: Any) -> PairLosses:
            both = torch.stack([torch.stack(policy), torch.stack(reference)]).detach()
            self.scored.update(zip(self.packs[-1], both.unbind(-1), strict=True))
            return loss(policy, reference=reference, **others)

        return noted

    def _part_loss(self, model: Any, part: Part, step_pairs: int) -> Tensor:
        self.packs.append(part.pack.pair_ids)
        return super()._part_loss(model, part, step_pairs)


def ours(folder: Path, dtype: torch.dtype, objective: str = "focalpo", *, full: bool = False) -> tuple[Trace, Watched]:
    """FocalPOTrainer at gamma 0, several packs a step; `full`: every weight, against a second model."""
    args = FocalPOConfig(
        output_dir=str(folder / "ours"), objective=objective, beta=BETA, gamma=0.0 if objective == "focalpo" else None,
        pairs_per_step=PAIRS_PER_STEP, tokens_per_pack=90, identity_probe=False, disable_tqdm=True,
        reference="separate_model" if full else "disabled_adapter", **OPTIMISER,
    )  # fmt: skip
    how: dict[str, Any] = {"ref_model": other_base(dtype)} if full else {"peft_config": lora()}
    trainer = Watched(tiny_base(dtype=dtype), args=args, train_dataset=rows(), processing_class=word_tokenizer(), **how)
    disturb(trainer.model)
    order = iter(shuffled(PAIRS, SEED, 0))

    def logps_of_step() -> Tensor:
        scored = [trainer.scored.pop(str(next(order))) for _ in range(len(trainer.scored))]
        return torch.stack(scored, dim=-1)

    return trained(trainer, Trace(), logps_of_step), trainer


def other_base(dtype: torch.dtype) -> PreTrainedModel:
    """A second model, near the one that is trained."""
    model = tiny_base(dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.02)
    return model


def theirs(folder: Path, dtype: torch.dtype, *, full: bool = False) -> tuple[Trace, DPOTrainer]:
    """DPOTrainer, one padded batch a step, on the pairs in the order in which our trainer visits them."""
    args = DPOConfig(
        output_dir=str(folder / "theirs"), beta=BETA, per_device_train_batch_size=PAIRS_PER_STEP,
        train_sampling_strategy="sequential", gradient_checkpointing=False, disable_tqdm=True, bf16=False, **OPTIMISER,
    )  # fmt: skip
    in_order = [rows()[i] for i in shuffled(PAIRS, SEED, 0)]
    how: dict[str, Any] = {"ref_model": other_base(dtype)} if full else {"peft_config": lora()}
    trainer = DPOTrainer(
        tiny_base(dtype=dtype).requires_grad_(full), args=args, train_dataset=Dataset.from_list(in_order),
        processing_class=word_tokenizer(), **how,
    )  # fmt: skip
    disturb(trainer.model)
    forwards: list[Tensor] = []  # of a step: policy, then reference

    def note(module: PreTrainedModel | PeftModel, inputs: Any, output: Any) -> None:
        forwards.append(output.log_probs.detach().sum(-1).unflatten(0, (2, -1)))

    for model in filter(None, (trainer.model, trainer.ref_model)):
        model.register_forward_hook(note)

    def logps_of_step() -> Tensor:
        step = torch.stack(forwards)
        forwards.clear()
        return step

    return trained(trainer, Trace(), logps_of_step), trainer


# ---- float64 on their side -------------------------------------------------------------------------------------


class WideLogps:
    """In the place of TRL's head kernel, whose buffers are fp32 whatever it is given: the same outputs in float64."""

    @staticmethod
    def apply(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *_: Any) -> tuple[Any, ...]:
        logits = linear(hidden, weight, bias)
        logps = logits.log_softmax(-1)
        picked = logps.gather(-1, targets[:, None]).squeeze(-1)
        entropy = -(logps.exp() * logps).sum(-1)
        return picked, entropy, None, logits.mean(-1).detach(), logits.argmax(-1) == targets


def wide_norm(self: LlamaRMSNorm, hidden: Tensor) -> Tensor:
    """transformers' RMSNorm without its detour through fp32."""
    return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.fixture
def all_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fp32 anywhere: not in TRL's head, and not in the model's norms, which round sums 1e-16 apart to 1e-8 apart."""
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", WideLogps)
    monkeypatch.setattr(LlamaRMSNorm, "forward", wide_norm)


# ---- tests -----------------------------------------------------------------------------------------------------


def check_same(a: Trace, b: Trace, *, relative: float) -> None:
    """Log-probs within `relative`, margins and losses within what that lets them differ by."""
    assert len(a.losses) == len(b.losses) == STEPS
    for step, (x, y) in enumerate(zip(a.logps, b.logps, strict=True)):
        assert x.shape == y.shape, f"step {step}"
        assert float(((x - y) / y).abs().max()) <= relative, f"log-probs of step {step}"
    slack = [4 * BETA * relative * float(step.abs().max()) for step in b.logps]
    for step, (x, y) in enumerate(zip(a.margins(), b.margins(), strict=True)):
        assert float((x - y).abs().max()) <= slack[step], f"margins of step {step}"
        assert abs(a.losses[step] - b.losses[step]) <= slack[step], f"loss of step {step}"  # |dL/dmargin| <= 1


@pytest.mark.slow
@pytest.mark.row("64")
def test_gamma_0_is_trls_dpo_in_fp32(tmp_path: Path) -> None:
    (a, our_side), (b, their_side) = ours(tmp_path, torch.float32), theirs(tmp_path, torch.float32)
    read = {pair.id: pair for pair in our_side.train_dataset}
    for row in their_side.train_dataset:
        pair = read[row["id"]]
        assert [pair.prompt_ids, pair.chosen_ids, pair.rejected_ids] == [row[f"{n}_ids"] for n in SIDES]
    assert len(our_side.packs) > STEPS  # steps were split
    assert all(float(margins.abs().min()) > 0 for margins in a.margins())  # the adapter was not zero at the start
    check_same(a, b, relative=1e-6)


@pytest.mark.slow
@pytest.mark.row("64")
@pytest.mark.usefixtures("all_float64")
def test_gamma_0_is_trls_dpo_in_float64(tmp_path: Path) -> None:
    (a, _), (b, _) = ours(tmp_path, torch.float64), theirs(tmp_path, torch.float64)
    assert a.logps[0].dtype == b.logps[0].dtype == torch.float64
    for x, y in zip(a.logps + a.margins(), b.logps + b.margins(), strict=True):
        assert float((x - y).abs().max()) <= 1e-9
    assert a.losses == pytest.approx(b.losses, rel=0, abs=1e-9)
    assert relative_difference(a.weights, b.weights) <= 1e-9


@pytest.mark.slow
@pytest.mark.row("64")
@pytest.mark.usefixtures("all_float64")
def test_at_full_parameters_gamma_0_is_trls_dpo_in_float64(tmp_path: Path) -> None:
    """Every weight moves, the head and what it reads included; clipping and schedule are of all of them."""
    (a, our_side), (b, _) = ours(tmp_path, torch.float64, full=True), theirs(tmp_path, torch.float64, full=True)
    for x, y in zip(a.logps + a.margins(), b.logps + b.margins(), strict=True):
        assert float((x - y).abs().max()) <= 1e-8
    assert a.losses == pytest.approx(b.losses, rel=0, abs=1e-9)
    assert a.weights.keys() == our_side.trained.keys() == b.weights.keys()
    assert relative_difference(a.weights, b.weights) <= 1e-9


@pytest.mark.slow
@pytest.mark.row("64")
def test_both_names_of_dpo_train_bit_for_bit_alike(tmp_path: Path) -> None:
    (a, _), (b, _) = ours(tmp_path, torch.float32, "focalpo"), ours(tmp_path, torch.float32, "dpo")
    assert a.losses == b.losses
    assert all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)
