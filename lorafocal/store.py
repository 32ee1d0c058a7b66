"""Reference log-probs on disk, found by content: what was scored, inside a context of all that changes its score.

A context is a folder with its `context.json` and parts. A part is a safetensors file that is named by the sha256 of
its bytes and complete or absent, so any number of processes may write at once, and a kill loses the part in the making.
An answer that is missing, altered or of another context is refused by name: there is no default for it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lorafocal.data.tokens import TokenizedPair
from lorafocal.data.turns import CONTEXT, Turns
from lorafocal.errors import InputError
from lorafocal.publish import text_sha256, write_atomically

VERSION = 1  # raise it when equal contexts come to give other log-probs, or a part another shape
CONTEXT_FILE = "context.json"
COMMAND = "`lorafocal cache-reference CONFIG`, overrides as here (in Python: `trainer.cache_reference()`)"


@dataclass(frozen=True, slots=True)
class Context:
    """All that changes what a reference answers, beside the tokens: two that differ in a field share nothing."""

    weights_sha256: str  # of every tensor that it computes with, dtypes included
    model_sha256: str  # of its class and configuration
    quantization: str | None
    dtype: str  # what it computes in
    device: str  # the type: cpu, cuda
    layout: str
    attention: str
    kernels: str  # in words: fused, compiled
    torch: str
    transformers: str
    bitsandbytes: str | None
    version: int = VERSION

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def sha256(self) -> str:
        return text_sha256(json.dumps(self.as_dict(), sort_keys=True))

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """The fields of another context that are not as here, each as "field: there, here here"."""
        return [
            f"{field.name} is {_short(other.get(field.name))} there and {_short(getattr(self, field.name))} here"
            for field in fields(self)
            if other.get(field.name) != getattr(self, field.name)
        ]


def _short(value: object) -> str:
    """Digests by their first letters."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value)


def sequence_key(prompt_ids: Sequence[int], completion_ids: Sequence[int], turns: Turns = None) -> bytes:
    """sha256 over the prompt's and the completion's token ids, where one ends, and which are not scored, if any."""
    context = [] if turns is None else [CONTEXT, *(place for place, turn in enumerate(turns) if turn == CONTEXT)]
    ids = np.array([len(prompt_ids), *prompt_ids, *completion_ids, *context], "<i8")
    return hashlib.sha256(ids.tobytes()).digest()


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion to be scored; `name` says whose it is, for messages."""

    key: bytes
    prompt_ids: list[int]
    completion_ids: list[int]
    name: str
    turns: Turns = None  # which of its tokens are scored, `data/turns.py`


def answers_of(pairs: Iterable[TokenizedPair]) -> Iterator[Answer]:
    """Both answers of each pair, the chosen one first, then its further ones."""
    for pair in pairs:
        sides = (("chosen", pair.chosen_ids, pair.chosen_turns), ("rejected", pair.rejected_ids, pair.rejected_turns))
        for side, ids, turns in sides:
            key = sequence_key(pair.prompt_ids, ids, turns)
            yield Answer(key, pair.prompt_ids, ids, f"the {side} answer of pair {pair.id!r}", turns)
        for number, other in enumerate(pair.others, start=1):
            key = sequence_key(other.prompt_ids, other.completion_ids)
            name = f"further answer {number} of pair {pair.id!r}"
            yield Answer(key, other.prompt_ids, other.completion_ids, name)


@dataclass(frozen=True, slots=True)
class Score:
    """What the reference says of an answer of N tokens: the sum in nats, and the tokens' own, (N,), where wanted."""

    answer: Answer
    logps: float
    token_logps: Tensor | None = None


