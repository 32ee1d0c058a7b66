"""A policy as it starts, or another model, kept as a stored reference: its identity, its log-probs, spot checks."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from lorafocal import launch
from lorafocal.data.packing import PairCollator
from lorafocal.data.tokens import TokenizedPair
from lorafocal.errors import InputError, ran_out
from lorafocal.model.adapters import stands_beside
from lorafocal.model.base_config import computed
from lorafocal.model.fused import forget
from lorafocal.model.head import causal_lm
from lorafocal.model.master import arithmetic_of
from lorafocal.model.quantized import quantization_of
from lorafocal.policy import evaluating, token_logps
from lorafocal.store import COMMAND, Answer, Context, ReferenceStore, Score, answers_of
from lorafocal.tensor_files import PEFT_PREFIX, dtype_word

CHUNK_BYTES = 64 << 20  # of a tensor that are copied to the host and hashed at a time
SHARD_ROWS = 512  # pairs a part of the store: what a kill costs at most
SAY_EVERY_S = 10.0
WIDER = 4  # times the rows of a training pack, for a pass that keeps nothing for a backward
SPOT_PAIRS = 16
SLACK = 4.0  # largest difference from the store that is taken for noise, in noises
STORED_ROUNDING = 2.0**-21  # relative: what fp32 sums of a few thousand tokens may differ by when nothing else does

logger = logging.getLogger(__name__)


# ---- identity


def context_of(model: nn.Module, *, layout: str, attention: str, kernels: str) -> Context:
    """The context of a model's log-probs: of a policy before its first step, or of a separate reference.

    `attention` and `kernels` name what computes them (`trainer.kernels`), so that other kernels are another context.
    """
    quantization = quantization_of(model)
    return Context(
        weights_sha256=fingerprint(model),
        model_sha256=_architecture_sha256(model),
        quantization=quantization,
        dtype=dtype_word(arithmetic_of(model)),
        device=next(model.parameters()).device.type,
        layout=layout,
        attention=attention,
        kernels=kernels,
        torch=version("torch"),
        transformers=version("transformers"),
        bitsandbytes=version("bitsandbytes") if quantization else None,
    )


def fingerprint(policy: nn.Module) -> str:
    """Hexadecimal sha256 over name, dtype, shape and bits of every tensor that the starting policy computes with.

    Low-rank layers whose B is all zero add nothing and are left out, so that runs that differ in seed, rank or targets
    have one fingerprint, which is the base's own; names are the base's. Quantised weights count with their scales.
    """
    idle, scalings = _low_rank(policy)
    tensors = {
        _own_name(name): tensor
        for name, tensor in policy.state_dict().items()
        if isinstance(tensor, Tensor) and not name.startswith(idle) and not any(map(stands_beside, name.split(".")))
    }
    names = sorted(tensors)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets other threads run
        digests = list(pool.map(_tensor_sha256, (tensors[name] for name in names)))
    lines = [f"{name} {digest}" for name, digest in zip(names, digests, strict=True)]
    return hashlib.sha256("\n".join([*lines, *scalings]).encode()).hexdigest()


def _low_rank(policy: nn.Module) -> tuple[tuple[str, ...], list[str]]:
    """Prefixes of the low-rank tensors that change nothing, and the scalings of the others, which are no tensors."""
    idle, scalings = [], []
    for name, layer in policy.named_modules():
        for adapter in layer.lora_B if isinstance(layer, LoraLayer) else ():
            if stands_beside(adapter):
                continue
            if any(parameter.any() for parameter in layer.lora_B[adapter].parameters()):
                scalings.append(f"{_own_name(name)} scaling {adapter} {layer.scaling[adapter]}")
            else:
                idle += [f"{name}.lora_A.{adapter}.", f"{name}.lora_B.{adapter}."]
    return tuple(idle), scalings


def _own_name(name: str) -> str:
    """A tensor's name in the model alone, without what PEFT and torch.compile wrap around it."""
    return name.removeprefix(PEFT_PREFIX).replace(".base_layer", "").replace("_orig_mod.", "")


