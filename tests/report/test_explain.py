"""`lorafocal explain`: exact sums against `score`, every character of the data made harmless, pairs found by id."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from lorafocal.data.held_out import write_held_out
from lorafocal.data.toy import toy_preferences
from lorafocal.errors import InputError
from lorafocal.evaluate.score import score_file
from lorafocal.evaluations import EvaluatedPair, evaluation_file, write_evaluation
from lorafocal.objectives import build_objective
from lorafocal.report import explain as explain_file
from lorafocal.report.explain import explain
from lorafocal.report.explain_page import EDGE
from lorafocal.report.explain_words import findings
from lorafocal.report.explanation import (
    Answer,
    Explanation,
    Gap,
    Token,
    Weighing,
    folded,
    full_colour,
    half_of_movement,
    parts,
)
from lorafocal.report.token_texts import token_texts
from tests.parsed_page import Page
from tests.saved_run import BETA, SavedRun, save_run

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    root = tmp_path_factory.mktemp("explained")
    saved = save_run(root, base_dtype=torch.float32, dtype="float32")
    rows = [row | {"id": f"train-{n}"} for n, row in enumerate(toy_preferences(9, seed=1))]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "name": "run",
        "model": {"name": str(saved.base), "dtype": "float32"},
        "adapter": {"r": 4, "alpha": 8},
        "data": {"train": str(root / "train.jsonl"), "max_length": 64, "cache": False},
        "objective": {"name": "focalpo", "beta": BETA},
        "reference": {"kind": "disabled_adapter"},
        "training": {"pairs_per_step": 4, "learning_rate": 1e-3},
    }
    (saved.folder / "config.yaml").write_text(json.dumps(config))
    return saved


@pytest.fixture(scope="module")
def explained(run: SavedRun) -> Explanation:
    return explain(run.folder, run.pairs[0].id)


def answer(*logratios: float, texts: list[str] | None = None, ended: bool | None = True) -> Answer:
    texts = texts or [f"t{n}" for n in range(len(logratios))]
    return Answer(tuple(Token(text, -1.0 + r, -1.0) for text, r in zip(texts, logratios, strict=True)), ended)


def made_up(chosen: Answer, rejected: Answer, **more: Any) -> Explanation:
    defaults: dict[str, Any] = {
        "id": "p", "place": "pairs of a", "policy_name": "run", "reference_name": "base", "objective": None,
        "prompt": ("say", " it"), "shared_start": 0,
    }  # fmt: skip
    return Explanation(chosen=chosen, rejected=rejected, **defaults | more)


# ---- exact


def test_the_tokens_log_ratios_sum_to_the_reward_over_beta_and_to_what_score_says(
    run: SavedRun, explained: Explanation
) -> None:
    score = score_file(run.folder, run.folder / "held_out.jsonl").scores[0]
    weighing = explained.weighing
    assert weighing is not None
    for name, reward in (("chosen", weighing.chosen_reward), ("rejected", weighing.rejected_reward)):
        side: Answer = getattr(explained, name)
        assert math.fsum(token.logratio for token in side.tokens) == pytest.approx(reward / BETA, rel=1e-12)
        assert side.logratio == pytest.approx(side.policy - side.reference, rel=1e-12)
        assert len(side.tokens) == getattr(score, f"{name}_tokens")
        assert side.policy == pytest.approx(getattr(score, f"{name}_logps"), rel=1e-6)
        assert side.reference == pytest.approx(getattr(score, f"reference_{name}_logps"), rel=1e-6)
        assert reward == pytest.approx(getattr(score, f"{name}_reward"), abs=1e-6)
    assert weighing.margin == pytest.approx(score.margin, abs=1e-6)
    assert explained.logratio_difference == pytest.approx(weighing.margin / BETA, rel=1e-12)


def test_the_weights_are_the_objectives_and_dpos(explained: Explanation) -> None:
    weighing = explained.weighing
    assert weighing is not None
    assert weighing.log_odds is not None
    margin = torch.tensor([weighing.margin], dtype=torch.float64)
    focal, dpo = build_objective("focalpo", beta=BETA), build_objective("dpo", beta=BETA)
    assert weighing.p == pytest.approx(float(margin.sigmoid()), rel=1e-12)
    assert weighing.weight == pytest.approx(float(focal.weights(margin)), rel=1e-12)
    assert weighing.dpo_weight == pytest.approx(float(dpo.weights(margin)), rel=1e-12)
    assert weighing.ratio_to_dpo == pytest.approx(weighing.weight / weighing.dpo_weight)
    assert not weighing.turned


@pytest.mark.parametrize(
    ("objective", "parameters", "rewarded"),
    [
        ("simpo", {"beta": 2.0, "focal": {"form": "p_gamma", "gamma": 0.05}}, True),
        ("wpo", {"beta": 0.1}, True),
        ("sft", {}, False),
        ("orpo", {}, True),
    ],
)
def test_every_kind_of_objective_says_what_it_has(
    run: SavedRun, objective: str, parameters: dict[str, Any], rewarded: bool
) -> None:
    made = build_objective(objective, **parameters)
    chosen, rejected = answer(0.3, -0.1), answer(0.2, 0.5, -0.4)
    found = explain_file.weighing(made, run.pairs[0], chosen, rejected, torch.tensor([-1.0, -2.0]).double())
    assert found is not None
    assert math.isfinite(found.loss)
    assert (found.weight is not None) == made.entry.bradley_terry
    assert (found.margin is not None) == rewarded
    shown = made_up(chosen, rejected, weighing=found, objective=made.as_dict())
    assert objective in shown.text(colour=False)
    if objective == "simpo":
        assert "p_gamma 0.05" in shown.objective_text
        policy = [side.policy / len(side.tokens) for side in (chosen, rejected)]
        assert found.log_odds == pytest.approx(2 * (policy[0] - policy[1]) - 1.0)


def test_a_loss_of_the_whole_step_is_not_made_up_for_one_pair(run: SavedRun) -> None:
    kto = build_objective("kto", beta=0.1)
    found = explain_file.weighing(kto, run.pairs[0], answer(0.5), answer(0.2), torch.zeros(2))
    assert found == Weighing(None, pytest.approx(0.05), pytest.approx(0.02), None, None)
    assert "loss" not in made_up(answer(0.5), answer(0.2), weighing=found).text(colour=False)


@pytest.mark.parametrize("name", ["ld-dpo", "bmc"])
def test_a_loss_of_weighted_tokens_is_not_told_of_whole_answers(run: SavedRun, name: str) -> None:
    objective = build_objective(name, beta=0.1)
    assert explain_file.weighing(objective, run.pairs[0], answer(0.5), answer(0.2), torch.zeros(2)) == Weighing(
        None, None, None
    )
    [note] = explain_file._notes(objective)
    assert "takes weights of single tokens" in note


def test_parts_and_folded_tokens_add_up_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (answer(*torch.randn(n, generator=generator, dtype=torch.float64).tolist()) for n in (3, 530))
    shown = made_up(chosen, rejected, shared_start=2)
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        assert math.fsum(getattr(part, name) for part in parts(shown)) == pytest.approx(side.logratio, abs=1e-12)
        assert sum(getattr(part, f"{name}_tokens") for part in parts(shown)) == len(side.tokens)
        for most, block in ((40, 1), (100, 25), (10_000, 1), (2, 1)):
            pieces = folded(side, most=most, block=block)
            places = [piece for piece in pieces if isinstance(piece, int)]
            gaps = [piece for piece in pieces if isinstance(piece, Gap)]
            assert places == sorted(set(places))
            assert len(places) + sum(gap.tokens for gap in gaps) == len(side.tokens)
            total = [side.tokens[place].logratio for place in places] + [gap.logratio for gap in gaps]
            assert math.fsum(total) == pytest.approx(side.logratio, abs=1e-9)
            assert {0, len(side.tokens) - 1} <= set(places)
            assert len(places) <= max(2 * most, 2 * block)
            assert all(gap.tokens > 1 for gap in gaps)
    held = half_of_movement(rejected)
    moved = [abs(value) for value in rejected.logratios]
    assert sum(moved[place] for place in held) >= sum(moved) / 2 > sum(sorted(moved[p] for p in held)[1:])


def test_the_page_draws_the_sums(explained: Explanation) -> None:
    page = explained.html()
    signs = max(len(text) for text in re.findall(r'text-anchor="end">([^<]+)</text>', page) if "token" not in text)
    assert 6 * signs < EDGE  # of the labels at the left none is cut
    [chosen, rejected] = re.findall(r'<path class="[cr]" d="M([^"]+)"', page)
    assert [len(line.split(" L")) for line in (chosen, rejected)] == [
        1 + len(side.tokens) for side in (explained.chosen, explained.rejected)
    ]


# ---- found


def test_pairs_are_found_where_they_are(run: SavedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain_file, "_explanation", lambda subject, compared, objective, found: found)
    held_out: Any = explain(run.folder, run.pairs[3].id)
    assert (held_out.pair.id, held_out.place) == (run.pairs[3].id, "held-out pairs of run")
    trained: Any = explain(run.folder, "train-4")
    assert (trained.pair.id, trained.place, trained.notes) == ("train-4", "training pairs of run", ())
    write_held_out(tmp_path / "other.jsonl", [replace(run.pairs[5], id="mine")])
    given: Any = explain(run.adapter, "mine", pairs=tmp_path / "other.jsonl")
    assert (given.pair.chosen_ids, given.of_the_run) == (run.pairs[5].chosen_ids, False)
    with pytest.raises(InputError, match=r"no pair 'train-40' among 21 pairs; .* --pairs FILE; did you mean train-"):
        explain(run.folder, "train-40")
    write_held_out(tmp_path / "other.jsonl", [run.pairs[0], run.pairs[0]])
    with pytest.raises(InputError, match=r"2 pairs of other.jsonl are called"):
        explain(run.folder, run.pairs[0].id, pairs=tmp_path / "other.jsonl")


def test_data_that_changed_since_the_run_are_told(run: SavedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain_file, "_explanation", lambda subject, compared, objective, found: found)
    manifest = run.folder / "manifest.json"
    manifest.write_text(json.dumps({"data": {"train": {"tokens_sha256": "0" * 64}}}))
    try:
        found: Any = explain(run.folder, "train-4")
    finally:
        manifest.unlink()
    assert "have changed since" in found.notes[0]


def test_what_cannot_be_compared_or_found_is_refused_before_weights_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save_run(tmp_path, base_dtype=torch.float32, dtype="float32")
    monkeypatch.setattr(explain_file, "_explanation", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(InputError, match="its data cannot be read again"):
        explain(run.folder, "train-4")
    with pytest.raises(InputError, match="--reference"):
        explain(run.base, run.pairs[0].id, pairs=run.folder / "held_out.jsonl")
    lineage = run.adapter / "lorafocal.json"
    record = json.loads(lineage.read_text())
    for kind in ("cached", "separate_model", "frozen_copy"):
        lineage.write_text(json.dumps(record | {"reference": kind}))
        with pytest.raises(InputError, match=f"{kind}.*--reference ADAPTER_OR_MODEL"):
            explain(run.folder, run.pairs[0].id)
    lineage.write_text(json.dumps(record | {"reference": "cached"}))
    for named, told in (({"sha256": "0"}, "--reference ADAPTER_OR_MODEL"), (None, "weights were loaded")):
        (run.folder / "manifest.json").write_text(json.dumps({"reference_model": named}))
        with pytest.raises((InputError, pytest.fail.Exception), match=told):
            explain(run.folder, run.pairs[0].id)  # None: stored log-probs of its own base
    lineage.write_text(json.dumps(record | {"objective": {"name": "odpo", "beta": 0.1, "alpha": 1.0}}))
    with pytest.raises(InputError, match="has no score_chosen"):
        explain(run.folder, run.pairs[0].id, pairs=run.folder / "held_out.jsonl")
    with pytest.raises(InputError, match="missing"):
        explain(run.folder, run.pairs[0].id, out=tmp_path / "missing" / "page.html")


def test_another_model_can_be_what_it_is_compared_with(run: SavedRun, explained: Explanation, tmp_path: Path) -> None:
    write_evaluation(
        evaluation_file(run.folder, 3),
        [EvaluatedPair(explained.id, -1.0, -4.0, -2.0, -3.0), EvaluatedPair("other", 0.0, 0.0, 0.0, 0.0)],
    )
    found = explain(run.folder, explained.id, reference=str(run.base), out=tmp_path / "page.html")
    assert found.reference_name == "base"
    assert found.chosen.logratios == pytest.approx(explained.chosen.logratios, abs=1e-5)
    assert found.history == ((3, 2.0),)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page == found.html()
    assert "Over training" in page


# ---- shown


def test_without_colours_there_is_no_escape_and_each_token_is_a_row(explained: Explanation) -> None:
    text = explained.text(colour=False)
    assert "\x1b" not in text
    for side in (explained.chosen, explained.rejected):
        for token in side.tokens:
            assert f"{token.policy:.4f}" in text
            assert f"|{token.text}|" in text
    assert max(map(len, explained.text(colour=False, width=80).split("\n"))) <= 80
    assert "\u2026" not in explained.text(colour=False, width=40)  # a narrow terminal costs no digits and no token
    assert f"{explained.weighing.p:.4g}" in text


def test_with_colours_the_text_stays_the_text(explained: Explanation) -> None:
    coloured = explained.text(colour=True, width=200)
    assert "\x1b[" in coloured
    plain = ESCAPES.sub("", coloured)
    assert "".join(token.text for token in explained.chosen.tokens) in plain
    assert not any(character < " " and character != "\n" for character in plain)


def test_the_table_has_no_colours_where_nobody_looks(
    explained: Explanation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "\x1b" not in explained.table()
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in explained.table()


HOSTILE = [
    "\x1b[31m",
    "\r",
    "\x00",
    "\x9b2J",
    "\u202e",
    "a\nb",
    "<script>",
    "&amp;",
    "\ud83d",
    '"><img src=x>',
    "\ufeff",
]


@pytest.mark.row("S2")
@pytest.mark.parametrize("colour", [True, False])
def test_nothing_in_the_data_reaches_the_terminal_as_a_command(colour: bool) -> None:
    ends = [0.1] * len(HOSTILE)
    side = answer(*ends, texts=HOSTILE)
    shown = made_up(
        side, side, id="".join(HOSTILE), prompt=tuple(HOSTILE), place="".join(HOSTILE), notes=("".join(HOSTILE),)
    )
    text = ESCAPES.sub("", shown.text(colour=colour)) if colour else shown.text(colour=False)
    assert all(c == "\n" or c.isprintable() for c in text), {c for c in text if not c.isprintable()}
    assert "\\x1b[31m" in text
    text.encode("utf-8")


@pytest.mark.row("S2")
def test_the_page_holds_nothing_of_the_data_but_text() -> None:
    ends = [0.1] * len(HOSTILE)
    side = answer(*ends, texts=HOSTILE)
    page = made_up(
        side, side, id="".join(HOSTILE), prompt=tuple(HOSTILE), policy_name="<b>", notes=("".join(HOSTILE),)
    ).html()
    assert not any(map(Page(page).count, ("script", "img", "b")))
    assert all(c == "\n" or c.isprintable() for c in page)
    assert "http" not in page.replace("http-equiv", "")


def test_a_long_answer_is_folded_and_says_what_it_folds() -> None:
    generator = torch.Generator().manual_seed(0)
    side = answer(*torch.randn(1000, generator=generator).tolist())
    shown = made_up(side, side)
    assert len(shown.text(colour=False).split("\n")) < 250
    assert len(ESCAPES.sub("", shown.text(colour=True, width=100))) < 12_000
    assert re.search(r"\(\d+ tokens\)", shown.text(colour=False))
    assert shown.html().count("<span title") + shown.html().count("<span class") >= 2000


# ---- words


def sentences(chosen: Answer, rejected: Answer, **more: Any) -> str:
    return "\n".join(findings(made_up(chosen, rejected, **more)))


def weighed(log_odds: float, weight: float) -> Weighing:
    p = 1 / (1 + math.exp(-log_odds))
    return Weighing(0.7, log_odds, 0.0, log_odds, p, weight, dpo_weight=1 - p, turned=weight <= 0)


def short_of_its_target() -> Weighing:
    """SimPO's, where the chosen answer is rewarded more, by less than the target margin."""
    return Weighing(0.92, -0.2, -0.7, -0.5, 0.38, 0.62, dpo_weight=0.62)


