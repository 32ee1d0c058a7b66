"""One run of the study: trained by `lorafocal.run.train`, then measured with the weights still in memory.

A run leaves its folder and, once all is done, `cells/NAME.json`: log-probs of held-out pairs and of the first training
pairs, from which every number of the study is computed.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import permuted  # registers its objective, before lorafocal.config lists them
from design import Cell, Condition, Pairs
from task import held_out_rows, training_rows, write_rows

from lorafocal.assembly import tokenized
from lorafocal.config import Config, check_config
from lorafocal.data.tokens import TokenizedPair
from lorafocal.errors import InputError
from lorafocal.evaluate.score import pair_logps, score_pairs
from lorafocal.objectives import OBJECTIVES, PairLogps
from lorafocal.policy import sequence_logps
from lorafocal.publish import write_atomically
from lorafocal.run import cache_reference, train
from lorafocal.trainer import FocalPOTrainer
from lorafocal.yaml12 import parse_yaml

RUN_FILE = Path(__file__).parent / "run.yaml"
SIDES = ("chosen", "rejected")
DIGITS = 5  # of log-probs in a cell's file, in nats
LOGGED = ("focal/ratio_to_dpo", "focal/turned_share")  # of each pair as it was trained on
_TOKENS: dict[int, list[TokenizedPair]] = {}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a study lies: its folder, and its base's."""

    out: Path
    base: Path

    def data(self, condition: Condition, seed: int) -> Path:
        return self.out / "data" / f"{condition.name}-{seed}"

    def held_out(self) -> Path:
        return self.out / "data" / "held_out"

    def cell(self, cell: Cell) -> Path:
        return self.out / "cells" / f"{cell.name}.json"


def prepare_held_out(place: Place, pairs: Pairs) -> None:
    """The held-out pairs, validation first, and what the base says of them."""
    folder = place.held_out()
    write_rows(folder / "pairs.jsonl", held_out_rows(pairs.validation + pairs.test))
    _write_base_scores(place, folder / "pairs.jsonl")


def prepare_training(place: Place, pairs: Pairs, condition: Condition, seed: int) -> None:
    """Training pairs of a condition and seed, the store of their reference, and what the base says of the probes."""
    folder = place.data(condition, seed)
    if (folder / "base.json").exists():
        return
    rows = training_rows(pairs.training, noise=condition.noise, seed=seed)
    write_rows(folder / "pairs.jsonl", rows)
    write_rows(folder / "probes.jsonl", rows[: pairs.probes])
    write_atomically(folder / "swapped.json", json.dumps([row["swapped"] for row in rows]))
    cache_reference(_config(place, folder, {"name": "dpo", "beta": 1.0}), quiet=True)
    _write_base_scores(place, folder / "probes.jsonl")


def run_cell(cell: Cell, place: Place, pairs: Pairs) -> None:
    """Train and measure, unless that is done. Raises InputError where training is refused or stopped."""
    if place.cell(cell).exists():
        return
    started, cpu = time.perf_counter(), time.process_time()
    folder = place.data(cell.condition, cell.seed)
    training = {"learning_rate": cell.rate, "seed": cell.seed, "data_seed": cell.seed}
    config = _config(place, folder, cell.arm.objective, name=cell.name, training=training)
    kept: list[FocalPOTrainer] = []
    summary = train(
        config,
        resume=(place.out / "runs" / cell.name / "manifest.json").exists(),  # a killed one starts over
        quiet=True,
        runs_dir=place.out / "runs",
        callbacks=lambda config, *parts: partial(_keep, kept, config),
    )
    if summary.interrupted_by is not None:
        raise InputError(f"{cell.name} was stopped; the same command goes on there")
    trainer = kept.pop()
    result = {
        "steps": summary.steps,
        "held_out": _logps(trainer, _held_out(trainer, pairs.validation + pairs.test)),
        "probes": _logps(trainer, _in_file_order(trainer.data["train_dataset"].pairs)[: pairs.probes]),
        "logged": _logged(summary.folder / "metrics.jsonl"),
        "wall_s": round(time.perf_counter() - started, 2),
        "cpu_s": round(time.process_time() - cpu, 2),
    }
    place.cell(cell).parent.mkdir(exist_ok=True)
    write_atomically(place.cell(cell), json.dumps(result))
    del trainer
    gc.collect()  # trainer and callbacks hold each other, and with them the model


def _config(
    place: Place, folder: Path, objective: Mapping[str, Any], *, name: str = "study", training: Mapping[str, Any] = {}
) -> Config:
    """run.yaml with what is a run's own."""
    values = parse_yaml(RUN_FILE.read_text(encoding="utf-8"), source=str(RUN_FILE))
    values |= {"name": name, "objective": dict(objective)}
    values["model"] |= {"name": str(place.base)}
    values["data"] |= {"train": str(folder / "pairs.jsonl")}
    values["training"] |= training
    if OBJECTIVES[objective["name"]].reference:
        values["reference"] |= {"store": str(folder / "references")}
    else:
        del values["reference"]
    return check_config(values, source=f"the study's run {name}")


def _keep(kept: list[FocalPOTrainer], config: Config, trainer: FocalPOTrainer) -> tuple[()]:
    """Keep the trainer, whose model is measured after; for the permuted control, every step must be one pack."""
    if config.objective.name == permuted.NAME:
        longest = sorted(trainer.data["train_dataset"].pairs, key=_rows_of, reverse=True)
        packs = trainer.data_collator(longest[: config.training.pairs_per_step]).packs
        if len(packs) != 1:
            raise InputError(f"{config.name}: a step may take {len(packs)} packs: raise packing.tokens in run.yaml")
    kept.append(trainer)
    return ()


def _rows_of(pair: TokenizedPair) -> int:
    return len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)


def _held_out(trainer: FocalPOTrainer, count: int) -> list[TokenizedPair]:
    """The held-out pairs as this run's tokenizer writes them, which is every run's: tokenised once a process."""
    if count not in _TOKENS:
        _TOKENS[count] = tokenized(held_out_rows(count), "held_out", trainer.processing_class, trainer.args).pairs
    return _TOKENS[count]


def _in_file_order(pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """By the number of their row, with which a pair's id ends."""
    return sorted(pairs, key=lambda pair: int(pair.id.rpartition(":")[2]))


def _logps(trainer: FocalPOTrainer, pairs: Sequence[TokenizedPair]) -> dict[str, list[float]]:
    trainer.model.eval()
    policy = partial(sequence_logps, trainer.model)
    return _rounded(pair_logps(policy, pairs, device=trainer.args.device, collator=trainer.data_collator))


def _rounded(logps: PairLogps) -> dict[str, list[float]]:
    return {side: [round(value, DIGITS) for value in getattr(logps, side).tolist()] for side in SIDES}


def _write_base_scores(place: Place, file: Path) -> None:
    scores = _by_row(score_pairs(place.base, file).report.scores)
    sides = {
        side: [round(getattr(score, f"{side}_logps"), DIGITS) for score in scores] for side in ("chosen", "rejected")
    }
    write_atomically(file.parent / "base.json", json.dumps(sides))


def _by_row(scores: Sequence[Any]) -> list[Any]:
    return sorted(scores, key=lambda score: int(score.id.rpartition(":")[2]))


def _logged(metrics: Path) -> dict[str, float]:
    """Means over the log's lines, each of as many pairs; what an objective does not log is absent."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    found = {key: [line[key] for line in lines if key in line] for key in LOGGED}
    return {key: sum(values) / len(values) for key, values in found.items() if values}