def _tensor_sha256(tensor: Tensor) -> str:
    """Of one tensor on any device, of which a piece at a time is on the host."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for piece in flat.split(CHUNK_BYTES):
        digest.update(piece.cpu().numpy())
    return digest.hexdigest()


def _architecture_sha256(model: nn.Module) -> str:
    """Of the class and the configuration, without what changes no answer."""
    base = causal_lm(model)
    content = json.dumps([type(base).__name__, computed(base.config.to_dict())], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


# ---- computing


@dataclass(frozen=True, slots=True)
class CacheReport:
    """What one of `processes` did: answers of its share that it computed and that were there, and how long it took."""

    computed: int
    found: int
    duration_s: float
    processes: int = 1

    def __str__(self) -> str:
        return (
            f"reference store: {self.computed:,} answers computed in {self.duration_s:.1f} s, {self.found:,} were there"
            + (f" (one of {self.processes} processes' shares)" if self.processes > 1 else "")
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def cache_reference(
    model: nn.Module,
    pairs: Sequence[TokenizedPair],
    store: ReferenceStore,
    *,
    collator: PairCollator,
    per_token: bool = False,
    say: Callable[[str], None] = logger.info,
    rank: int = 0,
    world: int = 1,
) -> CacheReport:
    """Compute and store what the store lacks of `pairs`: each distinct answer once.

    Packs are those of `collator`, on a GPU wider ones, and smaller again where its memory is too small for them.

    `model` is without an engine's wrapper: ranks compute shares of their own, of whole prompts, and meet at the end.
    Every `SHARD_ROWS` pairs a part is written, so that a killed call goes on where it was. Raises InputError for a
    log-prob that is not a finite number, an altered or foreign part, and a pair that alone is too much for the GPU.
    """
    start = said = time.monotonic()
    collator = _wider(collator, next(model.parameters()).device)
    prompts = dict.fromkeys(tuple(answer.prompt_ids) for answer in answers_of(pairs))
    share = {*list(prompts)[rank::world]}
    mine = [answer for answer in store.missing(pairs, per_token=per_token) if tuple(answer.prompt_ids) in share]
    rows, done = _rows(mine), 0
    if rows:
        store.check_writable()
    for first in range(0, len(rows), SHARD_ROWS):
        scores, collator = _score_within_memory(model, rows[first : first + SHARD_ROWS], collator)
        store.write(scores if per_token else [replace(one, token_logps=None) for one in scores])
        done += len(scores)
        if time.monotonic() - said > SAY_EVERY_S:
            said = time.monotonic()
            say(f"reference store: {done:,} of {len(mine):,} answers, {done / (said - start):,.1f} a second")
    launch.meet()
    asked = {answer.key for answer in answers_of(pairs) if tuple(answer.prompt_ids) in share}
    return CacheReport(len(mine), len(asked) - len(mine), time.monotonic() - start, world)


def _wider(collator: PairCollator, device: torch.device) -> PairCollator:
    """A matrix in few bits is de-quantised once a pack. Compiled layers keep the lengths they have graphs for."""
    if device.type != "cuda" or collator.bucket > 1:
        return collator
    return replace(collator, tokens_per_pack=WIDER * collator.tokens_per_pack)


def _score_within_memory(
    model: nn.Module, rows: Sequence[tuple[Answer, ...]], collator: PairCollator
) -> tuple[list[Score], PairCollator]:
    """`score`, in packs that are halved until they fit; the collator that made them is for what follows too."""
    alone = max(collator.rows_alone(_as_pair(number, row)) for number, row in enumerate(rows))
    while True:
        try:
            return score(model, rows, collator), collator
        except RuntimeError as error:
            if not ran_out(error):
                raise
            if collator.tokens_per_pack <= alone:
                raise InputError(
                    f"reference store: the device ran out of memory with one pair of {alone} token rows: lower"
                    " `data.max_length`, or quantise the base (`model.quantization`)"
                ) from error
        forget(model)
        gc.collect()  # here, not while the exception is handled: until then its frames keep the pack's tensors
        torch.cuda.empty_cache()
        collator = replace(collator, tokens_per_pack=max(alone, collator.tokens_per_pack // 2))
        logger.warning("reference store: out of memory, so packs are of %d token rows now", collator.tokens_per_pack)


def _rows(answers: Sequence[Answer]) -> list[tuple[Answer, ...]]:
    """Answers of one prompt by twos, so that they share it; an odd one alone."""
    of_prompt: dict[tuple[int, ...], list[Answer]] = {}
    for answer in answers:
        of_prompt.setdefault(tuple(answer.prompt_ids), []).append(answer)
    return [tuple(group[i : i + 2]) for group in of_prompt.values() for i in range(0, len(group), 2)]


@torch.no_grad()
def score(model: nn.Module, rows: Sequence[tuple[Answer, ...]], collator: PairCollator) -> list[Score]:
    """Log-probs of one or two answers a row, without dropout, summed in double precision."""
    device = next(model.parameters()).device
    scores = []
    with evaluating(model):
        for pack in collator(_as_pair(number, row) for number, row in enumerate(rows)).packs:
            of_answers = token_logps(model, pack.to(device)).cpu().split(pack.index.lengths.tolist())
            for place, number in enumerate(pack.pair_ids):
                for side, answer in enumerate(rows[int(number)]):
                    of_tokens = of_answers[side * pack.num_pairs + place]
                    scores.append(Score(answer, float(of_tokens.double().sum()), of_tokens))
    return scores


def _as_pair(number: int, row: tuple[Answer, ...]) -> TokenizedPair:
    first, *second = row
    rejected, turns = (second[0].completion_ids, second[0].turns) if second else ([], None)
    ids = (first.prompt_ids, first.completion_ids, rejected)
    return TokenizedPair(str(number), *ids, chosen_turns=first.turns, rejected_turns=turns)


# ---- spot checks


@dataclass(frozen=True, slots=True)
class SpotCheck:
    """How far the stored log-probs of some pairs were from a live pass, and how far live passes are from each other."""

    pairs: int
    of: int
    worst: float  # nats
    noise: float  # nats: the same answers, packed otherwise
    tolerance: float  # nats: what is taken for noise
    dtype: str

    def __str__(self) -> str:
        return (
            f"reference store: {self.pairs} of {self.of:,} pairs checked against a live pass: at most"
            f" {self.worst:.3g} nats apart; noise floor (live passes, packed otherwise) {self.noise:.3g} nats in"
            f" {self.dtype}, allowed {self.tolerance:.3g}"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def spot_check(
    model: nn.Module,
    pairs: Sequence[TokenizedPair],
    *,
    collator: PairCollator,
    seed: int,
    count: int = SPOT_PAIRS,
) -> SpotCheck:
    """Compare what was looked up for `count` random pairs with live passes of the reference.

    The noise is measured on these pairs: all together, each alone, and each answer alone; log-probs of tokens that were
    looked up are compared one by one. `model` is the policy before its first step, or the separate reference, on its
    device. Raises InputError where the store is further away.
    """
    chosen = random.Random(seed).sample(pairs, min(count, len(pairs)))
    per_token = _have_tokens(chosen)
    if per_token:  # which are never those of further answers
        chosen = [replace(pair, others=()) for pair in chosen]
    answers = list(answers_of(chosen))
    stored = _looked_up(chosen, per_token=per_token)
    if len(stored) < len(answers):
        raise InputError(f"pairs were not looked up in the reference store before they are checked: {COMMAND}")
    rows = _rows(answers)
    collator = replace(collator, others=False, differs=False, groups=(), embedding=0)
    alone = replace(collator, tokens_per_pack=1)
    passes = (
        score(model, rows, collator),
        score(model, rows, alone),
        score(model, [(answer,) for answer in answers], alone),
    )
    live = torch.stack([_scored(of_pass, answers, per_token=per_token) for of_pass in passes])
    noise = float((live.amax(0) - live.amin(0)).max())
    tolerance = _tolerance(model, noise, live, longest=max(len(answer.completion_ids) for answer in answers))
    gaps = (stored - live[0]).abs()
    worst = int(gaps.argmax())
    dtype = dtype_word(arithmetic_of(model))
    found = SpotCheck(len(chosen), len(pairs), float(gaps[worst]), noise, tolerance, dtype)
    if not gaps[worst] <= tolerance:
        whose = answers[worst].name if worst < len(answers) else "a token of a checked pair"
        raise InputError(
            f"the stored log-prob of {whose} is {float(stored[worst]):.6g} nats, a live pass gives"
            f" {float(live[0, worst]):.6g}: more than noise (of {noise:.3g} nats; {tolerance:.3g} are allowed). The"
            f" store was computed otherwise than it says: remove its folder and run {COMMAND}"
        )
    return found


def _tolerance(model: nn.Module, noise: float, live: Tensor, *, longest: int) -> float:
    """What is taken for noise, in nats, where `noise` was measured.

    Packs of one size may happen to run on the same kernels, and another machine's on others: it is at least what comes
    of one rounding a token, which add up like a random walk. int8 rounds activations as bf16 does.
    """
    rounding = torch.bfloat16 if quantization_of(model) == "int8" else arithmetic_of(model)
    return SLACK * max(noise, torch.finfo(rounding).eps * longest**0.5) + STORED_ROUNDING * float(live.abs().max())


def _have_tokens(pairs: Sequence[TokenizedPair]) -> bool:
    """Whether log-probs of tokens were looked up too."""
    return any(pair.reference_tokens is not None for pair in pairs)


def _looked_up(pairs: Sequence[TokenizedPair], *, per_token: bool) -> Tensor:
    """What pairs carry of all their answers, and with `per_token` of both answers' tokens, float64."""
    sums = [
        logps
        for pair in pairs
        for logps in (*(pair.reference or ()), *(other.reference for other in pair.others))
        if logps is not None
    ]
    tokens = [side.double() for pair in pairs if per_token for side in pair.reference_tokens or ()]
    return torch.cat([torch.tensor(sums, dtype=torch.float64), *tokens])


def _scored(scores: Sequence[Score], answers: Sequence[Answer], *, per_token: bool) -> Tensor:
    """The same of a live pass: in the order of `answers`, in which one may occur twice."""
    by_key = {one.answer.key: one for one in scores}
    found = [by_key[answer.key] for answer in answers]
    sums = torch.tensor([one.logps for one in found], dtype=torch.float64)
    tokens = [one.token_logps.double() for one in found if per_token and one.token_logps is not None]
    return torch.cat([sums, *tokens])
