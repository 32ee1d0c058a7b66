"""What a run leaves behind and takes up again: checkpoints, complete or absent, and what it made, with its making."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from peft import PeftModel
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from lorafocal import launch
from lorafocal.checkpoint import checkpoints, latest_complete, rotate, save_state, step_of
from lorafocal.errors import InputError
from lorafocal.lineage import Lineage, lineage_of
from lorafocal.model.adapters import adapter_parameters
from lorafocal.model.beside import in_words
from lorafocal.model.continued import lineage_on, stages_of
from lorafocal.model.head import causal_lm
from lorafocal.model.master import arithmetic_of
from lorafocal.model.moving import REFERENCE_FILE, reference_state, restore_reference
from lorafocal.model.save import save_adapter
from lorafocal.model.save_model import write_papers, write_weights
from lorafocal.model.starts import plain_adapter
from lorafocal.objectives import Objective
from lorafocal.publish import RECORD, check_name, check_ours, recover, why_incomplete
from lorafocal.references.strategy import Strategy
from lorafocal.resume import changes
from lorafocal.run_folder import ADAPTER_CONFIG, ADAPTER_DIR, MODEL_DIR, last_rewards, read_manifest, run_of
from lorafocal.tensor_files import dtype_word, read_tensors
from lorafocal.together import all_or_none, of_all_ranks, published_by_all

if TYPE_CHECKING:
    from lorafocal.engines import Engine

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
NO_EARLIER = {"steps": 0, "pairs_seen": 0}  # trainings of the same weights: `Trained.earlier`

# Of an adapter's configuration: what gives tensors of the same names and shapes another meaning.
_SCALES = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")

# What an earlier save consists of, ours or that of PEFT, transformers and TRL: the weights, and what lies beside them.
_WEIGHTS = {
    ADAPTER_DIR: re.compile(r"adapter_model\.(safetensors|bin)"),
    MODEL_DIR: re.compile(r"(pytorch_)?model(-\d{5}-of-\d{5})?\.(safetensors|bin)"),
}
_CONFIGS = {
    ADAPTER_DIR: r"adapter_config\.json",
    MODEL_DIR: r"((generation|(video_)?preprocessor|processor)_)?config\.json"
    r"|(pytorch_)?model\.(safetensors|bin)\.index\.json",
}
_PAPERS = (
    r"README\.md|lorafocal\.json|training_args\.bin|chat_template\.(jinja|json)|tokenizer(_config)?\.json|merges\.txt"
    r"|(special_tokens_map|added_tokens|normalizer|tekken)\.json|vocab\.(json|txt)|[\w.-]+\.(model|spm|tiktoken|codes)"
    r"|additional_chat_templates"
)


def find_checkpoint(asked: str | bool | None, run: Path, *, writes: bool) -> Path | None:
    """The checkpoint to go on from: the one named, or for True the newest complete one of `run`; None for neither.

    Collective: rank 0 reads all of it to verify it, the others take its word.
    `writes` is whether this process writes the run's files: it puts right what a kill left half renamed.
    Raises InputError where there is none, or where the one named is torn.
    """
    if not asked:
        _warn_of_others(run)
        return None
    newest = 0
    with all_or_none():
        if asked is not True and launch.is_main() and (reason := why_incomplete(Path(asked))):
            raise InputError(f"{asked} cannot be resumed from: {reason}. Give an earlier checkpoint")
        if asked is True and launch.is_main():
            newest = step_of(_newest(run, writes=writes))
    return run / f"checkpoint-{of_all_ranks(newest)[0]}" if asked is True else Path(asked)


def _warn_of_others(run: Path) -> None:
    """A fresh run leaves them where they are, and later the newest of all would be taken for its own."""
    if launch.is_main() and (others := checkpoints(run)):
        logger.warning(
            "%s holds checkpoints of an earlier run up to %s: resuming by True would take the newest of all, so remove"
            " them or choose another output_dir",
            run,
            others[0].name,
        )


def _newest(run: Path, *, writes: bool) -> Path:
    if writes:
        recover(run)
    latest = latest_complete(run)
    for skipped in latest.skipped:
        logger.warning(skipped)
    if latest.path is None:
        raise InputError(f"{run} holds no complete checkpoint to resume from; train without resuming")
    return latest.path


def progress_at(checkpoint: Path) -> TrainerState:
    """Steps, epochs and the log as they were at the checkpoint."""
    return TrainerState.load_from_json(str(checkpoint / STATE_FILE))


def write_checkpoint(
    run: Path, progress: TrainerState, *, made: Trained, keep: int | None, engine: Engine, **training: Any
) -> None:
    """Collective: `run`/checkpoint-<step>, complete or absent, and only the newest `keep` of them (None: all).

    `training` is what `checkpoint.save_state` takes beside the engine.
    """
    if launch.is_main():
        recover(run)
    target = run / f"checkpoint-{progress.global_step}"
    with published_by_all(target) as folder:
        with all_or_none():
            made.mark(folder, progress, engine, pairs_seen=training["extra"]["pairs_seen"])
        save_state(folder, engine=engine, **training)
        if launch.is_main():
            progress.save_to_json(str(folder / STATE_FILE))
    if keep and launch.is_main():
        rotate(run, keep, newest=target)


class Trained(Protocol):
    """What a run makes, as others can load it.

    Made before the first step: what the weights were then is part of the lineage.
    """

    folder: str  # in the run's
    earlier: dict[str, int]  # steps and pairs_seen of trainings before this one, of the same weights

    def lineage(self, *, steps: int, pairs_seen: int) -> Lineage | None:
        """What made it, with the earlier steps and pairs; None for a base that was never loaded from anywhere."""

    def check_same(self, checkpoint: Path) -> None:
        """Refuse a checkpoint of a run that was set otherwise: its tensors fit, and would mean something else here.

        Raises InputError naming what differs: the base's weights or precision, the objective, ranks and scales.
        """

    def mark(self, checkpoint: Path, progress: TrainerState, engine: Engine, *, pairs_seen: int) -> None:
        """Collective: put into an unpublished checkpoint what `check_same` and `take_up` ask for."""

    def take_up(self, checkpoint: Path) -> None:
        """Set what stands beside the trained weights and changes with them: a reference that moves."""

    def write(self, folder: Path, progress: TrainerState, engine: Engine, *, pairs_seen: int, trained: bool) -> None:
        """Collective: fill an unpublished folder; the card gets the rewards of the last evaluation.

        `trained` says that a step has changed the weights.
        """


class TrainedAdapter:
    """A policy's adapter: plain PEFT files with its lineage and a card."""

    folder = ADAPTER_DIR

    def __init__(
        self,
        policy: PeftModel,
        objective: Objective,
        reference: Strategy,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        self._policy, self._tokenizer = policy, tokenizer
        self._moves = reference.kind == "moving"
        self._stages = stages_of(policy)
        self._made = _made_by(objective, reference)
        self._lineage: Lineage | None = None
        self.earlier = NO_EARLIER

    def lineage(self, *, steps: int, pairs_seen: int) -> Lineage | None:
        if self._lineage is None:
            self._lineage = lineage_on(causal_lm(self._policy), self._stages, **self._made, steps=0, pairs_seen=0)
        return _after(self._lineage, counted(self.earlier, steps=steps, pairs_seen=pairs_seen))

    def check_same(self, checkpoint: Path) -> None:
        folder = checkpoint / ADAPTER_DIR
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        differ = changes(_scales(config), _scales(plain_adapter(self._policy)[0].to_dict()), ())
        differ += _otherwise(lineage_of(folder), self.lineage(steps=0, pairs_seen=0))
        _refuse(checkpoint, differ, "continue its adapter in a new run")

    def mark(self, checkpoint: Path, progress: TrainerState, engine: Engine, *, pairs_seen: int) -> None:
        self.write(checkpoint / ADAPTER_DIR, progress, engine, pairs_seen=pairs_seen, trained=False)
        if self._moves and launch.is_main():
            save_file(reference_state(self._policy), checkpoint / REFERENCE_FILE)

    def take_up(self, checkpoint: Path) -> None:
        if self._moves:
            restore_reference(self._policy, read_tensors(checkpoint / REFERENCE_FILE))

    def write(self, folder: Path, progress: TrainerState, engine: Engine, *, pairs_seen: int, trained: bool) -> None:
        values = {name: engine.full(parameter) for name, parameter in adapter_parameters(self._policy).items()}
        if launch.is_main():
            lineage = self.lineage(steps=progress.global_step, pairs_seen=pairs_seen)
            results = last_rewards(progress.log_history)
            template = getattr(self._tokenizer, "chat_template", None)
            own = {"chat_template": template} if isinstance(template, str) else {}  # several are the base's
            save_adapter(self._policy, folder, lineage, results, trained=trained, values=values, **own)


class TrainedModel:
    """A policy of which every weight is trained: a model's files, with its lineage and a card."""

    folder = MODEL_DIR

    def __init__(
        self,
        policy: PreTrainedModel,
        objective: Objective,
        reference: Strategy,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        self._policy, self._tokenizer = policy, tokenizer
        self._dtype = arithmetic_of(policy)
        self._made = _made_by(objective, reference)
        self._lineage: Lineage | None = None
        self.earlier = NO_EARLIER

    def lineage(self, *, steps: int, pairs_seen: int) -> Lineage | None:
        if self._lineage is None:
            lineage = lineage_on(self._policy, (), **self._made, steps=0, pairs_seen=0)
            self._lineage = lineage and replace(lineage, dtype=dtype_word(self._dtype))
        return _after(self._lineage, counted(self.earlier, steps=steps, pairs_seen=pairs_seen))

    def check_same(self, checkpoint: Path) -> None:
        differ = _otherwise(lineage_of(checkpoint), self.lineage(steps=0, pairs_seen=0))
        _refuse(checkpoint, differ, "start a new run")

    def mark(self, checkpoint: Path, progress: TrainerState, engine: Engine, *, pairs_seen: int) -> None:
        if not launch.is_main():
            return
        lineage = self.lineage(steps=progress.global_step, pairs_seen=pairs_seen)
        if lineage is not None:
            lineage.write(checkpoint)

    def take_up(self, checkpoint: Path) -> None:
        """Nothing stands beside."""

    def write(self, folder: Path, progress: TrainerState, engine: Engine, *, pairs_seen: int, trained: bool) -> None:
        write_weights(folder, self._policy, engine.full, dtype=self._dtype)
        if launch.is_main():
            lineage = self.lineage(steps=progress.global_step, pairs_seen=pairs_seen)
            results, run = last_rewards(progress.log_history), read_manifest(run_of(folder))
            write_papers(folder, self._policy, self._tokenizer, lineage, results, dtype=self._dtype, run=run)


def counted(earlier: Mapping[str, int], *, steps: int, pairs_seen: int) -> dict[str, int]:
    """With the `earlier` ones."""
    return {"steps": earlier["steps"] + steps, "pairs_seen": earlier["pairs_seen"] + pairs_seen}


def what_is_made(
    policy: PreTrainedModel | PeftModel,
    objective: Objective,
    reference: Strategy,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Trained:
    """The adapter, or the whole model where there is none."""
    if isinstance(policy, PeftModel):
        return TrainedAdapter(policy, objective, reference, tokenizer)
    return TrainedModel(policy, objective, reference, tokenizer)


def publish(target: Path, made: Trained, progress: TrainerState, engine: Engine, **seen: Any) -> None:
    """Collective: the folder of what was made, complete or as it was; its name is checked, and what it replaces.

    `seen` is what `Trained.write` takes beside the engine.
    """
    check_name(target.name)
    with all_or_none():
        if launch.is_main():
            check_replaced(target, made.folder)
    engine.rest()
    with published_by_all(target, record=False) as folder:
        made.write(folder, progress, engine, **seen)


def check_replaced(target: Path, made: str, other: str | None = None) -> None:
    """Refuse (`InputError`) a folder that holds more than an earlier save of the same kind: all in it would be gone.

    `other` is what to choose in its place.
    """
    other = other or f"another folder (save_model() without one takes {made!r} in output_dir)"
    if (target.parent / RECORD).exists():
        raise InputError(f"{target} is part of a checkpoint, which would be torn; choose {other}")
    weights, papers = _WEIGHTS[made], f"{_CONFIGS[made]}|{_PAPERS}"
    saved = target.is_dir() and any(weights.fullmatch(path.name) for path in target.iterdir())
    ours = re.compile(f"{weights.pattern}|{papers}" if saved else "(?!)")  # papers alone may be anybody's
    check_ours(target, ours, f"a saved {made}", other)


def _after(lineage: Lineage | None, done: Mapping[str, int]) -> Lineage | None:
    return lineage and replace(lineage, steps=done["steps"], pairs_seen=done["pairs_seen"])


def _made_by(objective: Objective, reference: Strategy) -> dict[str, Any]:
    return {"objective": objective.as_dict(), "reference": in_words(reference)}


def _refuse(checkpoint: Path, differ: list[str], other: str) -> None:
    if differ:
        raise InputError(
            f"{checkpoint.name} was trained otherwise than this run is set up (in its words, then -> now):\n  "
            + "\n  ".join(differ)
            + f"\nset these back to resume, or {other}"
        )


def _otherwise(then: Lineage | None, now: Lineage | None) -> list[str]:
    return [] if then is None or now is None else changes(_made_of(then), _made_of(now), ())


def _scales(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: config.get(key) for key in _SCALES}


def _made_of(lineage: Lineage) -> dict[str, Any]:
    """The base, by its weights and not by its name, as training holds it; and what it is trained by."""
    base = {"sha256": lineage.base.sha256, "quantization": lineage.quantization, "dtype": lineage.dtype}
    return {"base": base, "objective": lineage.objective}