@pytest.mark.parametrize(
    ("build", "told", "otherwise"),
    [
        (lambda: sentences(answer(0.0), answer(0.0)), "agree on every token", "less likely"),
        (lambda: sentences(answer(-3.0), answer(-5.0)), "became less likely, by 3 nats; the rejected one fell", "flip"),
        (lambda: sentences(answer(1.0), answer(2.0), weighing=weighed(-1.0, 0.7)), "Ranked wrong", "turned round"),
        (lambda: sentences(answer(2.0), answer(1.0), weighing=short_of_its_target()), "Ranked right by", "wrong"),
        (lambda: sentences(answer(1.0), answer(2.0), weighing=weighed(-30.0, -0.1)), "is turned round", "A step moves"),
        (lambda: sentences(answer(1.0), answer(2.0), weighing=weighed(-30.0, 0.0)), "the guard takes", "A step moves"),
        (lambda: sentences(answer(1.0), answer(0.2), weighing=weighed(0.0, 0.466)), "moves it by 0.932", "wrong"),
        (lambda: sentences(answer(-1.0, 0.0), answer(0.5, 0.5, 0.0)), "A flip: the chosen answer was", "Mended"),
        (lambda: sentences(answer(*[0.1] * 30), answer(*[0.4] * 5)), "Length decides", "flip"),
        (lambda: sentences(answer(*[0.01] * 30, 5.0), answer(0.1)), "Half of what moved in the chosen", "cut"),
        (lambda: sentences(answer(0.4), answer(0.1, ended=False)), "rejected answer does not", "chosen answer does"),
        (lambda: sentences(answer(0.4, 0.1), answer(0.4, 0.3), shared_start=1), "the same token, whose part", "cut"),
    ],
)  # fmt: skip
def test_sentences_come_with_their_cause_alone(build: Callable[[], str], told: str, otherwise: str) -> None:
    said = build()
    assert told in said
    assert otherwise not in said


