"""The paper's tables: printed values as they were read, a user's beside them, and a mark where they do not compare."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lorafocal import recipes
from lorafocal.errors import InputError
from lorafocal.evaluate.result import Result, Score
from lorafocal.generation.presets import sampling_of
from lorafocal.report import paper_page
from lorafocal.report.comparable import Standard, family_of, reasons, standard_of
from lorafocal.report.paper import NOT_MEASURED, NOT_READ, Row, Table, all_cells, letter, paper_data, paper_tables
from lorafocal.report.paper_page import csv_text, head, markdown, page, records, write_paper
from lorafocal.report.paper_plot import table_png
from lorafocal.report.plots import LIGHT
from tests import browser

PNG = b"\x89PNG\r\n\x1a\n"
LLAMA = "meta-llama/Meta-Llama-3-8B-Instruct"
FORGED = "=1|<script>alert(1)</script>\n# $x$ <b>"
SIX = ("hellaswag", "arc_challenge", "truthfulqa_mc2", "winogrande", "gsm8k", "mmlu")

DRAWN = sampling_of("llama3-alpaca").as_dict()

# Made as the paper's numbers are: nothing to mark.
ALPACA = Result(
    "alpaca_eval_2",
    "mine",
    {"win_rate": Score(45.2, 41.8, 48.6, 1.7), "length_controlled_win_rate": Score(50.125)},
    judge="gpt-4-1106-preview",
    sampling=DRAWN,
    target={"name": "mine", "base": {"name": LLAMA}, "adapter_sha256": "a"},
    counts={"judged": 805},
    settings={"reference": "gpt4_1106_preview", "annotator": "weighted_alpaca_eval_gpt4_turbo"},
    versions={"alpaca-eval": "0.6.2"},
)
ARENA = replace(
    ALPACA,
    benchmark="arena_hard_v0.1",
    scores={"win_rate": Score(33.0)},
    sampling=sampling_of("arena-hard").as_dict(),
    counts={"questions": 500},
    settings={"baseline": "gpt-4-0314", "judge_prompt": "judge_config.yaml"},
)
BOARD = replace(
    ALPACA,
    benchmark="open_llm_leaderboard_1",
    judge=None,
    sampling=None,
    scores={name: Score(60.0 + number) for number, name in enumerate(SIX)},
    settings={"limit": None, "chat_template": False},
)


@pytest.fixture(scope="module")
def standard() -> Standard:
    return standard_of(paper_data())


def own_rows(table: Table) -> list[Row]:
    return [row for row in table.rows if row.whose == "yours"]


def texts(row: Row) -> list[str]:
    return [cell.text for cell in all_cells(row)]


# --- the paper's own numbers ----------------------------------------------------------------------------------


def printed(number: int, family: int) -> dict[str, list[str]]:
    rows = paper_tables([]).tables[number - 1].blocks[family][1]
    return {row.name: texts(row) for row in rows if row.whose == "paper"}


def test_the_values_are_those_that_were_read() -> None:
    mistral, llama = printed(1, 0), printed(1, 1)
    assert mistral["FocalPO"] == ["20.4", "23.9", "17.1"]
    assert mistral["DPO"] == ["18.6", "20.6", "16.4"]
    assert mistral["SimPO"] == ["21.4", "17.0", NOT_READ]
    assert llama["FocalPO"] == ["49.8", "54.7", "34.6"]
    assert llama["DPO"] == ["47.5", "48.2", "33.1"]
    assert [*mistral] == [*llama] == ["ORPO", "KTO", "DPO", "SimPO", "FocalPO"]
    means = {
        name: cells[-2:]
        for name, cells in (printed(2, 0) | {f"llama {n}": c for n, c in printed(2, 1).items()}).items()
    }
    assert means["FocalPO"] == ["59.1", "62.7 (+3.65)"]
    assert means["llama FocalPO"] == ["65.8", "69.9 (+4.10)"]
    assert means["llama SFT"] == ["64.3", f"{NOT_READ} (+3.97)"]


def test_what_could_not_be_read_is_no_number() -> None:
    unread = [
        cell for table in paper_tables([]).tables for row in table.rows for cell in row.cells if cell.score is None
    ]
    assert unread
    assert {cell.text for cell in unread} == {NOT_READ}


def test_a_printed_average_that_was_read_is_its_mean_and_the_difference() -> None:
    for rows in paper_data()["tables"]["table_2"]["rows"].values():
        for row in rows.values():
            assert 3.5 < row["excess"] < 4.3
            if "printed" in row:
                assert row["printed"] == pytest.approx(row["mean"] + row["excess"], abs=0.1)


def test_every_row_says_where_it_is_from_and_agrees_with_the_released_models() -> None:
    rows = [row for table in paper_tables([]).tables for row in table.rows]
    assert {row.source for row in rows} == {"paper, Table 1", "paper, Table 2", "SimPO's README"}
    published = {
        (family, name) for family, lines in paper_data()["tables"]["table_1"]["published"].items() for name in lines
    }
    of_others = {(each.family, each.row) for each in recipes.released() if each.row != "FocalPO"}
    assert published >= of_others


# --- a user's beside them -------------------------------------------------------------------------------------


def test_numbers_made_as_the_papers_stand_in_its_columns_without_a_mark() -> None:
    tables = paper_tables([ALPACA, ARENA, BOARD])
    first, second = (own_rows(table) for table in tables.tables)
    assert [texts(row) for row in first] == [["45.20 [41.80, 48.60]", "50.12", "33.00"]]
    assert [texts(row) for row in second] == [["60.00", "61.00", "62.00", "63.00", "64.00", "65.00", "62.50"]]
    assert tables.legend == tables.notes == tables.others == ()
    assert [title for title, rows in tables.tables[0].blocks if own_rows(tables.tables[0])[0] in rows] == [
        "Llama-3-Instruct (8B)"
    ]


CHANGES: list[tuple[str, Result, Mapping[str, Any]]] = [
    ("the judge is gpt-4.1", ALPACA, {"judge": "gpt-4.1"}),
    ("the judge is not known", ALPACA, {"judge": None}),
    ("alpaca-eval 0.6.6", ALPACA, {"versions": {"alpaca-eval": "0.6.6"}}),
    ("alpaca-eval of no stated version", ALPACA, {"versions": {}}),
    ("judged: 803", ALPACA, {"counts": {"judged": 803}}),
    ("reference is gpt4", ALPACA, {"settings": {**ALPACA.settings, "reference": "gpt4"}}),
    ("annotator is ours", ALPACA, {"settings": {**ALPACA.settings, "annotator": "ours"}}),
    ("sampled is not known", ALPACA, {"sampling": None}),
    ("temperature 0.0, not 0.9", ALPACA, {"sampling": {**DRAWN, "temperature": 0.0}}),
    ("top_p 0.5, not 1.0", ALPACA, {"sampling": {**DRAWN, "top_p": 0.5}}),
    ("max_new_tokens not stated", ALPACA, {"sampling": {k: v for k, v in DRAWN.items() if k != "max_new_tokens"}}),
    ("another base: some/other", ALPACA, {"target": {"name": "m", "base": {"name": "some/other"}}}),
    ("trained from is not known", ALPACA, {"target": None}),
    ("a folder called Meta-Llama-3-8B-Instruct", ALPACA, {"target": {"base": {"name": "Meta-Llama-3-8B-Instruct"}}}),
    ("baseline is none", ARENA, {"settings": {}}),
    ("judge_prompt is lorafocal's own", ARENA, {"settings": {**ARENA.settings, "judge_prompt": "lorafocal's own"}}),
    ("questions: 499", ARENA, {"counts": {"questions": 499}}),
    ("temperature 0.9, not 0.0", ARENA, {"sampling": {**(ARENA.sampling or {}), "temperature": 0.9}}),
    ("limit is 5", BOARD, {"settings": {**BOARD.settings, "limit": 5}}),
    ("chat_template is True", BOARD, {"settings": {**BOARD.settings, "chat_template": True}}),
]  # fmt: skip


@pytest.mark.row("58")
@pytest.mark.parametrize(("said", "made_as_the_papers", "change"), CHANGES, ids=[said for said, _, _ in CHANGES])
def test_each_thing_made_otherwise_is_marked_by_itself(
    said: str, made_as_the_papers: Result, change: Mapping[str, Any], standard: Standard
) -> None:
    assert reasons(made_as_the_papers, "llama3-8b", standard) == ()
    (found,) = reasons(replace(made_as_the_papers, **change), "llama3-8b", standard)
    assert said in found


@pytest.mark.row("58")
def test_a_number_of_another_judge_never_stands_there_unmarked() -> None:
    tables = paper_tables([replace(ALPACA, judge="gpt-4.1"), ARENA])
    (row,) = own_rows(tables.tables[0])
    assert [cell.reasons for cell in row.cells] == [tables.legend, tables.legend, ()]
    assert "45.20 [41.80, 48.60] (a) | 50.12 (a) | 33.00 |" in markdown(tables)
    assert "- a: the judge is gpt-4.1; the paper's is gpt-4-1106-preview" in markdown(tables)


def test_the_family_is_that_of_the_base_or_of_the_released_checkpoint(standard: Standard) -> None:
    def family(**target: Any) -> str | None:
        return family_of([replace(ALPACA, target=target)], standard)

    assert family(base={"name": LLAMA}) == "llama3-8b"
    assert family(model={"name": "HuggingFaceH4/mistral-7b-sft-beta"}) == "mistral-7b"
    assert family(model={"name": "tongliuphysics/Mistral-7B-Base-SFT-FocalPO"}) == "mistral-7b"
    assert family(base={"name": "mistral-7b-sft-beta"}) == "mistral-7b"
    assert family(base={"name": "some/Meta-Llama-3-8B-Instruct"}) is None
    released = "princeton-nlp/Mistral-7B-Base-SFT-SimPO"  # of another base than the paper's, and the paper's own row
    row = replace(
        ALPACA, target={"model": {"name": released}, "base": {"name": "alignment-handbook/zephyr-7b-sft-full"}}
    )
    assert family_of([row], standard) == "mistral-7b"
    assert not any("another base" in reason for reason in reasons(row, "mistral-7b", standard))


@pytest.mark.row("58")
def test_an_average_is_of_all_six_or_is_not() -> None:
    some = replace(BOARD, scores={name: score for name, score in BOARD.scores.items() if name != "mmlu"})
    (row,) = own_rows(paper_tables([some]).tables[1])
    assert row.mean is not None
    assert (row.mean.score, row.mean.text) == (None, NOT_MEASURED)
    assert row.mean.reasons == ("5 of the 6 columns are there: no average",)
    with_average = replace(some, scores={**some.scores, "average": Score(99.0)})  # of whatever that may be
    assert own_rows(paper_tables([with_average]).tables[1])[0].mean == row.mean


@pytest.mark.row("58")
def test_a_row_is_one_model_judged_once() -> None:
    again = replace(ALPACA, judge="gpt-4.1")
    assert len(own_rows(paper_tables([ALPACA, ARENA, again]).tables[0])) == 2
    other_weights = replace(ARENA, target={"name": "mine", "base": {"name": LLAMA}, "adapter_sha256": "b"})
    first, second = own_rows(paper_tables([ALPACA, other_weights]).tables[0])
    assert texts(first)[2] == texts(second)[0] == NOT_MEASURED
    unknown = replace(ARENA, target=None)
    (row,) = own_rows(paper_tables([ALPACA, unknown]).tables[0])
    assert row.cells[2].reasons == ("what the model was trained from is not known",)


def test_what_has_no_column_is_listed_and_notes_are_kept() -> None:
    rule = Result("rule", "mine", {"right": Score(70.0, 68.0, 72.0)}, notes=("a trial",))
    tables = paper_tables([rule, replace(ALPACA, notes=("3 verdicts are missing",))])
    assert tables.others == (rule,)
    text = markdown(tables)
    assert "- mine, rule: right 70.00 [68.00, 72.00]" in text
    assert "- mine, alpaca_eval_2: 3 verdicts are missing" in text
    assert "- mine, rule: a trial" in text


def test_letters_go_on_after_z() -> None:
    assert [letter(n) for n in (0, 25, 26, 51, 52, 701, 702)] == ["a", "z", "aa", "az", "ba", "zz", "aaa"]


# --- as files -------------------------------------------------------------------------------------------------


class Cells(HTMLParser):
    """The cells of each table row, and every other element's name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def test_every_form_has_every_cell_and_what_a_result_says_is_text() -> None:
    results = [replace(ALPACA, model=FORGED, judge=FORGED, notes=(FORGED,)), BOARD]
    tables = paper_tables(results)
    text = markdown(tables)
    assert "<script" not in text
    for line in text.splitlines():
        if line.startswith("|"):
            cells = len(re.findall(r"(?<!\\)\|", line)) - 1
            assert cells in {len(head(table)) for table in tables.tables}
    parsed = Cells(page(tables, [(PNG, PNG), (PNG, PNG)]))
    assert "script" not in parsed.names
    assert {len(row) for row in parsed.rows} == {len(head(table)) for table in tables.tables}
    assert any(row[0] == FORGED for row in parsed.rows)
    read = list(csv.DictReader(csv_text(tables).splitlines(keepends=True)))
    assert len(read) == sum(len(list(all_cells(row))) for table in tables.tables for row in table.rows)
    assert [
        {**row, **{key: None if value is None else str(value) for key, value in row.items()}} for row in records(tables)
    ] == [
        {
            key: value or (None if key in ("value", "low", "high", "standard_error") else value)
            for key, value in row.items()
        }
        for row in read
    ]


