"""An adapter beside what its run measured of it: passed as it is, refused where one file was changed since."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafocal.errors import InputError
from lorafocal.evaluations import EvaluatedPair, evaluation_file, write_evaluation
from lorafocal.lineage import lineage_of
from lorafocal.model.load import load_tokenizer, tokenizer_digests
from lorafocal.model.saved import read_adapter
from lorafocal.objectives.inputs import PairLogps
from lorafocal.release.export import export
from lorafocal.release.measure import Live, live_logps
from lorafocal.release.measured import ROUNDING, SLACK, check_measured
from lorafocal.release.merge import merge_adapter
from tests.saved_run import SavedRun, edit_json, other_tokenizer, save_run

pytestmark = pytest.mark.slow

STEPS = 3  # of `save_run`


@pytest.fixture
def run(tmp_path: Path) -> SavedRun:
    """A run in float32 with the table of its last evaluation, and a manifest that knows its tokenizer."""
    run = save_run(tmp_path, base_dtype=torch.float32, dtype="float32")
    live = live_logps(read_adapter(run.adapter), run.pairs, "float32")
    write_table(run, live.logps, live.reference)
    manifest = tokenizer_digests(load_tokenizer(str(run.base)))
    (run.folder / "manifest.json").write_text(json.dumps(manifest))
    return run


def write_table(run: SavedRun, policy: PairLogps, reference: PairLogps) -> None:
    columns = zip(*(side.tolist() for side in (*policy, *reference)), strict=True)
    rows = [EvaluatedPair(pair.id, *values) for pair, values in zip(run.pairs, columns, strict=True)]
    write_evaluation(evaluation_file(run.folder, STEPS), rows)


def one_weight(run: SavedRun) -> None:
    file = run.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = 100.0
    save_file(tensors, file, metadata={"format": "pt"})


def test_what_was_measured_is_merged_and_exported(run: SavedRun, tmp_path: Path) -> None:
    merge_adapter(run.adapter, tmp_path / "merged")
    export(run.adapter, tmp_path / "alone", form="adapter")
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.row("S13")
@pytest.mark.parametrize(
    "change",
    [
        one_weight,
        lambda run: edit_json(run.adapter / "adapter_config.json", lora_alpha=80),
        lambda run: edit_json(run.adapter / "adapter_config.json", use_rslora=True),
    ],
    ids=["weight", "alpha", "rslora"],
)
def test_another_adapter_than_was_measured_is_refused(
    run: SavedRun, tmp_path: Path, change: Callable[[SavedRun], None]
) -> None:
    change(run)
    with pytest.raises(InputError, match=r"is not what its run measured: policy_\w+ of pair .* was -.* Restore it"):
        merge_adapter(run.adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    alone = shutil.copytree(run.adapter, tmp_path / "elsewhere" / "adapter")  # the way out
    merge_adapter(alone, tmp_path / "out", base=str(run.base), pairs=run.folder / "held_out.jsonl")


def test_another_base_s_config_is_told_by_its_log_probs_where_the_lineage_does_not_know_it(
    run: SavedRun, tmp_path: Path
) -> None:
    edit_json(run.adapter / "lorafocal.json", base_config_sha256=None)
    edit_json(run.base / "config.json", rms_norm_eps=1.0)
    with pytest.raises(InputError, match="is not what its run measured"):
        merge_adapter(run.adapter, tmp_path / "out")


@pytest.mark.row("S13")
def test_another_vocabulary_or_template_is_refused_by_name(run: SavedRun, tmp_path: Path) -> None:
    template = run.base / "chat_template.jinja"
    before = template.read_text()
    template.write_text("{{ messages }}")
    for form in ("merged", "adapter"):
        with pytest.raises(InputError, match="the base's chat template is not the one of training"):
            export(run.adapter, tmp_path / "out", form=form)
    template.write_text(before)
    other_tokenizer(run.base)
    with pytest.raises(InputError, match="the base's vocabulary is not the one of training"):
        merge_adapter(run.adapter, tmp_path / "out")
    edit_json(run.folder / "manifest.json", vocabulary_sha256=None)  # as earlier versions wrote it
    merge_adapter(run.adapter, tmp_path / "out")


# ---- what counts as rounding, on made-up log-probs


def checked(run: SavedRun, kind: str, **sides: PairLogps) -> None:
    saved = read_adapter(run.adapter)
    lineage = lineage_of(run.adapter)
    assert lineage is not None
    zeros = PairLogps(torch.zeros(len(run.pairs)), torch.zeros(len(run.pairs)))
    write_table(run, zeros, zeros)
    live = Live(tuple(run.pairs), sides.get("logps", zeros), sides.get("reference", zeros), "float32", "packed")
    check_measured(replace(saved, lineage=replace(lineage, reference=kind)), live)


def test_rounding_is_allowed_for_and_no_more(run: SavedRun) -> None:
    tokens = torch.tensor([pair.scored_tokens for pair in run.pairs]).T
    allowed = SLACK * ROUNDING["float32"] * tokens.sqrt()
    checked(run, "disabled_adapter", logps=PairLogps(*(0.99 * allowed)))
    for share in (1.01, float("nan")):
        with pytest.raises(InputError, match="policy_chosen"):
            checked(run, "disabled_adapter", logps=PairLogps(*(share * allowed)))


def test_the_reference_is_compared_only_where_it_was_the_base(run: SavedRun) -> None:
    ones = PairLogps(torch.ones(len(run.pairs)), torch.ones(len(run.pairs)))
    checked(run, "frozen_copy", reference=ones)
    with pytest.raises(InputError, match="reference_chosen"):
        checked(run, "disabled_adapter", reference=ones)


def test_pairs_of_another_file_are_not_compared(run: SavedRun) -> None:
    others = [replace(pair, chosen_ids=pair.rejected_ids) for pair in run.pairs]
    ones = PairLogps(torch.ones(len(others)), torch.ones(len(others)))
    check_measured(read_adapter(run.adapter), Live(tuple(others), ones, ones, "float32", "packed"))