class ReferenceStore:
    """The scores of one context. Reading is from disk each time: other processes may be writing."""

    def __init__(self, folder: str | Path, context: Context) -> None:
        """`folder` holds any number of contexts; nothing is made before the first `write`.

        Raises InputError where the folder of this context says that it is of another one.
        """
        self.context = context
        self.folder = Path(folder) / context.sha256[:16]
        if any(self.folder.glob("part-*.safetensors")):  # parts come after the file that says what they are of
            self._check_context()

    def _check_context(self) -> None:
        found = _read_context(self.folder)
        if found is None:
            raise InputError(
                f"{self.folder}: {CONTEXT_FILE} is missing or damaged, so nothing says what its log-probs are of:"
                f" remove the folder, and run {COMMAND}"
            )
        if found != self.context.as_dict():
            raise InputError(
                f"{self.folder} holds log-probs of another context ({'; '.join(self.context.differences(found))}):"
                f" remove the folder, and run {COMMAND}"
            )

    # ---- writing

    def write(self, scores: Sequence[Score]) -> Path:
        """Keep scores as one part, complete or absent; the same scores give the same file.

        Raises InputError, and writes nothing, where a log-prob is not a finite number.
        """
        for score in scores:
            of_tokens = score.token_logps is None or bool(score.token_logps.isfinite().all())
            if not (math.isfinite(score.logps) and of_tokens):
                raise InputError(
                    f"the reference gives {score.answer.name} a log-prob of {score.logps}: nothing of its part was"
                    " stored. The model is damaged, or overflows in its dtype"
                )
        content = save(_tensors(scores, self.context))
        part = self.folder / f"part-{hashlib.sha256(content).hexdigest()}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / CONTEXT_FILE).exists():
                write_atomically(self.folder / CONTEXT_FILE, json.dumps(self.context.as_dict(), indent=1) + "\n")
            write_atomically(part, content)
        except OSError as error:
            raise InputError(self._unwritable(error.strerror)) from error
        return part

    def check_writable(self) -> None:
        """Known before anything is computed, and without making the folder. Raises InputError."""
        place = next(place for place in (self.folder, *self.folder.parents) if place.exists())
        if not place.is_dir():
            raise InputError(self._unwritable(f"{place} is a file"))
        if not os.access(place, os.W_OK | os.X_OK):
            raise InputError(self._unwritable(f"no permission to write in {place}"))

    def _unwritable(self, why: str | None) -> str:
        return (
            f"reference store {self.folder.parent} cannot be written ({why}): make room or give permission, or name"
            " another folder by reference.store"
        )

    # ---- reading

    def missing(self, pairs: Iterable[TokenizedPair], *, per_token: bool = False) -> list[Answer]:
        """The answers that are not there yet (with `per_token`: not token by token), each once.

        Raises InputError for an altered or foreign part.
        """
        there = self._tokens() if per_token else self._sums()
        wanted = {answer.key: answer for answer in answers_of(pairs)}
        return [answer for key, answer in wanted.items() if key not in there]

    def look_up(self, pairs: Sequence[TokenizedPair], *, per_token: bool = False) -> list[TokenizedPair]:
        """The pairs with their `reference`: log-probs of all their answers in nats, and with `per_token` of the tokens.

        Raises InputError naming what is missing, altered or foreign.
        """
        found = [_with_reference(*each) for each in zip(pairs, self._of_pairs(pairs, self._sums()), strict=True)]
        if not per_token:
            return found
        tokens = self.token_logps(pairs)
        return [replace(pair, reference_tokens=of) for pair, of in zip(found, tokens, strict=True)]

    def token_logps(self, pairs: Sequence[TokenizedPair]) -> list[tuple[Tensor, Tensor]]:
        """Of each pair the log-probs of the chosen answer's tokens, (C,), and of the rejected one's, (R,), in nats.

        Raises InputError as `look_up` does.
        """
        alone = [replace(pair, others=()) for pair in pairs]
        found = self._of_pairs(alone, self._tokens(), "reference log-probs of tokens")
        return [(chosen, rejected) for chosen, rejected in found]

    def _of_pairs(
        self, pairs: Sequence[TokenizedPair], there: Mapping[bytes, Any], what: str = "reference log-probs"
    ) -> list[tuple[Any, ...]]:
        """Of each pair what is there for its chosen, its rejected and its further answers."""
        answers = list(answers_of(pairs))
        if absent := [answer for answer in answers if answer.key not in there]:
            raise InputError(self._why_absent(absent, len(answers), what))
        found = (there[answer.key] for answer in answers)
        return [tuple(islice(found, 2 + len(pair.others))) for pair in pairs]

    def _why_absent(self, absent: Sequence[Answer], asked: int, what: str) -> str:
        others = [
            (folder.name, self.context.differences(context))
            for folder, context in self._others()
            if _holds(folder, absent[0].key)
        ]
        nearest, differ = min(others, key=lambda other: len(other[1]), default=("", []))
        why = "; ".join(differ) or f"its name is not that of its contents, {self.folder.name}: {self._name_back()}"
        elsewhere = f" ({nearest} holds it, but {why})" if others else ""
        return (
            f"reference store {self.folder.parent}: {len(absent)} of {asked} {what} are missing, first"
            f" that of {absent[0].name}{elsewhere}. Compute them before training: {COMMAND}"
        )

    def _name_back(self) -> str:
        """The way out for a folder of this context under another name."""
        return "move its parts there" if self.folder.exists() else "rename it so"

    def _others(self) -> list[tuple[Path, dict[str, Any]]]:
        """The other contexts of the store's folder."""
        folders = sorted(self.folder.parent.iterdir()) if self.folder.parent.is_dir() else []
        contexts = [(folder, _read_context(folder)) for folder in folders if folder != self.folder]
        return [(folder, context) for folder, context in contexts if context is not None]

    def _sums(self) -> dict[bytes, float]:
        return _sums_of(self._checked_parts())

    def _tokens(self) -> dict[bytes, Tensor]:
        found: dict[bytes, Tensor] = {}
        for part in self._checked_parts():
            if "token_logps" in part:
                of_answers = part["token_logps"].split(part["lengths"].tolist())
                found.update(zip(_keys(part), of_answers, strict=True))
        return found

    def _checked_parts(self) -> Iterator[dict[str, Tensor]]:
        """The parts of this context. Raises InputError for one of another context."""
        own = _bytes(self.context.sha256)
        for part in _parts(self.folder):
            if not torch.equal(part["context"], own):
                raise InputError(self._why_foreign(part))
            yield part

    def _why_foreign(self, part: Mapping[str, Tensor]) -> str:
        sha256 = bytes(part["context"].tolist()).hex()
        of = [self.context.differences(context) for folder, context in self._others() if folder.name == sha256[:16]]
        what = "; ".join(of[0]) if of else f"{sha256[:16]}, of which {self.folder.parent} knows nothing"
        return (
            f"{self.folder}: a part was computed in another context ({what}): it was moved here by hand. Remove the"
            f" folder, and run {COMMAND}"
        )


