"""A config's data section to tokenised pairs: read, cleaned, split, weighted, tokenised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorafocal.data import leave_out
from lorafocal.data.cache import cached_tokenization, default_folder
from lorafocal.data.hub import check_revision, is_hub_id, read_source
from lorafocal.data.hygiene import clean, drop_overlap, drop_unranked
from lorafocal.data.mixture import grouped_by_source, join, split_held_out, weigh
from lorafocal.data.needs import check_columns, check_like_training
from lorafocal.data.places import BadRow, OnBadRow
from lorafocal.data.ranked import pairing_of
from lorafocal.data.sources import Pairing, Preference, Preferences
from lorafocal.data.steps.apply import apply_steps
from lorafocal.data.steps.outcome import StepDone
from lorafocal.data.templates import Renderer, is_conversation
from lorafocal.data.tokens import EXAMPLES_PER_REASON, REMEDIES, TokenizedData, tokenize_preferences
from lorafocal.errors import InputError
from lorafocal.objectives import Entry
from lorafocal.schema import Data, Source
from lorafocal.schema.steps import Step

# Left out because `data.truncation` or `data.leave_out` says so, not for being bad.
ASKED_FOR = ("overlong", "prompt_fills_length", leave_out.REASON)
SEED = 0  # of splits and weights: which pairs are held out must not change with the seeds of a run


@dataclass(frozen=True, slots=True)
class SourceSummary:
    """What one source gave: its name, the forms recognised in it, and how many pairs were read."""

    name: str
    form: str
    pairs: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Why some rows are not used: how many, where the first ones are, and what to do."""

    reason: str
    count: int
    examples: tuple[str, ...]
    remedy: str

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.examples) else ""
        return f"{self.count} {self.reason} ({listed(self.examples)}{more}): {self.remedy}"


@dataclass(frozen=True, slots=True)
class Part:
    """The training or the held-out pairs, from rows to tokens."""

    sources: tuple[SourceSummary, ...]
    preferences: list[Preference]
    bad_rows: list[BadRow]  # left out by reading and cleaning; what tokenising drops is in `tokens`
    tokens: TokenizedData
    steps: tuple[StepDone, ...] = ()  # what was done to them, of `data.steps`

    @property
    def drops(self) -> tuple[Drop, ...]:
        """Everything left out, the most frequent reason first."""
        rows: dict[str, list[BadRow]] = {}
        for row in self.bad_rows:
            rows.setdefault(row.reason, []).append(row)
        read = [
            Drop(reason, len(bad), tuple(row.place for row in bad[:EXAMPLES_PER_REASON]), bad[0].message)
            for reason, bad in rows.items()
        ]
        tokenized = [
            Drop(reason, count, tuple(self.tokens.examples[reason]), self._remedy(reason))
            for reason, count in self.tokens.drops.items()
        ]
        return tuple(sorted(read + tokenized, key=lambda drop: -drop.count))

    def _remedy(self, reason: str) -> str:
        """What to do about pairs that tokenising dropped, with what was found at the first of them."""
        found = self.tokens.details.get(reason)
        return f"{REMEDIES[reason]} (found first: {found})" if found else REMEDIES[reason]

    def __str__(self) -> str:
        """For the notes of a run: what was read, what is used, what was left out and why."""
        read = "; ".join(f"{source.name} ({source.form}, {source.pairs} read)" for source in self.sources)
        lines = [f"{len(self.tokens.pairs)} pairs, from {read}", *(f"  left out: {drop}" for drop in self.drops)]
        lines += [f"  step {number}, {step}" for number, step in enumerate(self.steps, start=1)]
        return "\n".join(lines)


