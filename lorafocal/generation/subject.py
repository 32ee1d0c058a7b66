"""What answers: a run, an adapter on its base, or a model, found and described before any weights are loaded."""

from __future__ import annotations

import gc
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lorafocal import recipes
from lorafocal.checkpoint import checkpoints
from lorafocal.data.held_out import HELD_OUT_FILE
from lorafocal.errors import InputError
from lorafocal.generation.speech import Speech
from lorafocal.lineage import LINEAGE_FILE, lineage_of
from lorafocal.model.head import causal_lm
from lorafocal.model.load import base_fingerprint, check_length, load_base, load_tokenizer
from lorafocal.model.saved import (
    WEIGHTS_FILE,
    SavedAdapter,
    open_adapter,
    read_adapter,
    read_config,
    stored_dtype,
    tokenization_of,
    tokenizer_of,
)
from lorafocal.publish import sha256, text_sha256
from lorafocal.run_folder import ADAPTER_CONFIG, ADAPTER_DIR, CONFIG_FILE, MANIFEST_FILE, MODEL_DIR, run_of

MODEL_CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that was found and found usable.

    `place` is the folder or hub id of the whole model, or of an adapter's base; `folder` is where an adapter or a local
    model lies. `saved` is the adapter. Computed in `dtype`, as trained or stored.
    """

    name: str
    place: str
    revision: str | None
    dtype: str
    folder: Path | None
    saved: SavedAdapter | None
    tokenizer: PreTrainedTokenizerBase
    speech: Speech

    def load(self) -> nn.Module:
        """The model in eval mode, an adapter attached to its base as in training (quantised alike)."""
        gc.collect()  # one that was let go of before: 8-bit layers hold themselves
        if self.saved is not None:
            return open_adapter(self.saved, dtype=self.dtype)
        return load_base(self.place, revision=self.revision, dtype=self.dtype).eval()

    @property
    def ends(self) -> frozenset[int]:
        """The ids that end its answers."""
        return self.speech.ends(generation_config(self.place, self.revision))

    @property
    def template_sha256(self) -> str | None:
        """The digest of the chat template with its options; None where prompts are continued as plain text."""
        if not self.speech.templated:
            return None
        said = [self.tokenizer.chat_template, dict(self.speech.encoder.renderer.options)]
        return text_sha256(json.dumps(said, sort_keys=True))

    def describe(self) -> dict[str, Any]:
        """What a reader needs to know which weights answered; digests of files, and never a path."""
        lineage = None if self.folder is None else lineage_of(self.folder)
        about: dict[str, Any] = {"name": self.name, "dtype": self.dtype}
        if self.saved is not None:
            base = lineage.base if lineage is not None else None
            about |= {
                "kind": "adapter",
                "base": asdict(base) if base is not None else base_fingerprint(self.place, revision=self.revision),
                "adapter_sha256": sha256(self.saved.folder / WEIGHTS_FILE),
                "quantization": self.saved.quantization,
            }
        else:
            about |= {"kind": "model", "model": base_fingerprint(self.place, revision=self.revision)}
            about |= {"base": asdict(lineage.base)} if lineage is not None else _released(self.place)
        if lineage is not None and lineage.objective is not None:
            about["objective"] = dict(lineage.objective)
        return about


def find_subject(target: str | Path, *, base: str | None = None) -> Subject:
    """A run, an adapter folder, a model's folder, or a model's hub id; `base` says where an adapter's base is.

    Raises InputError for anything missing or unfit, before weights are loaded where that can be known.
    """
    if not Path(target).is_dir() and _is_hub_id(str(target)):
        return _model(str(target), str(target).rpartition("/")[2], None, base)
    folder = speaker_folder(Path(target))
    if not (folder / ADAPTER_CONFIG).is_file():
        return _model(str(folder), called(folder), folder, base)
    saved = read_adapter(folder, base=base)
    tokenizer = tokenizer_of(saved)
    speech = Speech.as_trained(tokenizer, saved.tokenization, run_of(folder) / HELD_OUT_FILE)
    return Subject(called(folder), saved.base, saved.revision, saved.dtype, folder, saved, tokenizer, speech)


def _model(place: str, name: str, folder: Path | None, base: str | None) -> Subject:
    """A model without an adapter. One that was made here speaks as its run's pairs do."""
    if base is not None:
        raise InputError(f"{place} is a whole model and has no base: leave --base out")
    dtype = stored_dtype(read_config(place))
    tokenizer = load_tokenizer(place)
    if folder is not None and (folder / LINEAGE_FILE).is_file():
        speech = Speech.as_trained(tokenizer, tokenization_of(folder), run_of(folder) / HELD_OUT_FILE)
    else:
        speech = Speech.as_trained(tokenizer, {}, None)
    return Subject(name, place, None, dtype, folder, None, tokenizer, speech)


def speaker_folder(target: Path) -> Path:
    """The folder of an adapter or of a whole model that `target` is, or holds as a run."""
    if not target.is_dir():
        raise InputError(f"{target}: there is no such folder; name a run, an adapter folder or a merged model")
    for folder in (target, target / ADAPTER_DIR):
        if (folder / ADAPTER_CONFIG).is_file():
            return folder
    for folder in (target, target / MODEL_DIR):
        if (folder / MODEL_CONFIG).is_file():
            return folder
    newest = next((path for path in checkpoints(target) if (path / ADAPTER_DIR).is_dir()), None)
    if newest is not None:
        raise InputError(
            f"{target} has no finished adapter; its newest checkpoint has one: name that, {newest / ADAPTER_DIR}"
        )
    raise InputError(
        f"{target} holds no adapter and no model; name a run, an adapter folder or a merged model's folder"
    )


def called(folder: Path) -> str:
    """What an adapter or a model is called: as its run or bundle, where it lies in one, with its checkpoint's name."""
    place, run = folder.resolve(), run_of(folder)
    inside = any((run / file).is_file() for file in (CONFIG_FILE, MANIFEST_FILE))
    if not inside or place.name not in (ADAPTER_DIR, MODEL_DIR):
        return place.name
    return run.name if place.parent == run else f"{run.name}-{place.parent.name}"


def generation_config(place: str, revision: str | None = None) -> GenerationConfig:
    """A model's own, as transformers gives it one when it is loaded."""
    try:
        return GenerationConfig.from_pretrained(place, revision=revision)
    except OSError:
        return GenerationConfig.from_model_config(read_config(place, revision))


def check_room(model: nn.Module, prompt_tokens: int, max_new_tokens: int) -> None:
    """Refuse an answer that would reach past the positions of which the model computes each alike."""
    try:
        check_length(causal_lm(model), prompt_tokens + max_new_tokens)
    except InputError as error:
        raise InputError(
            f"the prompt's {prompt_tokens} tokens with {max_new_tokens} new ones pass the length up to which this"
            " model's positions hold: shorten the prompt, or lower --max-new-tokens"
        ) from error


def _is_hub_id(target: str) -> bool:
    """OWNER/NAME, and no path: runs/mine is one where there is a folder runs."""
    owner, _, name = target.partition("/")
    return bool(name) and "/" not in name and not owner.startswith((".", "~")) and not Path(owner or "/").is_dir()


def _released(place: str) -> dict[str, Any]:
    """What the paper's tables say of a model that others published."""
    row = next((row for row in recipes.released() if row.model == place), None)
    return (
        {} if row is None else {"base": {"name": row.trained_from}, "released": {"row": row.row, "family": row.family}}
    )
