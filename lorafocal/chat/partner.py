"""What one chats with: a run, an adapter or a model, found and loaded, and how it is spoken to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lorafocal.data.encoding import Encoder, encode
from lorafocal.data.held_out import HELD_OUT_FILE, read_held_out
from lorafocal.data.templates import PROBE_ANSWER, PROBE_QUESTION, Fault, Renderer, cut_after_turn
from lorafocal.data.tokens import REMEDIES
from lorafocal.errors import InputError
from lorafocal.lineage import LINEAGE_FILE, Lineage
from lorafocal.model.adapters import AdapterSwitch
from lorafocal.model.head import causal_lm
from lorafocal.model.load import check_length, load_base, load_tokenizer
from lorafocal.model.saved import (
    CONFIG_FILE,
    SavedAdapter,
    open_adapter,
    read_adapter,
    read_config,
    stored_dtype,
    tokenization_of,
)

MODEL_CONFIG, ADAPTER_DIR, MODEL_DIR = "config.json", "adapter", "model"
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


@dataclass(frozen=True, slots=True)
class Speech:
    """How texts become tokens: as in training, by the chat template, or as plain text (`templated` False)."""

    encoder: Encoder
    templated: bool

    def prompt_ids(self, text: str, system: str | None = None) -> list[int]:
        """The tokens of a prompt, the template's opening of an answer included.

        Raises InputError for a text that no training row may have either, and for one that the template refuses.
        """
        renderer = self.encoder.renderer
        for part in filter(None, (text, system)):
            if renderer.forged and (found := renderer.forged.search(part)):
                raise InputError(f"the prompt spells the special token {found.group()!r}: write it without")
        if not self.templated:
            return [*self.encoder.bos, *self._encoded(text)]
        messages = [{"role": "system", "content": system}] if system else []
        [rendered] = renderer.render([[*messages, {"role": "user", "content": text}]], add_generation_prompt=True)
        if isinstance(rendered, Fault):
            raise InputError(f"the prompt cannot be said: {REMEDIES[rendered.reason]} ({rendered.detail})")
        return self._encoded(rendered)

    def _encoded(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the prompt cannot be read: {REMEDIES['undecodable_text']}") from error
        ids = encode(self.encoder.tokenizer, [text])[text]
        if not ids:
            raise InputError("the prompt has no tokens: give it text")
        return ids

    def ends(self, generation: GenerationConfig | None) -> frozenset[int]:
        """The ids that end an answer: the model's own, the tokenizer's EOS, and the template's end of a turn."""
        own = getattr(generation, "eos_token_id", None)
        ids = {*(own if isinstance(own, list) else [own]), self.encoder.tokenizer.eos_token_id}
        if self.templated:
            ids.add(_end_of_turn(self.encoder.renderer))
        return frozenset(int(number) for number in ids if number is not None)


def _end_of_turn(renderer: Renderer) -> int | None:
    """The token that the template writes after an answer."""
    answered = [{"role": "user", "content": PROBE_QUESTION}, {"role": "assistant", "content": PROBE_ANSWER}]
    [text] = renderer.render([answered])
    if isinstance(text, Fault):
        return None
    text = cut_after_turn(text, renderer)
    token = next((token for token in renderer.control_tokens if text.endswith(token)), None)
    return None if token is None else int(renderer.tokenizer.convert_tokens_to_ids(token))


def meet(target: Path, *, base: str | None = None) -> Partner:
    """Load a run, an adapter folder on its base (as `model.saved.open_adapter` does), or a model's folder.

    Raises InputError for anything missing or unfit, before weights are loaded where that can be known.
    """
    folder = speaker_folder(target)
    if not (folder / CONFIG_FILE).is_file():
        return _model(folder, base)
    saved = read_adapter(folder, base=base)
    tokenizer = load_tokenizer(saved.base, saved.revision)
    speech = _speech(tokenizer, saved.tokenization, folder.resolve().parent / HELD_OUT_FILE)
    policy = open_adapter(saved, dtype=saved.dtype)
    voices = (Voice(f"adapter on: {_on(folder)}"), Voice(f"adapter off: {_off(saved)}", AdapterSwitch(policy).off))
    notes = (*saved.notes, *_reference_notes(saved.lineage), *_spoken(speech), *_drawing_notes(policy))
    return Partner(policy, tokenizer, voices, speech, notes)


