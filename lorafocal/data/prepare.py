"""A config's data section to tokenised pairs: read, cleaned, split, mixed, tokenised."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lorafocal.data.sources import BadRow, Preference, read_preferences
from lorafocal.data.tokens import TokenizedData, tokenize_preferences
from lorafocal.schema import Data, Source


@dataclass(frozen=True, slots=True)
class Part:
    """The training or the held-out pairs, from rows to tokens."""

    preferences: list[Preference]
    bad_rows: list[BadRow]
    tokens: TokenizedData


def prepare_data(section: Data, tokenizer: PreTrainedTokenizerBase) -> dict[str, Part]:
    """`train`, and `eval` where the section names held-out pairs."""
    parts = {}
    for name, sources in (("train", section.sources("train")), ("eval", section.sources("eval"))):
        if sources:
            parts[name] = _part(section, sources, tokenizer)
    return parts


def _part(section: Data, sources: list[Source], tokenizer: PreTrainedTokenizerBase) -> Part:
    read = [read_preferences(Path(source.path), on_bad_row=section.on_bad_row) for source in sources]
    preferences = [preference for one in read for preference in one.pairs]
    tokens = tokenize_preferences(preferences, tokenizer, max_length=section.max_length, truncation=section.truncation)
    return Part(preferences, [row for one in read for row in one.bad_rows], tokens)
