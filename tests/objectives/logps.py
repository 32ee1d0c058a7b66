"""Log-probabilities made up for tests of objectives, in float64 unless said."""

from __future__ import annotations

from dataclasses import replace

import torch

from lorafocal.objectives import OtherAnswers, PairInputs, PairLogps, PairScores
from lorafocal.objectives.entry import Entry

LENGTHS = torch.tensor([3, 9, 1, 40, 7, 5, 8, 2, 33, 6])  # of five pairs, chosen first
SCORES = PairScores(torch.tensor([5.0, 4.5, 9.0, 0.2, 3.0]), torch.tensor([1.0, 4.0, 2.0, 0.15, 2.0]))

COLLISIONS = -LENGTHS * torch.linspace(0.2, 1.1, 10)  # sums over each answer of log sum_v pi_v^2


def made_up(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[PairLogps, PairLogps]:
    """Summed log-probs of five pairs under a policy, which takes gradients, and a reference near it."""
    generator = torch.Generator().manual_seed(seed)
    sums = [-LENGTHS[part] * (0.2 + 2 * torch.rand(5, generator=generator)) for part in (slice(5), slice(5, None))]
    policy = PairLogps(*(side.to(dtype, copy=True).requires_grad_() for side in sums))
    reference = PairLogps(*((side + 3 * torch.randn(5, generator=generator)).to(dtype) for side in sums))
    return policy, reference


def told(entry: Entry, policy: PairLogps, reference: PairLogps) -> PairInputs:
    """Everything that there is to tell of the five pairs, whatever the objective asks for."""
    per_pair = 1 if entry.others == "one" else 2
    pair = torch.arange(5).repeat_interleave(per_pair)[: 5 if per_pair == 1 else 7]  # the last pairs have no second
    draw = torch.Generator().manual_seed(5)
    logps = -40 * torch.rand(len(pair), generator=draw)
    over = 10.0 if entry.scores == "unit" else 1.0
    return PairInputs(
        policy=policy,
        reference=reference,
        lengths=LENGTHS,
        scores=PairScores(*(side / over for side in SCORES)),
        collisions=COLLISIONS,
        divergences=torch.linspace(0.5, 4.0, 10),
        guide=PairLogps(*(side + 2 * torch.randn(5, generator=draw) for side in reference)),
        others=OtherAnswers(
            logps.to(policy.chosen.dtype),
            (logps + 1.5).to(policy.chosen.dtype),
            pair,
            torch.arange(len(pair)) + 3,
            torch.rand(len(pair), generator=draw) / over,
        ),
        groups=torch.tensor([0, 2, 0, 1, 2]),
        num_groups=4,
        embeddings=torch.randn(5, 3, generator=draw),
        draws=torch.rand(5, generator=draw, dtype=torch.float64),
    )


def some(inputs: PairInputs, pairs: list[int]) -> PairInputs:
    """The given pairs alone, in that order."""
    both = [*pairs, *(pair + len(inputs.policy.chosen) for pair in pairs)]
    changes = {name: getattr(inputs, name)[both] for name in ("lengths", "collisions", "divergences")}
    changes |= {name: getattr(inputs, name)[pairs] for name in ("groups", "embeddings", "draws")}
    changes |= {
        name: type(of)(*(side[pairs] for side in of))
        for name in ("policy", "reference", "guide", "scores")
        if (of := getattr(inputs, name)) is not None
    }
    theirs = [place for pair in pairs for place, of in enumerate(inputs.others.pair.tolist()) if of == pair]
    kept = OtherAnswers(*(column[theirs] for column in inputs.others))
    new = torch.tensor([pairs.index(of) for of in kept.pair.tolist()], dtype=torch.int64)
    return replace(inputs, **changes, others=kept._replace(pair=new))
