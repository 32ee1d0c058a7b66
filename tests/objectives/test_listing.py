"""`lorafocal objectives`: every objective with what it is set by, what it needs, and a config that is there."""

from __future__ import annotations

import json

import pytest

from lorafocal.config import load_config
from lorafocal.objectives import OBJECTIVES
from lorafocal.objectives.listing import Described, described, needs_of
from tests.command import call


def test_all_are_listed_with_their_parameters() -> None:
    lines = described(None).table().splitlines()
    for name, entry in OBJECTIVES.items():
        [line] = [line for line in lines if line.split()[:1] == [name]]
        assert all(key in line for key in entry.parameters)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_has_a_config_of_its_name_that_says_all_its_parameters_at_their_defaults(name: str) -> None:
    one = described(name)
    assert isinstance(one, Described)
    config = load_config(one.config)
    entry = config.objective.entry
    assert config.objective.name == config.name == name
    assert (config.reference is not None) == entry.reference
    assert len(one.what) > 20
    text = one.config.read_text(encoding="utf-8")
    for key, of in entry.parameters.items():
        [said] = [line for line in text.splitlines() if line.startswith(f"  {key}: ")]
        assert len(said.partition("  # ")[2]) > 10
        assert of.stated or getattr(config.objective, key) == of.default
    assert json.loads(json.dumps(one.as_dict()))["needs"] == needs_of(entry)


def test_a_name_that_is_not_there_is_answered_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "objectives", "dppo") == 2
    assert "did you mean dpo" in capsys.readouterr().err
    assert call(monkeypatch, "objectives", "GAMMA_PO") == 2  # as papers write names, and as Python does
    assert "did you mean gamma-po" in capsys.readouterr().err
    assert call(monkeypatch, "objectives", "simpo") == 0
    assert capsys.readouterr().out.startswith("simpo: SimPO, arXiv 2405.14734")
