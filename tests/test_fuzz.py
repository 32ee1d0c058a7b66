"""Damaged rows and damaged configs: every one ends in a result, or in exit code 2 with one message and no traceback.

700 files of a damaged row and 80 damaged configs, the same ones each time, through the command itself.
"""

from __future__ import annotations

import copy
import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

from lorafocal import cli, run
from lorafocal.config import check_config, known_keys
from lorafocal.errors import InputError
from lorafocal.model import load
from lorafocal.yaml12 import dump_yaml
from tests.mutations import damaged, damaged_bytes
from tests.toy_run import write_inputs

USER = {"role": "user", "content": "sort 3 1 2"}
GOOD, BAD = {"role": "assistant", "content": "1 2 3"}, {"role": "assistant", "content": "3 1 2"}
TURN = {"from": "human", "value": "sort 3 1 2"}
ROWS: dict[str, dict[str, Any]] = {
    "explicit": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "score_chosen": 0.7, "id": "a"},
    "plain": {"prompt": "sort 3 1 2", "chosen": " 1 2 3", "rejected": " 3 1 2"},
    "implicit": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "sharegpt": {
        "conversations": [TURN], "chosen": {"from": "gpt", "value": "1"}, "rejected": {"from": "gpt", "value": "2"}
    },
    "hh": {"chosen": "\n\nHuman: sort 2 1\n\nAssistant: 1 2", "rejected": "\n\nHuman: sort 2 1\n\nAssistant: 2 1"},
    "ultrafeedback": {
        "prompt": "sort 3 1 2", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 8, "score_rejected": 2
    },
    "openai": {"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
}  # fmt: skip
EACH = 100  # damaged rows a form: 700 in all
CONFIGS = 80
PLAUSIBLE: tuple[Any, ...] = (
    True, False, 0, 1, 2, 3, 7, 64, 1000, 0.0, 1e-5, 0.1, 0.5, 0.9, 1.0, 20.0, None, "no", "steps", "epoch", "linear",
    "cosine", "adamw_torch", "sgd", "drop", "error", "recipe", "keep_start", "cut_prompt_left", "explicit", "auto",
    "padded", "packed", "frozen_copy", "separate_model", "sft", "dpo", "none", "loss", ["q_proj"], {"power": 2.0},
)  # fmt: skip

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process: its exit code and what it said."""
    monkeypatch.setattr(typer.main, "get_command", get_command)
    monkeypatch.setattr(load, "AutoTokenizer", _CachedTokenizers)

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["lorafocal", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), capsys.readouterr().err

    return call


get_command = cache(typer.main.get_command)  # typer builds the same tree at every call: three quarters of it


class _CachedTokenizers:
    """Loading a tokenizer takes longer than everything else here."""

    from_pretrained = staticmethod(cache(load.AutoTokenizer.from_pretrained))


def check_ending(code: int, said: str, case: str) -> None:
    """A result, or exit code 2 with a message and without a traceback."""
    assert code in (0, 2), f"exit code {code} for {case}:\n{said}"
    assert "Traceback" not in said, case
    if code == 2:
        [message] = [line for line in said.splitlines() if line.startswith("lorafocal: ")]
        assert len(message) > 20, case


@pytest.mark.slow
@pytest.mark.row("29")
@pytest.mark.parametrize("form", ROWS)
def test_a_damaged_row_is_a_result_or_one_message(form: str, root: Path, tmp_path: Path, command: Run) -> None:
    rng = random.Random(form)
    endings: Counter[int] = Counter()
    sound = json.dumps(ROWS[form] | {"id": "sound"} if form == "explicit" else ROWS[form]).replace("3 1 2", "4 2 3")
    configs = [tmp_path / f"{on_bad_row}.yaml" for on_bad_row in ("drop", "error")]
    for config in configs:
        config.write_text(dump_yaml(values(root, tmp_path / "rows.jsonl", on_bad_row=config.stem)))
    for number in range(EACH):
        text = json.dumps(damaged(ROWS[form], rng)).encode()
        if number % 3 == 0:
            text = damaged_bytes(json.dumps(ROWS[form]).encode(), rng)
        (tmp_path / "rows.jsonl").write_bytes(text + b"\n" + sound.encode() + b"\n")
        code, said = command("check", str(configs[number % 2]), "--json")
        check_ending(code, said, f"{form} {number}: {text[:300]!r}")
        endings[code] += 1
    assert min(endings[0], endings[2]) > EACH // 20, endings  # some damage is survived, some refused


@pytest.mark.slow
@pytest.mark.row("32")
def test_a_damaged_config_is_a_result_or_one_message(
    root: Path, tmp_path: Path, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random("configs")
    monkeypatch.setattr(run.FocalPOTrainer, "train", lambda self, **kwargs: None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # some of them ask for it: half a minute
    monkeypatch.chdir(tmp_path)
    endings: Counter[int] = Counter()
    for number in range(CONFIGS):
        config = tmp_path / "run.yaml"
        sound = values(root, root / "train.jsonl", eval=str(root / "eval.jsonl"))
        if number % 4 == 0:
            config.write_bytes(damaged_bytes(dump_yaml(sound).encode(), rng))
        elif number % 4 == 1:
            config.write_text(json.dumps(damaged(sound, rng)))  # YAML reads JSON
        elif number % 4 == 2:
            config.write_text(json.dumps(with_other_values(sound, rng)))
        else:
            config.write_text(json.dumps(accepted(sound, rng)))
        verb = ("check",) if number % 8 < 4 else ("train", "--quiet", "--runs", str(tmp_path / f"runs-{number}"))
        code, said = command(verb[0], str(config), *verb[1:])
        check_ending(code, said, f"config {number}: {config.read_bytes()[:600]!r}")
        endings[code] += 1
    assert min(endings[0], endings[2]) > CONFIGS // 20, endings


def with_other_values(config: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """One to three keys of the schema with a value that some key would take."""
    config = copy.deepcopy(config)
    for key in rng.sample(known_keys(), rng.choice((1, 2, 3))):
        section, _, last = key.partition(".")
        if last and "." not in last and isinstance(config.setdefault(section, {}), dict):
            config[section][last] = rng.choice(PLAUSIBLE)
    return config


def accepted(config: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Other values that the schema takes, so that what comes after it is met too."""
    while True:
        other = with_other_values(config, rng)
        try:
            check_config(other)
        except InputError:
            continue
        return other


def values(root: Path, rows: Path, **data: Any) -> dict[str, Any]:
    """A config on the toy base."""
    return {
        "name": "toy",
        "model": {"name": str(root / "base"), "dtype": "float32"},
        "adapter": {"r": 4, "alpha": 8},
        "data": {"train": str(rows), "max_length": 64, "cache": False, **data},
        "objective": {"name": "focalpo", "beta": 0.1},
        "reference": {"kind": "disabled_adapter"},
        "training": {"pairs_per_step": 4, "learning_rate": 1e-3, "max_steps": 1, "use_cpu": True},
        "packing": {"tokens": 256},
    }
