"""Held-out pairs as token ids: what a run keeps so that a merge can later be checked on the very same
tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorafocal.data.sources import Preference, read_preferences
from lorafocal.data.templates import is_conversation
from lorafocal.data.tokens import SIDES, TURNS, TokenizedPair, tokenize_preferences
from lorafocal.data.turns import is_sound
from lorafocal.errors import InputError
from lorafocal.publish import write_atomically

HELD_OUT_FILE = "held_out.jsonl"


def write_held_out(path: Path, pairs: Iterable[TokenizedPair]) -> None:
    """One JSON object a line: `{"id", "prompt_ids", "chosen_ids", "rejected_ids"}`, with turns where there are several.

    The file is whole or as it was.

    `chosen_turns` and `rejected_turns` are those of a `TokenizedPair`.
    """
    lines = []
    for pair in pairs:
        record = {"id": pair.id} | {side: list(getattr(pair, side)) for side in SIDES}
        record |= {side: turns for side in TURNS if (turns := getattr(pair, side)) is not None}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_atomically(path, "".join(lines))


def read_held_out(path: Path) -> list[TokenizedPair]:
    """Read what `write_held_out` wrote. Raises InputError naming file and line."""
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not JSON ({error}). Write one object a line.") from error
        pairs.append(_pair(record, f"{path}:{number}"))
    if not pairs:
        raise InputError(f"{path} holds no pairs. Name a file of pairs with --pairs FILE.")
    return pairs


@dataclass(frozen=True, slots=True)
class LoadedPairs:
    """Pairs of a file in order, and how many of its rows were left out: malformed, or dropped by a rule of tokens.

    `rows` are those that were read; none of a file of token ids.
    """

    pairs: list[TokenizedPair]
    left_out: int = 0
    rows: Sequence[Preference] = ()


def load_pairs(path: Path, tokenizer: PreTrainedTokenizerBase, **tokenization: Any) -> LoadedPairs:
    """Pairs of either form: token ids as `write_held_out` leaves them, or preference rows to be tokenised.

    Rows are tokenised by `tokenization`, the settings that training gave to `tokenize_preferences`. Raises
    InputError for a file that is missing, malformed, leaves no pair, or has ids outside the vocabulary.
    """
    if not path.is_file():
        raise InputError(f"{path} is no file; pairs are a file of preference rows, or the held_out.jsonl of a run.")
    if _holds_token_ids(path):
        loaded = LoadedPairs(read_held_out(path))
    else:
        read = read_preferences(path)
        if not any(map(is_conversation, read.pairs)):
            tokenization.pop("chat_template_kwargs", None)  # plain rows beside a run of conversations
        pairs = tokenize_preferences(read.pairs, tokenizer, **tokenization).pairs
        loaded = LoadedPairs(pairs, len(read.bad_rows) + len(read.pairs) - len(pairs), read.pairs)
    vocabulary = len(tokenizer)
    for pair in loaded.pairs:
        highest = max(max(getattr(pair, side)) for side in SIDES)
        if highest >= vocabulary:
            raise InputError(
                f"{path}: pair {pair.id} has token id {highest}, but the tokenizer ends at {vocabulary - 1}: "
                "these pairs were tokenised for another model."
            )
    return loaded


def _holds_token_ids(path: Path) -> bool:
    """Whether the first line is an object with `prompt_ids`; anything else is left to the reader of
    preference rows."""
    if path.suffix != ".jsonl":
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        try:
            first = json.loads(file.readline(2**24))
        except (json.JSONDecodeError, RecursionError):
            return False
    return isinstance(first, dict) and "prompt_ids" in first


def _pair(record: object, where: str) -> TokenizedPair:
    if not isinstance(record, dict) or not isinstance(record.get("id"), str):
        raise InputError(
            f'{where}: expected an object {{"id": text, "prompt_ids": [...], "chosen_ids": [...],'
            ' "rejected_ids": [...]}.'
        )
    for side in SIDES:
        ids = record.get(side)
        if not isinstance(ids, list) or not ids or not all(type(token) is int and token >= 0 for token in ids):
            raise InputError(f"{where}: {side} must be a list of at least one token id.")
    turns = {side: record[side] for side in TURNS if record.get(side) is not None}
    for side, told in turns.items():
        known = isinstance(told, list) and all(type(turn) is int for turn in told)
        if not known or not is_sound(record[side.replace("turns", "ids")], told):
            raise InputError(
                f"{where}: {side} must give each token its turn: 0 first, then numbers that rise by one at most, -1"
                " between turns for what is not scored."
            )
    return TokenizedPair(record["id"], *(record[side] for side in SIDES), **turns)
