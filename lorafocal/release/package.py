"""An adapter as others take it: PEFT's files, the tokenizer with its template, card and lineage, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from lorafocal.card import CARD_FILE, adapter_card
from lorafocal.errors import InputError
from lorafocal.lineage import LINEAGE_FILE, Lineage, lineage_of
from lorafocal.model.load import loader_of
from lorafocal.model.save import in_words
from lorafocal.model.saved import WEIGHTS_FILE, SavedAdapter, read_config, tokenizer_of
from lorafocal.model.serving import serving_section
from lorafocal.release.combine import combine, lineage_of_saved
from lorafocal.release.measured import check_tokenizer
from lorafocal.run_folder import ADAPTER_CONFIG, METRICS_FILE, last_rewards, read_manifest, run_of
from lorafocal.tensor_files import read_tensors


def package_adapter(adapters: Sequence[SavedAdapter], weights: Sequence[float] | None, folder: Path) -> Path:
    """Fill the empty `folder` with one adapter: a copy of the only one, or several combined by `weights`.

    Its base is named by hub id or by its folder's last name, whatever the adapter's own file says, and the copy holds
    no file that is not named here: no state, no data, no optimiser. Returns `folder`.

    Raises InputError for tensors that are not finite, for another tokenizer than that of training, and for what
    `combine` refuses.
    """
    if len(adapters) == 1 and weights is None:
        _copy(adapters[0], folder)
    else:
        combine(adapters, weights if weights is not None else [1.0] * len(adapters), folder)
    tokenizer = tokenizer_of(adapters[0])
    for saved in adapters:
        check_tokenizer(saved.folder, tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def merged_lineage(folder: Path) -> Lineage:
    """The lineage of a model that `merge_adapter` wrote. Raises InputError where it is gone."""
    found = lineage_of(folder)
    if found is None:
        raise InputError(f"{folder} has no {LINEAGE_FILE}: merge again")
    return found


def _copy(saved: SavedAdapter, folder: Path) -> None:
    lineage = lineage_of_saved(saved)
    for name, tensor in read_tensors(saved.folder / WEIGHTS_FILE).items():
        if tensor.numel() == 0 or not tensor.isfinite().all():
            raise InputError(f"{saved.folder / WEIGHTS_FILE}: {name} is empty or not finite: export another checkpoint")
    record = json.loads((saved.folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    record |= {"base_model_name_or_path": lineage.base.name, "revision": lineage.base.revision}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.copyfile(saved.folder / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    lineage.write(folder)
    card = adapter_card(
        lineage,
        _results(saved),
        adapter=in_words(saved.config),
        loader=loader_of(read_config(saved.base, saved.revision)),
        run=read_manifest(run_of(saved.folder)),
    )
    (folder / CARD_FILE).write_text(card + serving_section(saved.config), encoding="utf-8")


def _results(saved: SavedAdapter) -> dict[str, float]:
    """The rewards of the run's last evaluation, which is that of its finished adapter; nothing where none is there."""
    try:
        lines = (saved.folder.resolve().parent / METRICS_FILE).read_text(encoding="utf-8").splitlines()
        return last_rewards(json.loads(line) for line in lines if '"eval_loss"' in line)
    except (OSError, ValueError):
        return {}