def _with_reference(pair: TokenizedPair, found: Sequence[float]) -> TokenizedPair:
    others = (replace(other, reference=of) for other, of in zip(pair.others, found[2:], strict=True))
    return replace(pair, reference=(found[0], found[1]), others=tuple(others))


# ---- parts


def _tensors(scores: Sequence[Score], context: Context) -> dict[str, Tensor]:
    """A part: keys (n, 32), sums (n,) in fp32; with tokens their log-probs (N,) in fp32, answer after answer, too."""
    tensors = {
        "context": _bytes(context.sha256),
        "keys": torch.tensor([list(score.answer.key) for score in scores], dtype=torch.uint8),
        "logps": torch.tensor([score.logps for score in scores], dtype=torch.float32),
    }
    tokens = [score.token_logps for score in scores if score.token_logps is not None]
    if tokens and len(tokens) == len(scores):
        tensors["lengths"] = torch.tensor([len(of_answer) for of_answer in tokens])
        tensors["token_logps"] = torch.cat(tokens).to("cpu", torch.float32)
    return tensors


def _bytes(hexadecimal: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(hexadecimal)), dtype=torch.uint8)


def _parts(folder: Path) -> Iterator[dict[str, Tensor]]:
    """What the parts of a folder hold, in the order of their names. Raises InputError for an altered one."""
    for path in sorted(folder.glob("part-*.safetensors")):
        content = path.read_bytes()
        altered = path.stem != f"part-{hashlib.sha256(content).hexdigest()}"
        try:
            tensors = {} if altered else load(content)
        except SafetensorError:
            altered = True
        if altered or not {"context", "keys", "logps"} <= tensors.keys():
            raise InputError(
                f"{path} has changed since it was written (its name is the sha256 of its content): remove it, and run"
                f" {COMMAND}, which computes its log-probs alone"
            )
        yield tensors


def _keys(part: Mapping[str, Tensor]) -> list[bytes]:
    return [row.tobytes() for row in part["keys"].numpy()]


def _sums_of(parts: Iterable[Mapping[str, Tensor]]) -> dict[bytes, float]:
    """Where tokens came later, their sums do not replace those that a run may have begun with."""
    with_tokens: dict[bytes, float] = {}
    alone: dict[bytes, float] = {}
    for part in parts:
        found = with_tokens if "token_logps" in part else alone
        found.update(zip(_keys(part), part["logps"].tolist(), strict=True))
    return with_tokens | alone


def _holds(folder: Path, key: bytes) -> bool:
    """Whether another context has an entry; what is wrong with it is no matter here."""
    try:
        return key in _sums_of(_parts(folder))
    except InputError:
        return False


def _read_context(folder: Path) -> dict[str, Any] | None:
    """What a folder says of itself, or None where it is no context's."""
    try:
        content = json.loads((folder / CONTEXT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
