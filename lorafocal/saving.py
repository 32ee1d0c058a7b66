"""What a run leaves behind and takes up again: checkpoints, complete or absent, and adapters with what made them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainerState

from lorafocal.checkpoint import latest_complete, rotate, save_state
from lorafocal.errors import InputError
from lorafocal.launch import main_process_first
from lorafocal.lineage import Lineage, lineage_of
from lorafocal.model.continued import lineage_on, stages_of
from lorafocal.model.head import causal_lm
from lorafocal.model.save import save_adapter
from lorafocal.model.saved import CONFIG_FILE
from lorafocal.model.starts import plain_adapter
from lorafocal.objectives import Objective
from lorafocal.publish import check_name, published, recover, why_incomplete
from lorafocal.resume import changes

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
ADAPTER_FOLDER = "adapter"

# Of an adapter's configuration: what gives tensors of the same names and shapes another meaning.
_SCALES = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


def find_checkpoint(asked: str | bool | None, run: Path, *, writes: bool) -> Path | None:
    """The checkpoint to go on from: the one named, or for True the newest complete one of `run`; None for neither.

    `writes` is whether this process writes the run's files: it puts right what a kill left half renamed.
    Raises InputError where there is none, or where the one named is torn.
    """
    if not asked:
        return None
    if asked is not True:
        if reason := why_incomplete(Path(asked)):
            raise InputError(f"{asked} cannot be resumed from: {reason}. Give an earlier checkpoint")
        return Path(asked)
    with main_process_first():
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
    run: Path, progress: TrainerState, *, write_adapter: Callable[[Path], None], keep: int | None, **training: Any
) -> None:
    """`run`/checkpoint-<step>, complete or absent, and only the newest `keep` of them (None: all).

    `training` is what `checkpoint.save_state` takes.
    """
    recover(run)
    with published(run / f"checkpoint-{progress.global_step}", replace=True) as folder:
        write_adapter(folder / ADAPTER_FOLDER)
        save_state(folder, **training)
        progress.save_to_json(str(folder / STATE_FILE))
    if keep:
        rotate(run, keep)


class TrainedAdapter:
    """A policy's adapter as others can load it: plain PEFT files with its lineage and a card.

    Made before the first step: an adapter that is continued is part of the lineage as it was then.
    """

    def __init__(self, policy: PeftModel, objective: Objective, reference: str | None) -> None:
        self._policy = policy
        self._stages = stages_of(policy)
        self._made = {"objective": {"name": objective.name, **objective.parameters}, "reference": reference}
        self._lineage: Lineage | None = None

    def lineage(self, *, steps: int, pairs_seen: int) -> Lineage | None:
        """What made the adapter; None for a base that was never loaded from anywhere."""
        if self._lineage is None:
            self._lineage = lineage_on(causal_lm(self._policy), self._stages, **self._made, steps=0, pairs_seen=0)
        return self._lineage and replace(self._lineage, steps=steps, pairs_seen=pairs_seen)

    def check_same(self, checkpoint: Path) -> None:
        """Refuse a checkpoint of a run that was set otherwise: its tensors fit, and would mean something else here.

        Raises InputError naming what differs: the base's weights or precision, the objective, ranks and scales.
        """
        folder = checkpoint / ADAPTER_FOLDER
        then, now = lineage_of(folder), self.lineage(steps=0, pairs_seen=0)
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        differ = changes(_scales(config), _scales(plain_adapter(self._policy)[0].to_dict()), ())
        if then is not None and now is not None:
            differ += changes(_made_of(then), _made_of(now), ())
        if differ:
            raise InputError(
                f"{checkpoint.name} was trained otherwise than this run is set up (in its words, then -> now):\n  "
                + "\n  ".join(differ)
                + "\nset these back to resume, or continue its adapter in a new run"
            )

    def write(self, folder: Path, progress: TrainerState, *, pairs_seen: int, trained: bool) -> None:
        """Fill an unpublished folder; the card gets the rewards of the last evaluation."""
        last: dict[str, float] = next((e for e in reversed(progress.log_history) if "eval_loss" in e), {})
        results = {key: value for key, value in last.items() if key.startswith("eval_rewards/")}
        lineage = self.lineage(steps=progress.global_step, pairs_seen=pairs_seen)
        save_adapter(self._policy, folder, lineage, results, trained=trained)


def _scales(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: config.get(key) for key in _SCALES}


def _made_of(lineage: Lineage) -> dict[str, Any]:
    """The base, by its weights and not by its name, as training holds it; and what it is trained by."""
    base = {"sha256": lineage.base.sha256, "quantization": lineage.quantization, "dtype": lineage.dtype}
    return {"base": base, "objective": lineage.objective}


def publish_adapter(target: Path, write_adapter: Callable[[Path], None]) -> None:
    """The adapter's folder, complete or as it was; its name is checked."""
    check_name(target.name)
    with published(target, replace=True, record=False) as folder:
        write_adapter(folder)
