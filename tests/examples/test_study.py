"""The study: its control does what it says, its statistics agree with known answers, and it runs end to end."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lorafocal.errors import InputError
from lorafocal.objectives import OBJECTIVES, PairLogps, build_objective

STUDY = Path(__file__).resolve().parents[2] / "examples" / "study"
sys.path.insert(0, str(STUDY))  # the study's files import each other by name, as scripts do
import analysis  # noqa: E402
import permuted  # noqa: E402

del OBJECTIVES[permuted.NAME]  # other tests of this process go over the registry
import task  # noqa: E402
from design import read_study  # noqa: E402

TINY = """
base: {hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2, steps: 2}
pairs: {training: 128, validation: 6, test: 9, probes: 20}
conditions:
  noisy: {noise: 0.3, first_seed: 1, seeds: 2}
primary: noisy
rates: [1.0e-3]
published_rate: 1.0e-3
arms:
  dpo: {name: dpo, beta: 1.0}
  focalpo: {name: focalpo, beta: 1.0, gamma: 0.2}
  focal-hard-1: {name: focal-hard, beta: 1.0, gamma: 1.0}
  permuted: {name: focalpo-permuted, beta: 1.0, gamma: 0.2}
  simpo-focal: {name: simpo, beta: 2.0, focal: {form: p_gamma, gamma: 0.05}}
  omni-dpo: {name: omni-dpo, beta: 2.0}
contrast: [focalpo, dpo]
secondary: [[focalpo, permuted], [omni-dpo, dpo]]
equivalence: 1.0
"""


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, permuted.NAME, permuted.ENTRY)


@pytest.fixture
def pairs() -> tuple[PairLogps, PairLogps, torch.Tensor]:
    """Policy, reference and lengths of a step of 32 pairs whose margins are wide."""
    generator = torch.Generator().manual_seed(0)
    sides = [3 * torch.randn(32, generator=generator, dtype=torch.float64) - 6 for _ in range(4)]
    lengths = torch.randint(2, 7, (64,), generator=generator)
    return PairLogps(sides[0].requires_grad_(), sides[1]), PairLogps(sides[2], sides[3]), lengths


def weights_of(name: str, pairs: tuple[PairLogps, PairLogps, torch.Tensor], gamma: float) -> torch.Tensor:
    """-dL/dmargin of each pair at beta 1."""
    losses = build_objective(name, beta=1.0, gamma=gamma)(*pairs).losses
    return -torch.autograd.grad(losses.sum(), pairs[0].chosen)[0]


def test_the_control_has_focalpos_weights_on_other_pairs(pairs):
    policy, reference, lengths = pairs
    margins = (policy.chosen - policy.rejected) - (reference.chosen - reference.rejected)
    dpo = torch.sigmoid(-margins).detach()
    own, dealt = (weights_of(name, pairs, 0.2) / dpo for name in ("focalpo", permuted.NAME))
    assert torch.allclose(own.sort().values, dealt.sort().values, atol=1e-12)
    assert not torch.allclose(own, dealt, atol=1e-3)
    assert torch.allclose(dealt, own[permuted.permutation(lengths)], atol=1e-12)


def test_without_the_permutation_the_control_is_focalpo(pairs, monkeypatch):
    monkeypatch.setattr(permuted, "permutation", lambda lengths: torch.arange(len(lengths) // 2))
    assert torch.allclose(weights_of("focalpo", pairs, 0.2), weights_of(permuted.NAME, pairs, 0.2), atol=1e-12)


def test_the_permutation_is_of_the_step_alone(pairs):
    lengths = pairs[2]
    drawn = permuted.permutation(lengths)
    assert drawn.equal(permuted.permutation(lengths.clone()))
    assert drawn.sort().values.equal(torch.arange(32))
    assert not drawn.equal(permuted.permutation(lengths.flip(0)))


def test_swaps_are_as_many_as_asked_and_change_nothing_else():
    clean, noisy = (task.training_rows(600, noise=noise, seed=3) for noise in (0.0, 0.2))
    assert not any(row["swapped"] for row in clean)
    assert 0.15 < np.mean([row["swapped"] for row in noisy]) < 0.25
    for before, after in zip(clean, noisy, strict=True):
        sides = (after["rejected"], after["chosen"]) if after["swapped"] else (after["chosen"], after["rejected"])
        assert (before["prompt"], before["chosen"], before["rejected"]) == (after["prompt"], *sides)


@pytest.mark.parametrize("t", [0.0, 0.3, 2.1, 9.0, 300.0])
def test_students_p_is_its_closed_form(t):
    assert analysis.two_sided_p(t, 1) == pytest.approx(1 - 2 * math.atan(t) / math.pi, rel=1e-9)
    assert analysis.two_sided_p(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)
    assert analysis.two_sided_p(-t, 2) == analysis.two_sided_p(t, 2)


@pytest.mark.parametrize(("freedom", "t"), [(4, 2.776445105), (7, 2.364624252), (30, 2.042272456)])
def test_students_quantiles_are_those_of_tables(freedom, t):
    assert analysis.student_quantile(0.975, freedom) == pytest.approx(t, rel=1e-9)


def test_holm_steps_down_and_never_falls():
    assert analysis.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert analysis.holm([0.5, 0.9]) == [1.0, 1.0]


def test_sign_flips_are_exact():
    assert analysis.sign_flips(np.asarray([1.0, 2.0, 3.0])) == 0.25
    assert analysis.sign_flips(np.asarray([1.0, -1.0])) == 1.0


def test_a_contrast_is_paired_by_seed_and_question():
    rng = np.random.default_rng(0)
    easy = rng.random(300)  # what questions have in common, which pairing takes away
    prompts = {}
    for seed in range(8):
        noise = rng.normal(0, 0.001, 300)
        prompts["c", "one", 0.1, seed] = easy + noise + 0.02
        prompts["c", "other", 0.1, seed] = easy + 0.3 * seed
        prompts["c", "one", 0.1, seed] += 0.3 * seed
    found = analysis.contrast(prompts, "c", ("one", "other"), {"one": 0.1, "other": 0.1})
    assert found.value == pytest.approx(2.0, abs=0.02)
    assert found.drawn[0] < found.low < found.value < found.high < found.drawn[1]  # questions differ by more than seeds
    assert found.p < 1e-6
    assert found.verdict(1.0) == "better"
    assert found.verdict(5.0) == "better, and the difference is too small to matter"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("contrast: [focalpo, dpo]", "contrast: [focal, dpo]", "focal"),
        ("primary: noisy", "primary: quiet", "quiet"),
        ("seeds: 2", "seeds: 1", "2 seeds or more"),
        ("equivalence: 1.0", "equivalent: 1.0", "equivalence, equivalent"),
        ("published_rate: 1.0e-3", "published_rate: 2.0e-3", "none of the rates"),
    ],
)
def test_a_mistake_in_the_file_is_told(tmp_path, old, new, said):
    file = tmp_path / "study.yaml"
    file.write_text(TINY.replace(old, new))
    with pytest.raises(InputError, match=said):
        read_study(file)


def test_the_shipped_study_reads_and_its_arms_can_train():
    study = read_study(STUDY / "study.yaml")
    assert all(len(condition.seeds) >= 5 for condition in study.conditions)
    for arm in study.arms:
        build_objective(**arm.objective)


@pytest.mark.slow
def test_the_page_and_the_docs_say_what_the_tables_give(tmp_path):
    """Numbers are never typed: the page is written again from the committed tables, and the docs quote it."""
    import page

    shutil.copytree(STUDY / "results", tmp_path / "results")
    written = page.write_page(read_study(STUDY / "study.yaml"), tmp_path / "results").read_text()
    assert written == (STUDY / "results" / "study.md").read_text()
    said = written.split("## What came out\n\n")[1].split("\n\n![")[0].split("\n\n")
    docs = (STUDY.parents[1] / "docs" / "study.md").read_text()
    assert len(said) == 5
    assert [line for line in said if f"> {line}\n" not in docs] == []


def ran(*arguments: str | Path, cache: Path) -> None:
    """The command, in a process of its own: a config takes the study's objective where it is registered first."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    subprocess.run([sys.executable, STUDY / "run.py", "--workers", "1", *arguments], check=True, env=environment)


