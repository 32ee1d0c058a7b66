"""What the README shows to be copied must be what the program takes."""

from __future__ import annotations

import re
from pathlib import Path

from lorafocal.cli import app
from lorafocal.config import check_config
from lorafocal.yaml12 import parse_yaml

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_whole_config_and_the_parts_of_others_are_accepted() -> None:
    whole, data, quantized, strategies, factor = (parse_yaml(block, source="README.md") for block in blocks("yaml"))
    assert check_config(whole).data.held_out == 0.1
    assert check_config({**whole, **data}).data.max_length == 1536
    assert check_config({**whole, **quantized}).model.quantization == "nf4"
    assert check_config({**whole, **strategies}).reference.mixing == 0.6
    assert (
        check_config({**whole, **factor, "reference": None}).objective.focal.gamma == 0.05
    )  # SimPO compares with none


def test_every_command_and_option_that_is_shown_exists() -> None:
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    known |= {group.name for group in app.registered_groups}
    shown = re.findall(r"(?:^|`|-m )lorafocal ([a-z-]+)([^`\n#]*)", "\n".join([*blocks("bash"), README]), re.MULTILINE)
    verbs = {verb for verb, _ in shown}
    assert {"train", "check", "report", "score", "merge", "from-trl"} <= verbs <= known