def listed(places: Sequence[str]) -> str:
    """Places with what they share said once: `pairs.jsonl, row 3, 5, 8`."""
    starts = {place.rpartition(" ")[0] for place in places}
    if len(starts) > 1 or not all(place.rpartition(" ")[2].isdigit() for place in places):
        return "; ".join(places)
    return f"{starts.pop()} {', '.join(place.rpartition(' ')[2] for place in places)}" if places else ""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Pairs that were read and cleaned, and what they need to be weighted."""

    sources: tuple[SourceSummary, ...]
    preferences: Preferences
    source_of: dict[str, int]
    weights: list[float]
    left_out: frozenset[str] = frozenset()  # ids that a list names: told among the bad rows, gone once weighted
    steps: tuple[StepDone, ...] = ()


def template_notes(parts: Mapping[str, Part], section: Data, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a person should know about these rows and this tokenizer's chat template."""
    return [note for note in (dated_template(parts, section, tokenizer), past_template(parts, tokenizer)) if note]


def dated_template(parts: Mapping[str, Part], section: Data, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A word on templates that write today's date: the same rows give other tokens tomorrow."""
    talks = any(is_conversation(pair) for part in parts.values() for pair in part.preferences)
    if not talks or not Renderer(tokenizer, section.chat_template_kwargs).writes_date:
        return None
    return (
        "the chat template writes today's date into prompts, so the same rows give other tokens tomorrow, and a run"
        " cannot be resumed then; state a date by data.chat_template_kwargs, such as {date_string: 26 Jul 2024}"
    )


def past_template(parts: Mapping[str, Part], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A word on plain text beside a chat template: a chat model would be trained on what it never sees in use."""
    plain = sum(not is_conversation(pair) for part in parts.values() for pair in part.preferences)
    if not tokenizer.chat_template or not plain:
        return None
    return (
        f"{plain} pairs are plain text, which this tokenizer's chat template is not applied to; if the model is to"
        " chat, state form: single_turn, or give the rows as messages"
    )


def check_sources(section: Data) -> None:
    """Look for the files before anything else is loaded: it costs nothing. Raises InputError naming the key."""
    if section.leave_out is not None:
        leave_out.read_list(Path(section.leave_out))
    for number, step in enumerate(section.steps or ()):
        scores = getattr(step.settings, "scores", None) if step.flip is None else None
        if scores is not None and not Path(scores).is_file():
            raise InputError(
                f"data.steps.{number}.{step.name}.scores: {scores} is no file; score the training pairs first"
            )
    for name in ("train", "eval"):
        for source in section.sources(name):
            if is_hub_id(source.path):
                check_revision(source.path, source.revision)
            elif not Path(source.path).exists():
                raise InputError(f"data.{name}: {source.path} does not exist; it names a file of preference rows")


def prepare_data(
    section: Data, tokenizer: PreTrainedTokenizerBase, *, objective: Entry | None = None
) -> dict[str, Part]:
    """`train`, and `eval` where the section names held-out pairs or asks for some of the training pairs.

    Pairs of all sources are cleaned together; held-out pairs are taken before sources are weighted, and training pairs
    with a held-out prompt go, then those that `leave_out` names: what is held out stays the same. Then come the
    `steps`, of which `pairs` alone concerns held-out rows too. An `objective` gets
    what it asks for beside a pair, and pairs whose scores it cannot use are left out. Raises InputError for what cannot
    be read, for a pair without what is asked for, and for any bad row where `on_bad_row: error` says so.
    """
    check_noise(section, objective)
    pairing = pairing_of(section.steps)
    train = _read(section.sources("train"), section.on_bad_row, objective, pairing)
    held_out = _read(section.sources("eval"), section.on_bad_row, objective, pairing) if section.eval else None
    if section.held_out is not None:
        rest, taken = split_held_out(train.preferences, section.held_out, seed=SEED)
        train = _Rows(train.sources, rest, train.source_of, train.weights)
        held_out = _Rows(train.sources, taken, train.source_of, [1.0] * len(train.weights))
    elif held_out is not None:
        apart = drop_overlap(train.preferences, held_out.preferences, on_bad_row=section.on_bad_row)
        train = _Rows(train.sources, apart, train.source_of, train.weights)
    if section.leave_out is not None:
        flips = any(step.flip is not None for step in section.steps or ())
        train = _without_named(train, Path(section.leave_out), held_out, flips=flips)
    if section.steps is not None:
        train = _after_steps(train, section.steps)
    rows = {"train": train} | ({} if held_out is None else {"eval": held_out})
    parts = {name: _tokenized(section, part, tokenizer, objective) for name, part in rows.items()}
    if objective is not None and "eval" in parts:
        check_like_training(parts["eval"].tokens.pairs, parts["train"].tokens.pairs, "data.eval", objective)
    return parts


def check_noise(section: Data, objective: Entry | None) -> None:
    """An objective of scores cannot use pairs that a flip leaves scored the wrong way round. Raises InputError."""
    for number, step in enumerate(section.steps or ()):
        if step.flip is not None and step.flip.scores == "follow" and objective is not None and objective.scores:
            raise InputError(
                f"data.steps.{number}.flip.scores: the objective is a loss of both scores, which would still tell the"
                " right label; say scores: stay, for a judge that is as wrong"
            )


def _after_steps(train: _Rows, steps: Sequence[Step]) -> _Rows:
    """The training pairs after `data.steps`; those that a list leaves out take no part, and are gone."""
    left = [pair for pair in train.preferences.pairs if pair.id not in train.left_out]
    pairs, done = apply_steps(steps, left, read=len({pair.place for pair in left}))
    return replace(train, preferences=replace(train.preferences, pairs=pairs), left_out=frozenset(), steps=done)


def _read(
    sources: Sequence[Source], on_bad_row: OnBadRow, objective: Entry | None, pairing: Pairing | None = None
) -> _Rows:
    read = [
        read_source(
            source.path,
            form=source.form,
            columns=source.columns,
            revision=source.revision,
            split=source.split,
            on_bad_row=on_bad_row,
            pairing=pairing,
        )
        for source in sources
    ]
    joined = join(read)
    summaries = tuple(
        SourceSummary(source.path if is_hub_id(source.path) else Path(source.path).name, one.form, len(one.pairs))
        for source, one in zip(sources, read, strict=True)
    )
    preferences = clean(joined.preferences, on_bad_row=on_bad_row)
    if objective is not None and objective.scores:
        preferences = drop_unranked(preferences, objective.scores, on_bad_row=on_bad_row)
    if objective is not None and objective.groups:
        names = [source.path for source in sources]
        preferences = grouped_by_source(preferences, joined.source_of, names)
    return _Rows(summaries, preferences, dict(joined.source_of), [source.weight for source in sources])


def _without_named(train: _Rows, path: Path, held_out: _Rows | None, *, flips: bool) -> _Rows:
    kept_back = held_out.preferences.pairs if held_out else ()
    named = leave_out.named_pairs(path, train.preferences.pairs, kept_back, flips=flips)
    told = [*train.preferences.bad_rows, *(leave_out.bad_row(pair, path) for pair in named)]
    preferences = replace(train.preferences, bad_rows=told)
    return replace(train, preferences=preferences, left_out=frozenset(pair.id for pair in named))


def _tokenized(section: Data, rows: _Rows, tokenizer: PreTrainedTokenizerBase, objective: Entry | None) -> Part:
    weighted = weigh(rows.preferences, rows.source_of, rows.weights, seed=SEED, without=rows.left_out)
    options: dict[str, Any] = {
        "max_length": section.max_length,
        "max_prompt_length": section.max_prompt_length,
        "truncation": section.truncation,
        "chat_template_kwargs": section.chat_template_kwargs or None,
    }
    if objective is not None:
        check_columns(weighted.pairs, lambda pair: pair.where, objective)
    if objective is not None and objective.others:
        options["others"] = True
    if section.cache:
        tokens = cached_tokenization(weighted.pairs, tokenizer, folder=default_folder(), **options)
    else:
        tokens = tokenize_preferences(weighted.pairs, tokenizer, **options)
    part = Part(rows.sources, weighted.pairs, weighted.bad_rows, tokens, rows.steps)
    refused = [drop for drop in part.drops if drop.reason not in ASKED_FOR]
    if section.on_bad_row == "error" and refused:
        raise InputError(f"{refused[0].examples[0]}: {refused[0].remedy}")
    return part
