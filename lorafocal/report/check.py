"""What a config's data hold, before anything is trained: counts, lengths, drops, biases, and one pair as it is scored.

Needs the tokenizer only, no weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorafocal.config import Config
from lorafocal.data.bins import fill_bins
from lorafocal.data.hygiene import ScoreOrder, score_order
from lorafocal.data.places import printable
from lorafocal.data.prepare import Drop, Part, SourceSummary, check_sources, prepare_data, template_notes
from lorafocal.data.tokens import TokenizedPair
from lorafocal.data.turns import CONTEXT, Turns
from lorafocal.memory import MAX_TOKENS
from lorafocal.model.load import load_tokenizer

QUANTILES = (0.0, 0.05, 0.5, 0.95, 0.99, 1.0)
PADDED_BATCH = 8  # pairs a padded batch in the comparison, the default of TRL's trainer
FEW_PAIRS = 100  # held-out pairs below which an accuracy is within 10 points at best
LENGTH_BIAS = 0.6  # from here on "the longer answer is better" explains much of the data


@dataclass(frozen=True, slots=True)
class Savings:
    """Token rows of one epoch under three layouts; fewer is less work."""

    packed: int  # prompts once a pair, no padding
    unshared: int  # prompts twice, no padding
    padded: int  # prompts twice, batches of PADDED_BATCH pairs padded to their longest sequence
    packs: int
    steps: int

    @property
    def sharing(self) -> float:
        """Share of the unpadded rows that shared prompts leave out."""
        return 1 - self.packed / self.unshared

    @property
    def total(self) -> float:
        """Share of the padded rows that sharing and packing leave out."""
        return 1 - self.packed / self.padded


@dataclass(frozen=True, slots=True)
class LengthBias:
    """How far length alone tells chosen from rejected, in tokens."""

    chosen_longer: float  # share of pairs
    equal: float
    mean_difference: float  # chosen minus rejected, tokens

    @property
    def longer_wins(self) -> float:
        """Accuracy of the rule "the longer answer is the better one", equal lengths by a coin."""
        return self.chosen_longer + self.equal / 2


@dataclass(frozen=True, slots=True)
class ShownPair:
    """One pair token by token; the answers' tokens are the scored ones."""

    id: str
    prompt: tuple[str, ...]
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    chosen_context: tuple[int, ...] = ()  # places of what is read and not scored, between several turns
    rejected_context: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PartCheck:
    """The findings on the training or the held-out pairs."""

    name: str
    sources: tuple[SourceSummary, ...]
    pairs: int
    left_out: int
    drops: tuple[Drop, ...]
    cut: int
    seam_merges: int
    lengths: Mapping[str, Mapping[str, float]]
    bias: LengthBias
    scores: ScoreOrder
    savings: Savings


@dataclass(frozen=True, slots=True)
class CheckReport:
    """All findings on a config's data."""

    config: str
    parts: tuple[PartCheck, ...]
    notes: tuple[str, ...]
    pair: ShownPair

    def as_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return asdict(self)

    def table(self) -> str:
        """For a person at a terminal."""
        return "\n\n".join([*map(part_text, self.parts), pair_text(self.pair), *self.notes_text()])

    def notes_text(self) -> list[str]:
        return ["\n".join(f"note: {note}" for note in self.notes)] if self.notes else []


def check_data(config: Config) -> CheckReport:
    """Read and tokenise as `train` would, and report. Raises InputError as `train` would."""
    check_sources(config.data)
    tokenizer = load_tokenizer(config.model.name, config.model.revision)
    data = prepare_data(config.data, tokenizer, objective=config.objective.entry)
    parts = tuple(check_part(name, part, config) for name, part in data.items())
    done = data["train"].steps
    notes = [f"train: step {number}, {step}" for number, step in enumerate(done, start=1)]
    notes += [note for part in parts for note in part_notes(part)]
    notes += template_notes(data, config.data, tokenizer)
    return CheckReport(config.name, parts, tuple(notes), shown_pair(data["train"].tokens.pairs, tokenizer))


def check_part(name: str, part: Part, config: Config) -> PartCheck:
    """The findings on one part."""
    pairs = part.tokens.pairs
    scores = score_order(part.preferences)
    tokens = config.packing.tokens
    budget = tokens if isinstance(tokens, int) else MAX_TOKENS  # auto depends on a device that is not asked here
    return PartCheck(
        name,
        part.sources,
        len(pairs),
        sum(drop.count for drop in part.drops),
        part.drops,
        part.tokens.cut,
        part.tokens.seam_merges,
        {
            side: quantiles([len(getattr(pair, f"{side}_ids")) for pair in pairs])
            for side in ("prompt", "chosen", "rejected")
        },
        length_bias(pairs),
        scores,
        savings(pairs, config.training.pairs_per_step, budget),
    )


def quantiles(lengths: Sequence[int]) -> dict[str, float]:
    """Mean and `QUANTILES` (nearest rank) of lengths in tokens."""
    ranked = sorted(lengths)
    at = {f"{q:.0%}": float(ranked[round(q * (len(ranked) - 1))]) for q in QUANTILES}
    return {"mean": fmean(ranked), **at}


def length_bias(pairs: Sequence[TokenizedPair]) -> LengthBias:
    """Whether the chosen answers are simply the longer ones."""
    differences = [chosen - rejected for chosen, rejected in (pair.scored_tokens for pair in pairs)]
    return LengthBias(
        sum(difference > 0 for difference in differences) / len(pairs),
        sum(difference == 0 for difference in differences) / len(pairs),
        fmean(differences),
    )


