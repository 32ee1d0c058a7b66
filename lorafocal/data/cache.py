"""Tokenised data on disk, found by its content: whatever could change a token is part of the name.

An entry is `<key>.safetensors` with the ids and, written after it, `<key>.json` with the counts and the digest of
both. Either is complete or absent, equal content gives equal bytes, and so any number of processes may write the
same entry at once. What does not match its digest is passed over and written again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save
from transformers import PreTrainedTokenizerBase

from lorafocal.data.encoding import Encoder
from lorafocal.data.sources import Preference
from lorafocal.data.tokens import (
    SIDES,
    TURNS,
    OtherAnswer,
    TokenizedData,
    TokenizedPair,
    tokenize_preferences,
    with_columns,
)
from lorafocal.publish import write_atomically
from lorafocal.versions import installed

SCHEMA = 4  # raise it when equal inputs come to give other tokens, or an entry another shape
LIBRARIES = ("lorafocal", "transformers", "tokenizers", "jinja2")
OF_OTHERS = ("prompt_ids", "completion_ids")

logger = logging.getLogger(__name__)


def default_folder() -> Path:
    """`$LORAFOCAL_CACHE`, or `lorafocal` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get("LORAFOCAL_CACHE"):
        return Path(own)
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "lorafocal"


def cached_tokenization(
    preferences: Iterable[Preference], tokenizer: PreTrainedTokenizerBase, *, folder: Path, **options: Any
) -> TokenizedData:
    """What `tokenize_preferences(preferences, tokenizer, **options)` gives, from disk if it was there before.

    A tokenizer without a serialisable backend is not cached: its behaviour has no name. A folder that cannot be
    written costs the next run its time, and a warning here.
    """
    preferences = list(preferences)
    if not getattr(tokenizer, "is_fast", False) or not _told_apart(preferences):
        return tokenize_preferences(preferences, tokenizer, **options)
    key = cache_key(preferences, tokenizer, options)
    data = read_entry(folder, key, preferences)
    if data is None:
        data = tokenize_preferences(preferences, tokenizer, **options)
        try:
            write_entry(folder, key, data, preferences)
        except OSError as error:
            logger.warning("tokenised data could not be kept in the cache (%s)", error.strerror or error)
    return data


def _told_apart(preferences: Sequence[Preference]) -> bool:
    """Whether groups and embeddings, which are not kept, find their pairs again by id."""
    beside = any(preference.group is not None or preference.embedding is not None for preference in preferences)
    return not beside or len({preference.id for preference in preferences}) == len(preferences)


# ---- the key


def cache_key(preferences: Sequence[Preference], tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> str:
    """Hexadecimal sha256 of all that tokens depend on: rows, tokenizer, template, options, versions, our schema.

    A template that writes the date gives another key on another day: what it writes for fixed conversations is
    part of it.
    """
    given = dict(options.get("chat_template_kwargs") or {})
    encoder = Encoder.of(tokenizer, given)  # leaves the backend without the truncation or padding of an earlier call
    content = {
        "schema": SCHEMA,
        "versions": {name: installed(name) for name in LIBRARIES},
        "options": {name: value for name, value in options.items() if value is not None}
        | {"chat_template_kwargs": given},
        "class": type(tokenizer).__qualname__,
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
        "rendered": encoder.renderer.probe_texts if tokenizer.chat_template else (),
    }
    digest = hashlib.sha256(_canonical(content))
    digest.update(hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).digest())
    for preference in preferences:
        row = [preference.prompt, preference.chosen, preference.rejected, preference.id]
        further = [[other.answer, other.prompt, other.score] for other in preference.others]
        read = [further] if options.get("others") else []
        digest.update(_canonical([*row, preference.score_chosen, preference.score_rejected, *read]) + b"\n")
    return digest.hexdigest()


def _canonical(content: Any) -> bytes:
    """The same bytes for the same content; ASCII, so that half a surrogate pair has a spelling too."""
    return json.dumps(content, sort_keys=True, ensure_ascii=True).encode("ascii")


# ---- an entry


