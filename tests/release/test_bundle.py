"""A release bundle: what is in it, what is not, and that its papers say what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorafocal.data.held_out import read_held_out, write_held_out
from lorafocal.data.tokens import TokenizedPair
from lorafocal.lineage import lineage_of
from lorafocal.publish import sha256
from lorafocal.release import verify
from lorafocal.release.export import ExportReport, export
from lorafocal.release.files import published_files
from tests.release.test_export import ADAPTER_FILES, names_of
from tests.release.test_merge import FILES as MERGED_FILES
from tests.saved_run import SavedRun, save_run
from tests.test_card import RUN

pytestmark = pytest.mark.slow  # whole models are written and loaded again


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    run = save_run(tmp_path_factory.mktemp("run"))
    (run.folder / "manifest.json").write_text(json.dumps(RUN))
    named = [TokenizedPair(f"{run.folder}/rows.jsonl, row {n}", *ids(pair)) for n, pair in enumerate(run.pairs)]
    write_held_out(run.folder / "held_out.jsonl", named)
    return run


@pytest.fixture(scope="module")
def report(run: SavedRun) -> ExportReport:
    return export(run.adapter, run.folder / "bundle", form="bundle")


def ids(pair: TokenizedPair) -> tuple[list[int], list[int], list[int]]:
    return list(pair.prompt_ids), list(pair.chosen_ids), list(pair.rejected_ids)


@pytest.mark.row("51", "52")
def test_the_files_are_the_named_ones_and_name_no_place(run: SavedRun, report: ExportReport) -> None:
    own = {"README.md", "gate.json", "manifest.json", "pairs.jsonl", "verify.py", "adapter", "merged"}
    inner = {f"adapter/{name}" for name in ADAPTER_FILES} | {f"merged/{name}" for name in MERGED_FILES}
    assert names_of(report.folder) == own | inner
    for path in report.folder.rglob("*"):
        if path.is_file():
            for private in (str(run.base.parent), str(Path.cwd()), str(Path.home()) + "/", "rows.jsonl"):
                assert private.encode() not in path.read_bytes(), path.name


def test_the_manifest_names_every_other_file(report: ExportReport) -> None:
    manifest = json.loads((report.folder / "manifest.json").read_text())
    files = {name for name in names_of(report.folder) if (report.folder / name).is_file()}
    assert manifest["files"].keys() == files - {"manifest.json"}
    for name, entry in manifest["files"].items():
        path = report.folder / name
        assert entry == {"size": path.stat().st_size, "sha256": sha256(path)}
    assert report.digest == sha256(report.folder / "manifest.json")
    assert report.digest in report.table()
    assert manifest["versions"].keys() == {"python", "torch", "transformers"}


def test_the_evidence_is_the_gate_s(run: SavedRun, report: ExportReport) -> None:
    assert report.merge is not None
    evidence = report.merge.evidence
    gate = json.loads((report.folder / "gate.json").read_text())
    assert gate["result"] == report.merge.gate.as_dict()
    for who in ("live", "reference", "merged"):
        logps = getattr(evidence, who)
        assert [pair[who] for pair in gate["logps"]] == [
            list(two) for two in zip(*(x.tolist() for x in logps), strict=True)
        ]
    pairs = read_held_out(report.folder / "pairs.jsonl")
    assert [ids(pair) for pair in pairs] == [ids(pair) for pair in run.pairs]
    assert [pair.id for pair in pairs] == [str(number) for number in range(1, 13)]
    assert "as token ids, which the tokenizer turns back into text: --push leaves it out" in report.table()


def test_the_papers_say_what_was_done(report: ExportReport) -> None:
    assert report.merge is not None
    card = (report.folder / "README.md").read_text()
    for expected in ("## Data", "## Recipe", "## Limits", "python verify.py", report.merge.gate_table()):
        assert expected in card
    assert lineage_of(report.folder / "adapter") is not None
    [*_, stage] = lineage_of(report.folder / "merged").parents  # type: ignore[union-attr]
    assert stage.sha256 == sha256(report.folder / "adapter" / "adapter_model.safetensors")
    assert (report.folder / "verify.py").read_text() == Path(verify.__file__).read_text()


@pytest.mark.row("S14")
def test_a_push_takes_all_of_it_but_the_pairs(report: ExportReport, capsys: pytest.CaptureFixture[str]) -> None:
    files, kept = published_files(report.folder)
    assert (kept, files.keys() | {"pairs.jsonl"}) == (["pairs.jsonl"], set(report.files))


def test_a_sum_of_adapters_is_bundled_and_verified(
    run: SavedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export([run.adapter, run.adapter], tmp_path / "out", weights=(1.5, -0.5), pairs=run.folder / "held_out.jsonl")
    assert verify.main([str(tmp_path / "out")]) == 0
    assert "## Data" not in (tmp_path / "out" / "README.md").read_text()  # of no single run
