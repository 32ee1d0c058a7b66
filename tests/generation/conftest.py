"""A run whose adapter changes what its base says, and prompts to both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lorafocal.data.toy import toy_prompts
from tests.saved_run import SavedRun, save_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    return save_run(tmp_path_factory.mktemp("generation"), std=0.3, base_dtype=torch.float32, dtype="float32")


@pytest.fixture(scope="session")
def instructions() -> list[str]:
    return [prompt[0]["content"] for prompt in toy_prompts(14, seed=1)]


@pytest.fixture
def asked(tmp_path: Path, instructions: list[str]) -> Path:
    """As AlpacaEval's evaluation set, whose own answers are the reference's."""
    file = tmp_path / "eval.json"
    rows = [{"instruction": text, "output": "9", "generator": "ref", "dataset": "toy"} for text in instructions]
    file.write_text(json.dumps(rows))
    return file


@pytest.fixture
def questions(tmp_path: Path, instructions: list[str]) -> Path:
    """As Arena-Hard's question.jsonl; every third has a second turn."""
    file = tmp_path / "question.jsonl"
    rows = [
        {
            "question_id": f"q{number}",
            "category": "arena-hard-v0.1",
            "cluster": "toy",
            "turns": [{"content": text}, {"content": "sort 2 1"}][: 2 if number % 3 == 0 else 1],
        }
        for number, text in enumerate(instructions[:5])
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
