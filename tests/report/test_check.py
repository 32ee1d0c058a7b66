"""What `lorafocal check` finds: counts, quantiles, savings and biases against arithmetic by hand, and its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafocal.config import check_config
from lorafocal.data.packing import PairCollator
from lorafocal.data.tokens import TokenizedPair
from lorafocal.errors import InputError
from lorafocal.report.check import CheckReport, check_data, length_bias, part_notes, quantiles, savings, shortened
from lorafocal.report.check_page import check_page
from tests.parsed_page import Page
from tests.saved_run import save_base
from tests.test_fuzz import values
from tests.tiny import pairs


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("check")
    save_base(root / "base", dtype=torch.float32)
    return root


def check_rows(root: Path, rows: list[dict[str, Any]], **data: Any) -> CheckReport:
    path = root / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return check_data(check_config(values(root, path, **data)))


def plain(number: int, chosen: str = "1 2 3", rejected: str = "3", **more: Any) -> dict[str, Any]:
    return {"prompt": f"sort {number}", "chosen": f" {chosen}", "rejected": f" {rejected}", **more}


def test_savings_are_the_rows_that_the_collators_really_make() -> None:
    made = pairs(40, longest=30)
    found = savings(made, 16, 64)
    steps = [made[start : start + 16] for start in (0, 16, 32)]
    packs = [pack for step in steps for pack in PairCollator("packed", 64)(step).packs]
    assert (found.steps, found.packs) == (3, len(packs))
    assert found.packed == sum(pack.num_rows for pack in packs)
    padded = [PairCollator("padded", 10**9)(made[start : start + 8]).packs for start in range(0, 40, 8)]
    assert found.padded == sum(pack.num_rows for batch in padded for pack in batch)
    assert found.sharing == 1 - found.packed / (found.packed + sum(len(pair.prompt_ids) for pair in made))
    assert 0 < found.sharing < found.total < 1


@pytest.mark.parametrize("tokens", ["auto", 64])
def test_packs_are_counted_whether_or_not_their_size_is_stated(tokens: int | str, base: Path) -> None:
    path = base / "rows.jsonl"
    path.write_text("".join(json.dumps(plain(number)) + "\n" for number in range(8)))
    config = check_config(values(base, path) | {"packing": {"tokens": tokens}})
    [part] = check_data(config).parts
    assert part.savings.steps == 2
    assert part.savings.packs >= 2


def test_quantiles_by_hand() -> None:
    found = quantiles(range(1, 102))
    assert found == {"mean": 51.0, "0%": 1.0, "5%": 6.0, "50%": 51.0, "95%": 96.0, "99%": 100.0, "100%": 101.0}


def test_length_bias_by_hand() -> None:
    def pair(chosen: int, rejected: int) -> TokenizedPair:
        return TokenizedPair("p", [0], [1] * chosen, [2] * rejected)

    bias = length_bias([pair(3, 1), pair(2, 2), pair(1, 2), pair(5, 1)])
    assert (bias.chosen_longer, bias.equal, bias.mean_difference, bias.longer_wins) == (0.5, 0.25, 1.25, 0.625)


@pytest.mark.row("29", "30")
def test_counts_add_up_and_reasons_carry_their_first_places(base: Path) -> None:
    rows = [plain(n) for n in range(6)]
    rows += [{"prompt": "x"}, plain(0), plain(1, "3", "1 2 3"), plain(7, "1 " * 90), plain(8, "2", "2"), plain(9)]
    report = check_rows(base, rows)
    [part] = report.parts
    reasons = {drop.reason: (drop.count, drop.examples) for drop in part.drops}
    assert (part.pairs, part.left_out) == (6, len(rows) - 6)
    assert reasons["contradiction"] == (2, ("rows.jsonl, row 2", "rows.jsonl, row 9"))
    assert reasons["duplicate"] == (1, ("rows.jsonl, row 8",))
    assert reasons["overlong"] == (1, ("rows.jsonl, row 10",))
    assert set(reasons) == {"missing_key", "duplicate", "contradiction", "overlong", "identical_completions"}
    assert all(drop.remedy for drop in part.drops)


def test_notes_appear_with_their_cause_and_not_without(base: Path) -> None:
    def notes(rows: list[dict[str, Any]]) -> str:
        return "\n".join(part_notes(check_rows(base, rows).parts[0]))

    both = [plain(n, *("1 2 3", "3")[:: 1 if n % 2 else -1]) for n in range(40)]
    assert notes(both) == ""
    assert 'the rule "the longer answer is better" ranks 100%' in notes([plain(n) for n in range(40)])
    assert 'the rule "the shorter answer is better"' in notes([plain(n, "3", "1 2 3") for n in range(40)])
    swapped = both[:30] + [row | {"score_chosen": 1, "score_rejected": 2} for row in both[30:34]]
    assert "4 pairs score the chosen answer below" in notes(swapped)
    tied = both[:30] + [row | {"score_chosen": 2, "score_rejected": 2} for row in both[30:33]]
    assert "3 pairs score both answers alike" in notes(tied)
    few = [plain(n) for n in range(3)]
    assert notes(few) == ""  # three pairs say nothing


def test_few_held_out_pairs_are_called_few(base: Path) -> None:
    rows = [plain(n, *("1 2 3", "3")[:: 1 if n % 2 else -1]) for n in range(240)]
    assert "16 held-out pairs tell an accuracy to 25 points" in "\n".join(check_rows(base, rows, held_out=16).notes)
    assert not any("held-out" in note for note in check_rows(base, rows, held_out=110).notes)


@pytest.mark.row("28")
def test_cut_pairs_are_told(base: Path) -> None:
    rows = [plain(n, "1 2 3" * (1 + 40 * (n == 0))) for n in range(4)]
    report = check_rows(base, rows, truncation="keep_start")
    assert report.parts[0].cut == 1
    assert "1 pairs were cut" in "\n".join(report.notes)


def test_the_shown_pair_is_the_tokens_as_text(base: Path) -> None:
    report = check_rows(base, [plain(n) for n in range(4)])
    assert report.pair.chosen == ("1", "2", "3", "<|end|>")
    assert "⟦123<|end|>⟧" in report.table()


def test_json_holds_everything(base: Path) -> None:
    report = check_rows(base, [plain(n) for n in range(4)], held_out=1)
    read = json.loads(json.dumps(report.as_dict()))
    assert [part["name"] for part in read["parts"]] == ["train", "eval"]
    assert read["parts"][0]["savings"]["steps"] == 1


def test_the_page_is_whole_and_what_rows_say_is_text(base: Path, tmp_path: Path) -> None:
    report = check_rows(base, [plain(n, id=f"<script>{n}") for n in range(4)])
    text = check_page(report)
    assert not Page(text).count("script")
    assert "&lt;script&gt;" in text


def test_what_rows_hold_does_not_reach_the_terminal_raw() -> None:
    assert shortened("a\n\x1b[2J\rb é") == "a⏎\\x1b[2J\\rb é"


def test_plain_text_beside_a_chat_template_is_told(base: Path) -> None:
    rows = [plain(1), plain(2)]
    [note] = [note for note in check_rows(base, rows).notes if "plain text" in note]
    assert note.startswith("2 pairs")
    assert not any("plain text" in note for note in check_rows(base, rows, form="single_turn").notes)


def test_a_source_that_cannot_be_read_is_said_before_a_tokenizer_is_loaded(base: Path) -> None:
    config = check_config(values(base, base / "rows.jsonl", train="owner/name", eval="owner/name"))
    elsewhere = config.model.model_copy(update={"name": "no/model"})
    with pytest.raises(InputError, match="owner/name: rows of the hub need revision"):
        check_data(config.model_copy(update={"model": elsewhere}))