def write_entry(folder: Path, key: str, data: TokenizedData, preferences: Sequence[Preference]) -> None:
    """Keeps `data` under `key`. Rows are named by number: their places may be others the next time."""
    folder.mkdir(parents=True, exist_ok=True)
    row_of_place = {preference.where: row for row, preference in enumerate(preferences)}
    tensors: dict[str, Any] = {}
    for side in SIDES:
        tensors |= _joined(side, [getattr(pair, side) for pair in data.pairs])
    others = [other for pair in data.pairs for other in pair.others]
    for side in OF_OTHERS if others else ():
        tensors |= _joined(f"others.{side}", [getattr(other, side) for other in others])
    for side in TURNS:
        turns = [getattr(pair, side) for pair in data.pairs]
        if any(told is not None for told in turns):
            tensors |= _joined(side, [told or [] for told in turns])
    tokens = save(tensors)
    counts = {
        "key": key,
        "tokens_sha256": hashlib.sha256(tokens).hexdigest(),
        "pairs": [[pair.id, pair.score_chosen, pair.score_rejected] for pair in data.pairs],
        "drops": data.drops,
        "examples": {reason: [row_of_place[place] for place in places] for reason, places in data.examples.items()},
        "details": data.details,
        "seam_merges": data.seam_merges,
        "cut": data.cut,
    }
    if others:
        counts["others"] = [[other.score for other in pair.others] for pair in data.pairs]
    entry = {"counts": counts, "sha256": hashlib.sha256(_canonical(counts)).hexdigest()}
    write_atomically(folder / f"{key}.safetensors", tokens)
    write_atomically(folder / f"{key}.json", json.dumps(entry))


def read_entry(folder: Path, key: str, preferences: Sequence[Preference]) -> TokenizedData | None:
    """What was kept under `key`, or None where it is missing or damaged."""
    try:
        entry = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        tokens = (folder / f"{key}.safetensors").read_bytes()
        if not is_whole(entry, tokens, key):
            return None
        tensors = load(tokens)
    except (OSError, ValueError, SafetensorError):
        return None
    counts = entry["counts"]
    examples = {reason: [preferences[row].where for row in rows] for reason, rows in counts["examples"].items()}
    pairs = _pairs(tensors, counts["pairs"])
    if "others" in counts:
        pairs = _with_others(pairs, tensors, counts["others"])
    rows = {preference.id: preference for preference in preferences}
    return TokenizedData(
        pairs=[with_columns(pair, rows[pair.id]) for pair in pairs],
        examples=examples,
        **{name: counts[name] for name in ("drops", "details", "seam_merges", "cut")},
    )


def is_whole(entry: Any, tokens: bytes, key: str) -> bool:
    """Whether both files are those that were written under this key."""
    if not isinstance(entry, dict) or not isinstance(entry.get("counts"), dict):
        return False
    counts = entry["counts"]
    return (
        entry.get("sha256") == hashlib.sha256(_canonical(counts)).hexdigest()
        and counts.get("key") == key
        and counts.get("tokens_sha256") == hashlib.sha256(tokens).hexdigest()
    )


def _pairs(tensors: Mapping[str, Any], named: Sequence[tuple[str, float | None, float | None]]) -> list[TokenizedPair]:
    sides = [_split(tensors, side) for side in SIDES]
    no_turns: list[list[int]] = [[] for _ in named]
    told = [_split(tensors, side) if side in tensors else no_turns for side in TURNS]
    turns = [[one or None for one in side] for side in told]
    columns: Any = zip(named, zip(*sides, strict=True), zip(*turns, strict=True), strict=True)
    return [
        TokenizedPair(name, *ids, *scores, **dict(zip(TURNS, of_answers, strict=True)))
        for (name, *scores), ids, of_answers in columns
    ]


def _with_others(
    pairs: Sequence[TokenizedPair], tensors: Mapping[str, Any], scores: Sequence[Sequence[float | None]]
) -> list[TokenizedPair]:
    """The pairs with their further answers, of which `scores` has one each."""
    ids = zip(*(_split(tensors, f"others.{side}") for side in OF_OTHERS), strict=True)
    whole = []
    for pair, own in zip(pairs, scores, strict=True):
        others = []
        for score, (prompt, completion) in zip(own, ids, strict=False):
            same = prompt == pair.prompt_ids  # one list for all
            others.append(OtherAnswer(pair.prompt_ids if same else prompt, completion, score))
        whole.append(replace(pair, others=tuple(others)) if others else pair)
    return whole


def _joined(name: str, lists: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Lists of numbers as one, and where each ends."""
    return {
        name: np.array([number for one in lists for number in one], np.int32),
        f"{name}.ends": np.array(list(accumulate(map(len, lists))), np.int64),
    }


def _split(tensors: Mapping[str, Any], side: str) -> list[list[int]]:
    numbers = tensors[side].tolist()
    return [numbers[start:end] for start, end in pairwise([0, *tensors[f"{side}.ends"].tolist()])]
