"""What one chats with: a run, an adapter or a model, found and loaded, and how it is spoken to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lorafocal.generation.speech import Speech
from lorafocal.generation.subject import find_subject, speaker_folder
from lorafocal.lineage import Lineage
from lorafocal.model.adapters import AdapterSwitch
from lorafocal.model.head import causal_lm
from lorafocal.model.saved import SavedAdapter

_OTHER_DRAWING = ("top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size")


@dataclass(frozen=True, slots=True)
class Voice:
    """One column: what it is called, and the state of the model within which it speaks."""

    title: str
    state: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True, slots=True)
class Partner:
    """A loaded model with one voice, or two: the adapter on, and off."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    voices: tuple[Voice, ...]
    speech: Speech
    notes: tuple[str, ...]


def meet(target: Path, *, base: str | None = None) -> Partner:
    """Load a run, an adapter folder on its base (as `model.saved.open_adapter` does), or a model's folder.

    Raises InputError for anything missing or unfit, before weights are loaded where that can be known.
    """
    subject = find_subject(speaker_folder(target), base=base)
    model = subject.load()
    spoken = (*_spoken(subject.speech), *_drawing_notes(model))
    saved = subject.saved
    if saved is None:
        notes = ("this is a whole model: there is no adapter to switch off, so there is one column", *spoken)
        return Partner(model, subject.tokenizer, (Voice(subject.name),), subject.speech, notes)
    voices = (Voice(f"adapter on: {subject.name}"), Voice(f"adapter off: {_off(saved)}", AdapterSwitch(model).off))
    notes = (*saved.notes, *_reference_notes(saved.lineage), *spoken)
    return Partner(model, subject.tokenizer, voices, subject.speech, notes)


def _off(saved: SavedAdapter) -> str:
    """What remains without the adapter."""
    place = Path(saved.base)
    name = place.resolve().name if place.exists() else saved.base
    held = f" in {saved.quantization}" if saved.quantization else ""
    merged = saved.lineage.merged if saved.lineage is not None else ()
    inside = f", with {' and '.join(repr(stage.adapter) for stage in merged)} merged in" if merged else ""
    return f"the base {name}{held}{inside}"


_COMPARED_WITH = {
    "frozen_copy": "the adapter's start",
    "separate_model": "another model",
    "adapter": "a finished adapter",
    "moving": "the adapter as it was some steps before",
    "several": "several references at once",
}


def _reference_notes(lineage: Lineage | None) -> tuple[str, ...]:
    """A word where the adapter off is not what training compared with."""
    if lineage is None:
        return ()
    if lineage.start is not None:
        return (
            f"the adapter went on from {lineage.start}, so with the adapter off that is off too: the base alone speaks",
        )
    compared = _COMPARED_WITH.get(str(lineage.reference_kind))
    if compared is None:
        return ()
    return (f"training compared with {compared}, not with the base, which is what speaks with the adapter off",)


def _spoken(speech: Speech) -> tuple[str, ...]:
    how = "go through the chat template" if speech.templated else "are continued as plain text"
    return (f"prompts {how}; each stands alone, without those before it",)


def _drawing_notes(model: nn.Module) -> tuple[str, ...]:
    """What the model's own generation config asks for beyond a temperature, which is not done here."""
    own, usual = getattr(causal_lm(model), "generation_config", None), GenerationConfig()
    asked = [(name, getattr(own, name, None)) for name in _OTHER_DRAWING]
    left = [f"{name} {value:g}" for name, value in asked if value not in (None, getattr(usual, name, None))]
    if not left:
        return ()
    return (f"tokens are drawn from the whole distribution, without the {', '.join(left)} of the generation config",)