def speaker_folder(target: Path) -> Path:
    """The folder of an adapter or of a whole model that `target` is, or holds as a run."""
    if not target.is_dir():
        raise InputError(f"{target}: there is no such folder; name a run, an adapter folder or a merged model")
    for folder in (target, target / ADAPTER_DIR):
        if (folder / CONFIG_FILE).is_file():
            return folder
    for folder in (target, target / MODEL_DIR):
        if (folder / MODEL_CONFIG).is_file():
            return folder
    checkpoints = sorted(target.glob(f"checkpoint-*/{ADAPTER_DIR}"), key=lambda path: path.stat().st_mtime)
    if checkpoints:
        raise InputError(
            f"{target} has no finished adapter; its newest checkpoint has one, with the base named: lorafocal chat"
            f" {checkpoints[-1]} --base MODEL"
        )
    raise InputError(
        f"{target} holds no adapter and no model; name a run, an adapter folder or a merged model's folder"
    )


def _model(folder: Path, base: str | None) -> Partner:
    """A model without an adapter: one voice."""
    if base is not None:
        raise InputError(f"{folder} is a whole model and has no base: leave --base out")
    tokenizer = load_tokenizer(str(folder))
    made_here = (folder / LINEAGE_FILE).is_file()
    held_out = folder.resolve().parent / HELD_OUT_FILE
    speech = _speech(tokenizer, tokenization_of(folder), held_out) if made_here else _speech(tokenizer, {}, None)
    model = load_base(str(folder), dtype=stored_dtype(read_config(str(folder)))).eval()
    note = "this is a whole model: there is no adapter to switch off, so there is one column"
    voices = (Voice(_on(folder)),)
    return Partner(model, tokenizer, voices, speech, (note, *_spoken(speech), *_drawing_notes(model)))


def _on(folder: Path) -> str:
    """What an adapter or a model is called: as its run or its bundle, where it lies in one."""
    place = folder.resolve()
    inside = any((place.parent / file).is_file() for file in ("config.yaml", "manifest.json"))
    return place.parent.name if inside and place.name in (ADAPTER_DIR, MODEL_DIR) else place.name


def _off(saved: SavedAdapter) -> str:
    """What remains without the adapter."""
    place = Path(saved.base)
    name = place.resolve().name if place.exists() else saved.base
    held = f" in {saved.quantization}" if saved.quantization else ""
    merged = saved.lineage.merged if saved.lineage is not None else ()
    inside = f", with {' and '.join(repr(stage.adapter) for stage in merged)} merged in" if merged else ""
    return f"the base {name}{held}{inside}"


def _reference_notes(lineage: Lineage | None) -> tuple[str, ...]:
    """A word where the adapter off is not what training compared with."""
    if lineage is None:
        return ()
    if lineage.start is not None:
        return (
            f"the adapter went on from {lineage.start}, so with the adapter off that is off too: the base alone speaks",
        )
    if lineage.reference == "frozen_copy":
        return ("training compared with the adapter's start, not with the base, which is what speaks with it off",)
    if lineage.reference == "separate_model":
        return ("training compared with another model, not with the base, which is what speaks with the adapter off",)
    return ()


def _speech(tokenizer: PreTrainedTokenizerBase, tokenization: Mapping[str, Any], held_out: Path | None) -> Speech:
    encoder = Encoder.of(tokenizer, tokenization.get("chat_template_kwargs") or {})
    return Speech(encoder, _is_templated(encoder, held_out))


def _is_templated(encoder: Encoder, held_out: Path | None) -> bool:
    """Whether prompts go through the chat template: where there is one, unless the run's own pairs did not."""
    if not encoder.tokenizer.chat_template:
        return False
    asked = [[{"role": "user", "content": PROBE_QUESTION}]]
    [opened], [closed] = encoder.renderer.render(asked, add_generation_prompt=True), encoder.renderer.render(asked)
    if held_out is None or not held_out.is_file() or isinstance(opened, Fault):
        return True
    endings = [_bare(opened.rpartition(PROBE_QUESTION)[2])]
    if isinstance(closed, str) and (closing := _bare(closed.rpartition(PROBE_QUESTION)[2])):
        endings.append(closing)  # of `truncation: recipe`
    prompts = (encoder.tokenizer.decode(pair.prompt_ids) for pair in read_held_out(held_out))
    return any(_bare(str(prompt)).endswith(tuple(endings)) for prompt in prompts)


def _bare(text: str) -> str:
    """Without blanks, of which decoding makes more or fewer."""
    return "".join(text.split())


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


def check_room(model: nn.Module, prompt_tokens: int, max_new_tokens: int) -> None:
    """Refuse an answer that would reach past the positions of which the model computes each alike."""
    try:
        check_length(causal_lm(model), prompt_tokens + max_new_tokens)
    except InputError as error:
        raise InputError(
            f"the prompt's {prompt_tokens} tokens with {max_new_tokens} new ones pass the length up to which this"
            " model's positions hold: shorten the prompt, or lower --max-new-tokens"
        ) from error