def test_the_full_colour_is_not_one_outliers() -> None:
    assert full_colour(made_up(answer(*[0.1] * 99), answer(50.0))) == pytest.approx(0.1)
    assert full_colour(made_up(answer(0.0), answer(0.0))) > 0


# ---- tokens as texts


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and a space that belongs to the word after it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("text", ["plain words", "na\u00efve caf\u00e9", "\u6f22\u5b57 \U0001f600!", "a\ufffdb", ""])
def test_tokens_that_share_a_character_leave_it_to_the_last(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    before = tokenizer("prompt ")["input_ids"]
    texts = token_texts(tokenizer, ids, before=before)
    assert len(texts) == len(ids)
    assert "".join(texts) == text
    if text == "na\u00efve caf\u00e9":
        assert texts[2:4] == ("", "\u00ef")


def test_an_answer_cut_within_a_character_shows_that() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("ab\U0001f600")["input_ids"][:-2]
    assert token_texts(tokenizer, ids)[:3] == ("a", "b", "")
    assert "\ufffd" in token_texts(tokenizer, ids)[-1]


def test_a_weight_that_the_guard_took_away_is_zero_without_a_sign(run: SavedRun) -> None:
    made = build_objective("focalpo", beta=1.0, gamma=1.0, guard="clip")
    found = explain_file.weighing(made, run.pairs[0], answer(-3.0), answer(3.0), torch.zeros(2))
    assert str(found.weight) == "0.0"
