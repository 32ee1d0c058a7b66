"""Completions of several turns, token by token: what is scored is told, what is read in between stands beside it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorafocal.data.held_out import write_held_out
from lorafocal.data.tokens import TokenizedPair
from lorafocal.data.turns import CONTEXT, scored
from lorafocal.evaluate.score import score_file
from lorafocal.model.load import load_tokenizer
from lorafocal.report.explain import _shared_start, explain
from lorafocal.report.explain_text import UNSCORED, coloured, rows
from lorafocal.report.explanation import Answer, Explanation, Gap, Token, folded
from tests.saved_run import SavedRun, save_run

CHOSEN = ([5, 6, 7, 8, 9, 10, 11], [0, 0, CONTEXT, CONTEXT, 1, CONTEXT, 2])
REJECTED = ([5, 6, 7, 8, 12, 13], [0, 0, CONTEXT, CONTEXT, 1, 1])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    return save_run(tmp_path_factory.mktemp("turns"), base_dtype=torch.float32, dtype="float32")


@pytest.fixture(scope="module")
def pair(run: SavedRun) -> TokenizedPair:
    (chosen, chosen_turns), (rejected, rejected_turns) = CHOSEN, REJECTED
    return replace(
        run.pairs[0],
        id="turns",
        chosen_ids=chosen,
        chosen_turns=chosen_turns,
        rejected_ids=rejected,
        rejected_turns=rejected_turns,
    )


@pytest.fixture(scope="module")
def file(pair: TokenizedPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "turns.jsonl"
    write_held_out(path, [pair])
    return path


@pytest.fixture(scope="module")
def explained(run: SavedRun, file: Path) -> Explanation:
    return explain(run.folder, "turns", pairs=file)


def test_the_scored_tokens_sum_to_what_score_says_and_no_other_is_told(
    run: SavedRun, pair: TokenizedPair, file: Path, explained: Explanation
) -> None:
    score = score_file(run.folder, file).scores[0]
    for side in ("chosen", "rejected"):
        answer: Answer = getattr(explained, side)
        assert len(answer.tokens) == len(scored(getattr(pair, f"{side}_ids"), getattr(pair, f"{side}_turns")))
        assert answer.policy == pytest.approx(getattr(score, f"{side}_logps"), rel=1e-6)
        assert answer.reference == pytest.approx(getattr(score, f"reference_{side}_logps"), rel=1e-6)


def test_with_what_is_read_the_tokens_are_the_whole_text(
    run: SavedRun, pair: TokenizedPair, explained: Explanation
) -> None:
    tokenizer = load_tokenizer(str(run.base))
    prompt = tokenizer.decode(pair.prompt_ids)
    for ids, answer in ((pair.chosen_ids, explained.chosen), (pair.rejected_ids, explained.rejected)):
        told = "".join(token.context + token.text for token in answer.tokens)
        assert prompt + told == tokenizer.decode([*pair.prompt_ids, *ids])
    assert explained.chosen.turns == [0, 2, 3]
    assert explained.rejected.turns == [0, 2]


def test_the_shared_start_counts_scored_tokens() -> None:
    assert _shared_start(CHOSEN, REJECTED) == 2
    assert _shared_start(CHOSEN, CHOSEN) == 4
    assert _shared_start(([5, 6, 7], None), ([5, 6, 8], [0, 0, 0])) == 2
    assert _shared_start(([5, 6, 7], None), ([5, 6, 7], [0, CONTEXT, 1])) == 1  # the same token, and not scored there


def test_pages_and_terminals_show_what_is_read_as_such(explained: Explanation) -> None:
    read = explained.chosen.tokens[2].context
    assert read
    page = explained.html()
    assert f'<span class="read">{read}</span>' in page
    assert "is read, and not scored" in page
    text = explained.text(colour=False)
    assert f"(not scored) {read}" in text
    assert next(line for line in text.split("\n") if line.startswith("tokens ")).split() == ["tokens", "4", "4", "0"]
    one = replace(explained, chosen=Answer(explained.chosen.tokens[:2]), rejected=Answer(explained.rejected.tokens[:2]))
    assert "not scored)" not in one.text(colour=False).replace("prompt (not scored)", "")
    assert "is read, and not scored" not in one.html()


@pytest.mark.row("S2")
def test_nothing_that_is_read_reaches_a_terminal_or_a_page_as_a_command(explained: Explanation) -> None:
    tokens = (Token("a", -1.0, -2.0), Token("b", -1.0, -2.0, "\x1b[2J<script>" + "long " * UNSCORED))
    forged = replace(explained, chosen=Answer(tokens))
    for colour in (True, False):
        text = forged.text(colour=colour)
        assert "\x1b[2J" not in text
        assert "\\x1b[2J<script>" in text.replace("\n", "")
        assert "[...]" in text
    assert "<script>" not in forged.html()


def test_a_turn_that_is_folded_away_still_shows_where_it_begins() -> None:
    tokens = [Token(f"t{n} ", -1.0 + n / 1000, -1.0) for n in range(900)]
    tokens[400] = replace(tokens[400], context="and then?")
    answer = Answer(tuple(tokens))
    for most, block in ((40, 1), (600, 25)):
        pieces = folded(answer, most=most, block=block)
        assert 400 in pieces
        hidden = math.fsum(piece.logratio for piece in pieces if isinstance(piece, Gap))
        shown = math.fsum(tokens[piece].logratio for piece in pieces if not isinstance(piece, Gap))
        assert hidden + shown == pytest.approx(answer.logratio, abs=1e-12)
    assert "and then?t400" in coloured(answer, 1.0).plain
    assert rows(answer, 1.0).row_count > 40
