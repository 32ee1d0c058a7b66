"""`data.steps` in a config and in a run: what is refused, what is recorded, and that the order is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorafocal.config import check_config, load_config, resolved_yaml, training_arguments
from lorafocal.data.leave_out import line_of
from lorafocal.data.prepare import Part, check_sources, prepare_data
from lorafocal.data.steps.flip import swapped
from lorafocal.data.toy import toy_tokenizer
from lorafocal.errors import InputError
from lorafocal.manifest import _part
from lorafocal.objectives import OBJECTIVES
from lorafocal.plan import plan
from lorafocal.sampler import StepSampler
from lorafocal.schema import Data
from lorafocal.schema.steps import Step, pairs_left
from lorafocal.sweep.grid import Grid
from tests.test_config import VALUES, mistakes

TOKENIZER = toy_tokenizer()


def with_steps(*steps: Any, **more: Any) -> dict[str, Any]:
    return VALUES | {"data": VALUES["data"] | {"steps": list(steps)} | more}


SELECT = {"by": "score_gap", "keep": 0.5}


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (["select"], r"data\.steps\.0: found 'select'; it must be a mapping"),
        ([{}], r"data\.steps\.0: found none; a step has one key of pairs, select, order, chunk, flip"),
        ([{"select": SELECT, "flip": {"share": 0.1}}], r"data\.steps\.0: found select and flip; a step has one key"),
        ([{"selct": SELECT}], r"data\.steps\.0\.selct: unknown key"),
        (
            [{"sort": {"by": "margin"}}],
            r"steps\.0\.sort: unknown key; known here: data\.steps\.pairs, data\.steps\.select",
        ),
        ([{"select": SELECT | {"kep": 1}}], r"data\.steps\.0\.select\.kep: unknown key; did you mean .*keep\?"),
        ([{"select": SELECT | {"keep": 1.0}}], r"select\.keep: found 1\.0; allowed: a share below 1"),
        ([{"select": SELECT | {"keep": 0}}], r"select\.keep: found 0;"),
        ([{"select": {"by": "gap", "keep": 5}}], r"select\.by: found 'gap'; allowed: score_gap, length_gap, margin"),
        ([{"select": {"by": ["margin"], "keep": 5}}], r"select\.by: .*a list holds two quantities or more"),
        ([{"select": {"by": "margin", "keep": 5}}], r"select\.scores: missing; margin is read from a file"),
        ([{"select": SELECT | {"scores": "s.jsonl"}}], r"select\.scores: score_gap is of the rows' own scores"),
        ([{"select": SELECT | {"bounds": {"score_gap": [0, 1]}}}], r"select\.bounds: .*only fused ones have bounds"),
        ([{"select": SELECT | {"unscored": "leave_out"}}], r"select\.unscored: is about pairs that the file"),
        ([{"order": {"by": "score_gap"}}], r"data\.steps\.0\.order\.first: missing"),
        ([{"chunk": {"take": 3, "of": 2}}], r"chunk\.take: found 3; there are 2 chunks"),
        ([{"chunk": {"take": 1, "of": 1}}], r"chunk\.of: found 1"),
        ([{"flip": {"share": 0}}], r"flip\.share: found 0; allowed: a share above 0"),
        ([{"flip": {"share": 0.2}}, {"flip": {"share": 0.2}}], r"data\.steps: flip stands there twice"),
        ([{"flip": {"share": 0.2}}, {"pairs": {"of": "all"}}], r"data\.steps: pairs says how rows are read"),
        ([{"order": {"by": "score_gap", "first": "lowest"}}, {"chunk": {"take": 1, "of": 2, "seed": 1}}], "chunk.seed"),
        ([], r"data\.steps: "),
    ],
)
def test_what_makes_no_sense_is_a_mistake_in_the_config(steps: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_config(with_steps(*steps))


def test_a_resolved_config_says_the_steps_with_their_defaults(tmp_path: Path) -> None:
    config = check_config(with_steps({"flip": {"share": 0.2}}, {"select": SELECT}))
    (tmp_path / "run.yaml").write_text(resolved_yaml(config))
    assert load_config(tmp_path / "run.yaml") == config
    assert config.data.model_dump(mode="json")["steps"] == [
        {"flip": {"share": 0.2, "seed": 0, "scores": "follow"}},
        {"select": SELECT | {"which": "highest", "unscored": "error"}},
    ]


def test_an_override_reaches_an_item_of_the_list(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(resolved_yaml(check_config(with_steps({"flip": {"share": 0.2}}))))
    steps = load_config(file, ["data.steps.0.flip.share=0.4"]).data.steps
    assert steps is not None
    assert steps[0].settings.share == 0.4
    with pytest.raises(InputError, match=r"'1' is no item of a list of 1; say 0 to 0"):
        load_config(file, ["data.steps.1.flip.share=0.4"])


def test_only_an_order_keeps_the_data_from_being_shuffled() -> None:
    order = {"order": {"by": "score_gap", "first": "highest"}}
    assert training_arguments(check_config(with_steps(order)))["keep_order"] is True
    assert "keep_order" not in training_arguments(check_config(with_steps({"select": SELECT})))
    for epoch in range(3):
        steps = [list(StepSampler(7, 4, seed=None, rank=rank, world=2)) for rank in range(2)]
        assert [sorted(a + b) for a, b in zip(*steps, strict=True)] == [[0, 1, 2, 3], [4, 5, 6]], epoch


@pytest.mark.parametrize(
    ("steps", "left"),
    [([{"select": SELECT}], 50), ([{"select": SELECT | {"keep": 30}}, {"chunk": {"take": 2, "of": 4}}], 8)],
)
def test_pairs_that_are_left_are_counted_without_data(steps: list[dict[str, Any]], left: int) -> None:
    assert pairs_left([Step(**step) for step in steps], 100) == left


SHAPE = {
    "model_type": "llama", "vocab_size": 100, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


def test_a_plan_counts_the_steps_of_what_is_left() -> None:
    values = with_steps({"select": SELECT}) | {"stages": 3, "model": VALUES["model"] | {"shape": SHAPE}}
    work = plan(check_config(values), None, pairs=1000).work
    assert (work.pairs, work.steps) == (500, 3 * 3)  # 166 or 167 pairs a stage, 64 a step


# ---- the data of a run

ROWS = [
    {"prompt": f"question {n}", "chosen": f" yes {n}", "rejected": " no", "id": f"id-{n}", "score_chosen": 7 * n % 23}
    | {"score_rejected": -1}
    for n in range(20)
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def prepared(rows: Path, *steps: Any, objective: str = "dpo", **more: Any) -> dict[str, Part]:
    section = Data(**{"train": str(rows), "cache": False, "steps": list(steps) or None} | more)
    check_sources(section)
    return prepare_data(section, TOKENIZER, objective=OBJECTIVES[objective])


def test_steps_follow_one_another_and_are_recorded(rows: Path) -> None:
    order, chunk = {"order": {"by": "score_gap", "first": "highest"}}, {"chunk": {"take": 1, "of": 2}}
    part = prepared(rows, {"select": SELECT}, order, chunk)["train"]
    gaps = [pair.score_chosen for pair in part.tokens.pairs]
    assert gaps == [22, 21, 20, 19, 18]
    found = _part(part)["steps"]
    assert [(step["step"], step["before"], step["after"]) for step in found] == [
        ("select", 20, 10),
        ("order", 10, 10),
        ("chunk", 10, 5),
    ]
    assert len({step["ids_sha256"] for step in found}) == 3
    assert "  step 1, select: highest score_gap" in str(part)
    assert "steps" not in _part(prepared(rows)["train"])


def test_held_out_pairs_are_those_of_a_run_without_steps(rows: Path) -> None:
    plain = prepared(rows, held_out=0.2)
    noisy = prepared(rows, {"flip": {"share": 1.0}}, {"select": SELECT}, held_out=0.2)
    assert noisy["eval"].tokens.pairs == plain["eval"].tokens.pairs
    assert noisy["eval"].steps == ()
    assert len(noisy["train"].tokens.pairs) == 8


def test_weights_come_after_the_steps(rows: Path) -> None:
    part = prepared(rows, {"select": SELECT}, train=[{"path": str(rows), "weight": 2.0}])["train"]
    assert len(part.tokens.pairs) == 20
    assert len({pair.id.partition("#")[0] for pair in part.tokens.pairs}) == 10


def test_a_list_of_a_noisy_run_names_its_pairs_again(rows: Path, tmp_path: Path) -> None:
    """The suspects of a run with flips are written with the digests of what it was trained on."""
    flip = {"flip": {"share": 0.5, "seed": 3}}
    before = prepared(rows, flip)["train"].preferences
    turned = [pair for pair in before if pair.score_chosen == -1]
    assert 3 < len(turned) < 17
    leave_out = tmp_path / "leave_out.txt"
    leave_out.write_text("".join(f"{line_of(pair)}\n" for pair in turned))
    after = prepared(rows, flip, {"select": {"by": "length_gap", "keep": 3}}, leave_out=str(leave_out))["train"]
    assert not {pair.id for pair in turned} & {pair.id for pair in after.preferences}
    flipless = prepared(rows, flip | {}, leave_out=str(leave_out))["train"].preferences
    assert [pair for pair in before if pair not in turned] == flipless
    with pytest.raises(InputError, match="is another pair now"):
        prepared(rows, {"select": SELECT}, leave_out=str(leave_out))
    assert swapped(swapped(turned[0])) == turned[0]


def test_noise_beside_a_loss_of_scores_must_say_what_the_judge_thinks(rows: Path) -> None:
    with pytest.raises(InputError, match=r"data\.steps\.0\.flip\.scores: the objective is a loss of both scores"):
        prepared(rows, {"flip": {"share": 0.5}}, objective="odpo")
    assert len(prepared(rows, {"flip": {"share": 0.5, "scores": "stay"}}, objective="odpo")["train"].tokens.pairs) == 20


def test_a_file_of_scores_that_is_not_there_is_named_before_anything_is_read(rows: Path) -> None:
    with pytest.raises(InputError, match=r"data\.steps\.0\.select\.scores: nowhere\.jsonl is no file"):
        prepared(rows, {"select": {"by": "margin", "keep": 5, "scores": "nowhere.jsonl"}})


def test_pairs_are_made_of_ranked_rows_on_both_sides(tmp_path: Path) -> None:
    file = tmp_path / "ranked.jsonl"
    ranked = [{"prompt": f"q{n}", "answers": [" 1", " 2", " 3"], "scores": [1, 3, 2], "id": n} for n in range(10)]
    file.write_text("".join(json.dumps(row) + "\n" for row in ranked))
    parts = prepared(file, {"pairs": {"of": "best_each"}}, held_out=0.2)
    assert [len(part.tokens.pairs) for part in parts.values()] == [16, 4]
    (done,) = parts["train"].steps
    assert (done.before, done.after) == (8, 16)
    assert {pair.id.partition("/")[2] for pair in parts["train"].preferences} == {"2-3", "2-1"}


def test_a_mistake_in_stages_is_told_with_the_others() -> None:
    told = mistakes(with_steps({"chunk": {"take": 1, "of": 2}}) | {"stages": 2})
    assert "stages: each stage takes a chunk of the data itself" in told
    told = mistakes(VALUES | {"stages": 2, "reference": {"kind": "cached"}})
    assert "reference.kind cached is not replaced by that" in told
    assert "stages: found 1" in mistakes(VALUES | {"stages": 1})


def test_a_sweep_varies_a_step_that_leaves_held_out_pairs_alone(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(resolved_yaml(check_config(with_steps({"pairs": {"of": "all"}}, {"flip": {"share": 0.2}}))))
    grid = Grid.read(file, ["data.steps.1.flip.share=0.1,0.3"])
    shares = [step.settings.share for point in grid.points for step in (point.config.data.steps or [])[1:]]
    assert shares == [0.1, 0.3]
    with pytest.raises(InputError, match="it decides which held-out pairs there are"):
        Grid.read(file, ["data.steps.0.pairs.of=all,adjacent"])