@pytest.mark.slow
def test_pictures_are_drawn_with_any_name() -> None:
    tables = paper_tables([replace(ALPACA, model="$\\frac{ _x", judge="another")])
    for table in tables.tables:
        assert table_png(table, tables.legend, LIGHT).startswith(PNG)


@pytest.mark.slow
@pytest.mark.chromium
def test_the_page_opens_in_a_browser_with_its_pictures(tmp_path: Path) -> None:
    table = paper_tables([]).tables[1]
    drawn = table_png(table, (), LIGHT)
    (tmp_path / "paper.html").write_text(page(paper_tables([ALPACA, BOARD]), [(drawn, drawn)] * 2), encoding="utf-8")
    script = """
    const { document } = await open("paper.html");
    const pictures = [...document.images].map((each) => each.naturalWidth > 500);
    return [pictures, document.querySelectorAll("table").length, document.title];
    """
    assert browser.ask(tmp_path, script) == ([[True, True], 4, "Beside the paper"], [])


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper_page, "table_png", lambda *_: PNG)


@pytest.mark.usefixtures("undrawn")
def test_the_files_are_there_twice_alike_and_name_no_place(tmp_path: Path) -> None:
    ALPACA.write(tmp_path / "alpaca.json")
    written = []
    for _ in range(2):
        report = write_paper([tmp_path / "alpaca.json"], tmp_path / "paper")
        written.append({path.name: path.read_bytes() for path in report.files})
    assert written[0] == written[1]
    assert sorted(written[0]) == ["paper.csv", "paper.html", "paper.md", "table-1.png", "table-2.png"]
    assert not any(str(tmp_path).encode() in content for content in written[0].values())
    assert "| mine | yours | 45.20" in report.table()
    assert json.loads(json.dumps(report.as_dict()))["cells"][0]["table"] == 1


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("kept", ["annotations", "tasks"])
def test_what_is_kept_beside_a_result_is_passed_over_and_by_itself_refused(tmp_path: Path, kept: str) -> None:
    ALPACA.write(tmp_path / "alpaca.json")
    (tmp_path / f"alpaca.{kept}.json").write_text("[]")
    both = write_paper(sorted(tmp_path.glob("*.json")), tmp_path / "paper")
    assert both.as_dict()["cells"] == write_paper([tmp_path / "alpaca.json"], tmp_path / "paper").as_dict()["cells"]
    with pytest.raises(InputError, match=rf"alpaca\.{kept}\.json is not a result"):
        write_paper([tmp_path / f"alpaca.{kept}.json"], tmp_path / "paper")


@pytest.mark.usefixtures("undrawn")
def test_nothing_is_written_over_or_half(tmp_path: Path) -> None:
    foreign = tmp_path / "paper"
    foreign.mkdir()
    (foreign / "thesis.md").write_text("mine")
    ALPACA.write(tmp_path / "alpaca.json")
    with pytest.raises(InputError, match=r"alpaca\.json is a file; choose another folder"):
        write_paper([tmp_path / "alpaca.json"], tmp_path / "alpaca.json")
    with pytest.raises(InputError, match=r"thesis\.md.*choose another --out"):
        write_paper([tmp_path / "alpaca.json"], foreign)
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(InputError, match=r"bad\.json"):
        write_paper([tmp_path / "alpaca.json", tmp_path / "bad.json"], tmp_path / "new")
    assert [path.name for path in foreign.iterdir()] == ["thesis.md"]
    assert not (tmp_path / "new").exists()
