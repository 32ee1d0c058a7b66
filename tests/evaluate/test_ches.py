"""CHES: the paper's definition by hand and from plain transformers' hidden states, in every layout, through `score`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lorafocal.data.packing import pad_sequences, share_prefixes
from lorafocal.data.tokens import TokenizedPair
from lorafocal.evaluate.ches import ches, logps_and_ches
from lorafocal.evaluate.score import score_file
from lorafocal.policy import prepare_policy, sequence_logps
from tests.saved_run import SavedRun, save_run
from tests.tiny import pairs, tiny_policy


def test_ches_by_hand() -> None:
    """Two chosen rows (1, 0) and (1, 2), one rejected row (3, 4): <(2, 2), (3, 4)> - |(2, 2)|^2 = 14 - 8."""
    pair = TokenizedPair("p", [5], [6, 7], [8])
    found = ches(torch.tensor([[1.0, 0.0], [1.0, 2.0], [3.0, 4.0]]), share_prefixes([pair]).index)
    assert found.plain.tolist() == [6.0]
    assert found.normalised.tolist() == [14 / 2 - 8 / 4]


@torch.no_grad()
def by_the_paper(model: nn.Module, pair: TokenizedPair) -> tuple[float, float]:
    """From hidden states of whole sequences: those of the last prompt token to the last but one of the answer."""

    def states(answer: list[int]) -> Tensor:
        output = model(torch.tensor([pair.prompt_ids + answer]), output_hidden_states=True)
        return output.hidden_states[-1][0, len(pair.prompt_ids) - 1 : -1].double()

    found = []
    for pool in (Tensor.sum, Tensor.mean):
        chosen, rejected = (pool(states(ids), dim=0) for ids in (pair.chosen_ids, pair.rejected_ids))
        found.append(float(chosen @ rejected - chosen.norm() ** 2))
    return found[0], found[1]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_pack_s_ches_are_those_of_plain_transformers(layout: str) -> None:
    batch = pairs(6)
    plain = tiny_policy().eval()
    expected = torch.tensor([by_the_paper(plain, pair) for pair in batch], dtype=torch.float64)
    model = tiny_policy().eval()
    prepare_policy(model, layout=layout)
    pack = (share_prefixes if layout == "packed" else pad_sequences)(batch)
    with torch.no_grad():
        logps, found = logps_and_ches(model, pack)
        assert all(torch.equal(*sides) for sides in zip(logps, sequence_logps(model, pack), strict=True))
    torch.testing.assert_close(found.plain, expected[:, 0], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.normalised, expected[:, 1], rtol=1e-4, atol=1e-3)
    assert not model.get_base_model().get_output_embeddings()._forward_pre_hooks


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    return save_run(tmp_path_factory.mktemp("ches"), base_dtype=torch.float32, dtype="float32")


def test_score_measures_it_where_it_is_asked_for(run: SavedRun, tmp_path: Path) -> None:
    held_out = run.folder / "held_out.jsonl"
    report = score_file(run.folder, held_out, ches=True, out=tmp_path / "scores.jsonl")
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run.base), run.adapter)
    expected = [by_the_paper(policy, pair) for pair in run.pairs]
    found = [(score.ches, score.ches_normalised) for score in report.scores]
    assert found == [pytest.approx(both, rel=1e-3, abs=1e-3) for both in expected]
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [row["ches"] for row in rows] == [score.ches for score in report.scores]
    totals = report.as_dict()
    assert totals["ches"] == pytest.approx(sum(plain for plain, _ in expected) / len(expected), rel=1e-3)
    assert "ches_normalised" in report.table()
    without: dict[str, Any] = score_file(run.folder, held_out).as_dict()
    assert "ches" not in without
    assert {name: totals[name] for name in without} == without
