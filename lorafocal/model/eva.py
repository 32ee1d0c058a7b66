"""EVA starts (arXiv:2410.07170): A from the principal directions of what each layer reads of the training pairs, B = 0.

PEFT does the work. It goes round its batches until the directions settle, for ever where they cannot; here the batches
are made large enough, and the rounds are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import initialize_lora_eva_weights
from torch import Tensor

from lorafocal.data.tokens import TokenizedPair
from lorafocal.data.turns import scored
from lorafocal.errors import InputError
from lorafocal.model.adapters import widen_adapters
from lorafocal.model.dora import reset_magnitudes
from lorafocal.model.head import causal_lm

PAIRS = 256  # some 50 000 tokens of answers, hundreds for each direction; the directions settle long before
_PAIRS_A_BATCH = 4
_LONGEST_SEARCH = 400  # forward passes; PEFT's own examples settle in under 100
IGNORED = -100  # PEFT's mark of a token that is not looked at


def directions(rank: int, config: LoraConfig) -> int:
    """How many directions PEFT looks for in a layer of this rank: `rho` times as many, to choose from."""
    return round(rank * config.eva_config.rho)


def width_needed(rank: int, config: LoraConfig) -> int:
    """The tokens a batch, and the inputs a layer, must have at least: PEFT's randomised SVD looks at twice as many."""
    return 2 * directions(rank, config)


def eva_start(policy: PeftModel, pairs: Sequence[TokenizedPair], *, seed: int) -> None:
    """Start the active adapter from up to `PAIRS` pairs drawn by `seed`, of each the prompt with its chosen answer.

    Answers alone are looked at, as PEFT's `EvaConfig.use_label_mask` has it. The rank of a layer may change, a layer
    may lose its adapter; scaling follows `EvaConfig.adjust_scaling_factors`. Every process is to call this with the
    same pairs. Raises InputError where there is too little to look at.
    """
    name = policy.active_adapter
    config = policy.peft_config[name]
    most = max([config.r, *config.rank_pattern.values()])
    batches = _batches(pairs, width_needed(most, config), seed=seed)
    initialize_lora_eva_weights(
        policy,
        batches,
        adapter_name=name,
        forward_fn=_counted_forward(most),
        prepare_model_inputs_fn=_looked_at,
        gather_distributed_inputs=False,  # all processes look at the same
        show_progress_bar=False,
    )
    reset_magnitudes(widen_adapters(policy))  # layers of another rank were made anew


def _batches(pairs: Sequence[TokenizedPair], tokens: int, *, seed: int) -> list[dict[str, Tensor]]:
    """Batches with at least `tokens` answer tokens each: PEFT passes over smaller ones."""
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    groups: list[list[TokenizedPair]] = [[]]
    for place in order[:PAIRS]:
        if len(groups[-1]) >= _PAIRS_A_BATCH and _answer_tokens(groups[-1]) >= tokens:
            groups.append([])
        groups[-1].append(pairs[place])
    if _answer_tokens(groups[-1]) < tokens and len(groups) > 1:
        last = groups.pop()
        groups[-1] += last
    if (found := _answer_tokens(groups[-1])) < tokens:
        raise InputError(
            f"adapter.init: eva needs {tokens} tokens of chosen answers at this rank, four for each, and"
            f" the {len(pairs)} training pairs have {found}: lower `adapter.r`, or use `init: default`"
        )
    return [_padded(group) for group in groups]


def _answer_tokens(pairs: Sequence[TokenizedPair]) -> int:
    return sum(pair.scored_tokens[0] for pair in pairs)


def _padded(pairs: Sequence[TokenizedPair]) -> dict[str, Tensor]:
    """Prompts with their chosen answers, padded on the right, so that positions are those of the tokens."""
    width = max(len(pair.prompt_ids) + len(pair.chosen_ids) for pair in pairs)
    batch = {
        "input_ids": torch.zeros(len(pairs), width, dtype=torch.int64),
        "attention_mask": torch.zeros(len(pairs), width, dtype=torch.int64),
        "labels": torch.full((len(pairs), width), IGNORED),
    }
    for row, pair in enumerate(pairs):
        prompt, stop = len(pair.prompt_ids), len(pair.prompt_ids) + len(pair.chosen_ids)
        batch["input_ids"][row, :stop] = torch.tensor([*pair.prompt_ids, *pair.chosen_ids])
        batch["attention_mask"][row, :stop] = 1
        rows = [*scored(range(prompt, stop), pair.chosen_turns)]
        batch["labels"][row, rows] = batch["input_ids"][row, rows]
    return batch


def _looked_at(batch: Mapping[str, Tensor], config: LoraConfig) -> Tensor:
    """(tokens, 2): row and column of each token that counts. PEFT's own function forgets the labels before 0.20."""
    seen = batch["attention_mask"].bool()
    if config.eva_config.use_label_mask:
        seen &= batch["labels"] != config.eva_config.label_mask_value
    return seen.nonzero()


def _counted_forward(rank: int) -> Callable[[PeftModel, Mapping[str, Tensor]], Any]:
    """A forward of the decoder alone, without the head's logits, which gives up after `_LONGEST_SEARCH` calls."""
    calls = 0

    def forward(policy: PeftModel, batch: Mapping[str, Tensor]) -> Any:
        nonlocal calls
        calls += 1
        if calls > _LONGEST_SEARCH:
            raise InputError(
                f"adapter.init: eva found no directions that stay, in {_LONGEST_SEARCH} batches of the training pairs:"
                f" their answers say too little for rank {rank}. Lower `adapter.r`, or use `init: default`"
            )
        decoder: Any = causal_lm(policy).get_decoder()
        return decoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

    return forward