@pytest.mark.engine
def test_the_study_runs_and_goes_on_where_it_was_stopped(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(TINY)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ran("--study", file, "--out", whole, "--results", whole / "results", cache=tmp_path / "cache")
    page = (whole / "results" / "study.md").read_text()
    assert "Primary (noisy): focalpo" in page
    assert (whole / "results" / "study.png").read_bytes().startswith(b"\x89PNG")
    assert len((whole / "results" / "runs.csv").read_text().splitlines()) == 13
    assert len((whole / "results" / "answers.csv").read_text().splitlines()) == 5
    done = sorted((whole / "cells").iterdir())
    kept = {path.name: path.read_text() for path in done[1:]}
    done[0].unlink()
    before = (whole / "results" / "prompts.csv").read_text()
    ran("--study", file, "--out", whole, "--results", parts, cache=tmp_path / "cache")
    assert (parts / "prompts.csv").read_text() == before  # a run that is done again comes out the same
    assert {path.name: path.read_text() for path in done[1:]} == kept


def test_a_folder_of_another_study_is_refused(tmp_path):
    from run import take_up

    file = tmp_path / "study.yaml"
    file.write_text(TINY)
    take_up(read_study(file), tmp_path / "out")
    file.write_text(TINY.replace("test: 9", "test: 10"))
    with pytest.raises(InputError, match="another study file"):
        take_up(read_study(file), tmp_path / "out")
