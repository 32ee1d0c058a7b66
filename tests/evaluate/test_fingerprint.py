"""The fingerprint: what it is of the margins, what it is blind to, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafocal.data.held_out import write_held_out
from lorafocal.data.toy import toy_preferences
from lorafocal.errors import InputError
from lorafocal.evaluate.fingerprint import evaluate_fingerprint
from lorafocal.evaluate.result import Result, read_result
from lorafocal.evaluate.score import score_file
from lorafocal.recipes import Mark, Released
from lorafocal.release.merge import merge_adapter
from tests.saved_run import SavedRun, other_tokenizer, save_run

pytestmark = pytest.mark.slow


def quiet(text: str) -> None:
    """Where progress goes."""


def fingerprint(run: SavedRun, released: Path, **more: object) -> Result:
    return evaluate_fingerprint(
        run.folder, released=str(released), pairs=run.folder / "held_out.jsonl", say=quiet, **more
    )


def changed_adapter(run: SavedRun, folder: Path, factor: float, noise: float = 0.0) -> Path:
    """The adapter with its B scaled, and noise added; on the same base."""
    shutil.copytree(run.folder, folder)
    file = folder / "adapter" / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: tensor * factor + noise * tensor.std() * torch.randn(tensor.shape, generator=generator)
        if "lora_B" in name
        else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    return save_run(tmp_path_factory.mktemp("fingerprint"), base_dtype=torch.float32, dtype="float32")


@pytest.fixture(scope="module")
def merged(run: SavedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("released") / "merged"
    merge_adapter(run.adapter, out, dtype="float32")
    return out


def test_a_run_and_its_merged_model_are_one_and_the_numbers_are_those_of_score(run: SavedRun, merged: Path) -> None:
    result = fingerprint(run, merged, released_reference=str(run.base))
    assert result.scores["pearson"].value == pytest.approx(1, abs=1e-6)
    assert result.scores["spread_ratio"].value == pytest.approx(1, abs=1e-3)
    assert result.scores["same_sign"].value == 100
    margins = score_file(run.folder, run.folder / "held_out.jsonl", beta=1.0).margins
    assert [item["margin"] for item in result.items] == pytest.approx(margins, abs=1e-6)
    assert result.scores["accuracy"].value == pytest.approx(100 * sum(m > 0 for m in margins) / len(margins))
    assert result.counts == {"pairs": len(run.pairs), "left_out": 0}
    assert result.settings["released"]["kind"] == "model"


def test_beta_cancels_and_another_direction_shows(run: SavedRun, tmp_path: Path) -> None:
    """Less of the same is the same to a correlation, and the ratio of spreads tells; noise lowers it."""
    less = fingerprint(run, changed_adapter(run, tmp_path / "less", 0.8))
    noisy = fingerprint(run, changed_adapter(run, tmp_path / "noisy", 1, noise=3))
    assert less.scores["pearson"].value > 0.95 > noisy.scores["pearson"].value + 0.1
    assert less.scores["spread_ratio"].low > 1.05
    assert noisy.scores["pearson"].low < noisy.scores["pearson"].value < noisy.scores["pearson"].high


def test_swapping_chosen_and_rejected_of_a_pair_changes_no_agreement(
    run: SavedRun, merged: Path, tmp_path: Path
) -> None:
    """Both margins change their sign: an agreement by pair is not one of who prefers the chosen."""
    swapped = [pair.__class__(pair.id, pair.prompt_ids, pair.rejected_ids, pair.chosen_ids) for pair in run.pairs]
    write_held_out(tmp_path / "held_out.jsonl", swapped)
    plain = fingerprint(run, merged, released_reference=str(run.base))
    other = evaluate_fingerprint(
        run.folder,
        released=str(merged),
        released_reference=str(run.base),
        pairs=tmp_path / "held_out.jsonl",
        say=quiet,
    )
    assert other.scores["same_sign"].value == plain.scores["same_sign"].value
    assert [item["margin"] for item in other.items] == pytest.approx([-i["margin"] for i in plain.items], abs=1e-5)


def test_rows_of_text_are_read_once_for_both(run: SavedRun, merged: Path, tmp_path: Path) -> None:
    """The released model would tokenise them by its own template, which is another here: both read the run's tokens."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in toy_preferences(12, seed=3, held_out=True)))
    stranger = shutil.copytree(merged, tmp_path / "stranger")
    (stranger / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    arguments = {"pairs": rows, "released_reference": str(run.base), "say": quiet}
    result = evaluate_fingerprint(run.folder, released=str(stranger), **arguments)
    assert result.scores["pearson"].value == pytest.approx(1, abs=1e-6)
    assert any("another chat template" in note for note in result.notes)


def test_a_released_checkpoint_of_the_paper_knows_its_reference(
    run: SavedRun, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Released("FocalPO", "llama3-8b", str(merged), str(run.base), Mark("paper", "Table 1"))
    monkeypatch.setattr("lorafocal.recipes.released", lambda: [row])
    result = fingerprint(run, merged)
    assert result.settings["released_reference"] == "base"
    assert result.settings["reference"] == "its own base, the adapter off"


def test_a_result_names_no_place(run: SavedRun, merged: Path, tmp_path: Path) -> None:
    result = fingerprint(run, merged, released_reference=str(run.base))
    result.write(tmp_path / "result.json")
    assert str(run.folder.parent) not in (tmp_path / "result.json").read_text()
    assert read_result(tmp_path / "result.json").scores == result.scores


def test_refusals(run: SavedRun, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"merged is a whole model: name .* by --released-reference"):
        fingerprint(run, merged)
    with pytest.raises(InputError, match="every margin of base is 0: it is its own reference"):
        fingerprint(run, run.base, released_reference=str(run.base))
    write_held_out(tmp_path / "few.jsonl", run.pairs[:9])
    monkeypatch.setattr("lorafocal.evaluate.score._measured", lambda *_, **__: pytest.fail("computed for nothing"))
    with pytest.raises(InputError, match=r"gives 9 pairs; a correlation needs 10"):
        evaluate_fingerprint(run.folder, released=str(run.folder), pairs=tmp_path / "few.jsonl", say=quiet)


@pytest.mark.row("58")
def test_tokens_of_another_tokenizer_are_refused(run: SavedRun, merged: Path, tmp_path: Path) -> None:
    stranger = other_tokenizer(shutil.copytree(merged, tmp_path / "stranger"))
    its_base = other_tokenizer(shutil.copytree(run.base, tmp_path / "base"))
    with pytest.raises(InputError, match="does not share the tokenizer"):
        fingerprint(run, stranger, released_reference=str(its_base))


def test_an_adapter_that_was_trained_against_another_model_needs_that(run: SavedRun, tmp_path: Path) -> None:
    folder = shutil.copytree(run.folder, tmp_path / "run")
    file = folder / "adapter" / "lorafocal.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"reference": "separate_model"}))
    with pytest.raises(InputError, match="was not trained against its own base: name its reference by --reference"):
        evaluate_fingerprint(folder, released=str(run.folder), pairs=run.folder / "held_out.jsonl", say=quiet)
