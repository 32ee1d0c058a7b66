"""What a careless author would have written where answers are generated; more of `tests.careless`.

Imported by `tests/guards.py`, which must stay light: torch and the library are imported inside.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def with_the_models_own_wishes(model: Any, config: Any) -> Iterator[None]:
    """Row 58: transformers fills what a call leaves open from the model's generation config, penalties included."""
    model.eval()
    yield


def ended_by_the_eos_alone(speech: Any, generation: Any) -> frozenset[int]:
    """Row 27: Llama 3's answers then run on past the end of their turn."""
    return frozenset({int(speech.encoder.tokenizer.eos_token_id)})


def padding_that_is_read(original: Any) -> Any:
    """Row 27: short prompts of a batch begin with tokens that nobody wrote."""

    def pad_left(rows: Any, pad_id: int) -> Any:
        import torch

        input_ids, _ = original(rows, pad_id)
        return input_ids, torch.ones_like(input_ids)

    return pad_left


def one_stream_for_all_rows(original: Any) -> Any:
    """Row 57: numbers in the order in which rows happen to be asked for, so that a batch decides the answers."""
    import numpy as np

    stream = np.random.default_rng(0)
    return lambda sampling, key: stream.random(sampling.max_new_tokens)


def whatever_lies_beside(path: Path) -> Any:
    """Row 58: answers that were edited or exchanged keep the settings of others."""
    from lorafocal.generation.formats import provenance_file, read_provenance

    file = provenance_file(path)
    return read_provenance(file) if file.is_file() else None


def a_journal_of_anything(journal: Any, lines: Any, about: Any) -> None:
    """Row 58: goes on with what other settings made."""
    from lorafocal.generation.asks import Completion

    for line in lines[1:]:
        for key, text, tokens, ended in json.loads(line)["answers"]:
            journal.done[tuple(key)] = Completion(text, tokens, ended)