def savings(pairs: Sequence[TokenizedPair], pairs_per_step: int, tokens_per_pack: int) -> Savings:
    """Token rows of one epoch in the order of the rows; a shuffled epoch pads alike."""
    steps = [pairs[start : start + pairs_per_step] for start in range(0, len(pairs), pairs_per_step)]
    packed = sum(pair.shared_length for pair in pairs)
    return Savings(
        packed,
        packed + sum(len(pair.prompt_ids) for pair in pairs),
        sum(
            sum(2 + len(pair.others) for pair in batch) * max(pair.longest for pair in batch)
            for start in range(0, len(pairs), PADDED_BATCH)
            for batch in [pairs[start : start + PADDED_BATCH]]
        ),
        sum(len(fill_bins([pair.shared_length for pair in step], tokens_per_pack)) for step in steps),
        len(steps),
    )


def part_notes(part: PartCheck) -> Iterable[str]:
    """What a person should think about before training."""
    wins = part.bias.longer_wins
    noise = 1 / math.sqrt(part.pairs)  # two standard errors of a share near one half
    if abs(wins - 0.5) > max(LENGTH_BIAS - 0.5, noise):
        which = "longer" if wins > 0.5 else "shorter"
        yield (
            f'{part.name}: the rule "the {which} answer is better" ranks {max(wins, 1 - wins):.0%} of the pairs right,'
            " so a model may learn length in place of quality; compare results with that rule, or balance the lengths"
        )
    if part.name == "eval" and part.pairs < FEW_PAIRS:
        yield (
            f"eval: {part.pairs} held-out pairs tell an accuracy to {100 * noise:.0f} points either way (95%); hold out"
            " more where small changes matter"
        )
    if part.scores.inversions:
        yield (
            f"{part.name}: {part.scores.inversions} pairs score the chosen answer below the rejected one; look at them:"
            " their answers may be swapped"
        )
    if part.scores.ties:
        yield f"{part.name}: {part.scores.ties} pairs score both answers alike, so which one was chosen is noise"
    if part.cut:
        yield f"{part.name}: {part.cut} pairs were cut to their lengths; an answer that lost its end teaches no stop"


def shown_pair(pairs: Sequence[TokenizedPair], tokenizer: PreTrainedTokenizerBase) -> ShownPair:
    """A short pair (the shortest tenth's longest), token by token as text."""
    pair = sorted(pairs, key=lambda pair: pair.shared_length)[len(pairs) // 10]

    def texts(ids: Sequence[int]) -> tuple[str, ...]:
        """Token by token, tokens that share a character together."""
        shown, waiting = [], []
        for token in ids:
            waiting.append(token)
            text = tokenizer.decode(waiting)
            if not text.endswith("\ufffd"):
                shown.append(text)
                waiting = []
        return (*shown, tokenizer.decode(waiting)) if waiting else tuple(shown)

    def told(ids: Sequence[int], turns: Turns) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Texts run by run, and the places of those that are not scored."""
        shown: list[str] = []
        context: list[int] = []
        for turn, run in groupby(zip(ids, turns or [0] * len(ids), strict=True), key=lambda token: token[1]):
            new = texts([token for token, _ in run])
            context += range(len(shown), len(shown) + len(new)) if turn == CONTEXT else ()
            shown += new
        return tuple(shown), tuple(context)

    chosen, chosen_context = told(pair.chosen_ids, pair.chosen_turns)
    rejected, rejected_context = told(pair.rejected_ids, pair.rejected_turns)
    return ShownPair(pair.id, texts(pair.prompt_ids), chosen, rejected, chosen_context, rejected_context)


# ---- as text


def part_text(part: PartCheck) -> str:
    """The findings on one part, for a terminal."""
    saved = part.savings
    lines = [
        f"{part.name}: {part.pairs} pairs, {part.left_out} left out ({'; '.join(map(source_text, part.sources))})",
        *(f"  left out       {drop}" for drop in part.drops),
        "  tokens        " + "".join(f"{name:>9}" for name in ("mean", *(f"{q:.0%}" for q in QUANTILES))),
        *(
            f"  {side:<14}" + "".join(f"{value:>9.0f}" for value in values.values())
            for side, values in part.lengths.items()
        ),
        f"  longer answer  {part.bias.chosen_longer:.1%} chosen, {part.bias.equal:.1%} equal;"
        f" chosen minus rejected {part.bias.mean_difference:+.1f} tokens on average",
        f"  one epoch      {saved.steps} steps in {saved.packs} packs, {saved.packed:,} token rows:"
        f" {saved.sharing:.0%} fewer by shared prompts, {saved.total:.0%} fewer than {saved.padded:,} in padded"
        f" batches of {PADDED_BATCH} pairs",
    ]
    return "\n".join(lines)


def source_text(source: SourceSummary) -> str:
    return f"{source.name}: {source.form}"


def pair_text(pair: ShownPair) -> str:
    """The pair as the model reads it; what stands between the marks is scored."""
    return "\n".join(
        [
            f"one pair as the model reads it ({pair.id}); the tokens between ⟦ and ⟧ are scored",
            "prompt    " + shortened("".join(pair.prompt)),
            "chosen    " + bracketed(pair.chosen, pair.chosen_context),
            "rejected  " + bracketed(pair.rejected, pair.rejected_context),
        ]
    )


def bracketed(tokens: Sequence[str], context: Sequence[int]) -> str:
    """A completion with marks around what is scored of it."""
    runs = groupby(enumerate(tokens), key=lambda token: token[0] in context)
    texts = [(unscored, shortened("".join(text for _, text in run))) for unscored, run in runs]
    return "".join(text if unscored else f"⟦{text}⟧" for unscored, text in texts)


def shortened(text: str, limit: int = 600) -> str:
    """Line feeds and whatever else a terminal would act upon made visible, the middle of a long text left out."""
    text = printable(text.replace("\n", "⏎"))
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"
