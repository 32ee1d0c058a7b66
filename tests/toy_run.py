"""A toy base and preference files on disk, and the config of a run on them that takes a second or two."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorafocal.config import Config, check_config
from lorafocal.data.toy import right_answer, toy_preferences
from tests.saved_run import save_base

PAIRS, HELD_OUT, PAIRS_PER_STEP, EPOCHS = 21, 5, 8, 3
OF_THE_MACHINE = ("pairs_per_s", "peak_gib")
STEPS = 9  # three an epoch: 8, 8 and 5 pairs


def write_inputs(root: Path) -> Path:
    """`base`, `train.jsonl` (conversational rows, the last three plain) and `eval.jsonl` in `root`."""
    save_base(root / "base", dtype=torch.float32)
    rows = toy_preferences(PAIRS, seed=1)
    rows[-3:] = [_plain(row) for row in rows[-3:]]
    _write_rows(root / "train.jsonl", [row | {"id": f"toy-{n}"} for n, row in enumerate(rows)])
    _write_rows(root / "eval.jsonl", toy_preferences(HELD_OUT, seed=2, held_out=True))
    return root


def run_config(root: Path, **changes: Any) -> Config:
    """Three ragged epochs, several packs a step, checkpoints between logs; `section__key=value` changes it,
    None leaves the key out."""
    values: dict[str, Any] = {
        "name": "toy",
        "model": {"name": str(root / "base"), "dtype": "float32"},
        "adapter": {"r": 4, "alpha": 8},
        "data": {"train": str(root / "train.jsonl"), "eval": str(root / "eval.jsonl"), "max_length": 64},
        "objective": {"name": "focalpo", "beta": 0.1},
        "reference": {"kind": "disabled_adapter"},
        "training": {
            "pairs_per_step": PAIRS_PER_STEP,
            "learning_rate": 1e-2,
            "num_train_epochs": EPOCHS,
            "logging_steps": 4,
            "save_steps": 2,
            "use_cpu": True,
        },
        "packing": {"tokens": 52},
    }
    for key, value in changes.items():
        section, _, field = key.partition("__")
        values[section].pop(field, None)
        if value is not None:
            values[section][field] = value
    return check_config(values)


def metric_lines(run: Path, *, key: str = "loss") -> list[dict[str, float]]:
    """The lines of `metrics.jsonl` that hold `key`: "loss" training, "eval_loss" evaluation; without what the machine
    does, which no two runs share."""
    lines = [line for line in all_lines(run) if key in line]
    return [{k: v for k, v in line.items() if k not in OF_THE_MACHINE} for line in lines]


def all_lines(run: Path) -> list[dict[str, float]]:
    """`metrics.jsonl` as it is."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    question = row["prompt"][-1]["content"]
    return {"prompt": question, "chosen": f" {right_answer(question)}", "rejected": row["rejected"][0]["content"]}


def _write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
