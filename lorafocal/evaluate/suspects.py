"""`lorafocal suspects`: the training pairs of a run, or a file's, scored at every state that the run kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lorafocal.checkpoint import checkpoints, step_of
from lorafocal.config import load_config
from lorafocal.data.held_out import load_pairs
from lorafocal.data.leave_out import digest, line_of
from lorafocal.data.messages import as_text
from lorafocal.data.needs import check_scores
from lorafocal.data.packing import scores_of
from lorafocal.data.prepare import check_sources, prepare_data
from lorafocal.data.sources import Preference
from lorafocal.data.tokens import TokenizedPair
from lorafocal.errors import InputError
from lorafocal.evaluate.score import compared_with, pair_logps, prepared, row_settings
from lorafocal.evaluate.suspicion import Suspect, Suspects, suspect
from lorafocal.generation.subject import Subject, find_subject
from lorafocal.lineage import lineage_of
from lorafocal.manifest import notes_of_changes
from lorafocal.model.saved import exchange_adapter
from lorafocal.objectives import Objective, PairLogps
from lorafocal.objectives.objective import objective_from
from lorafocal.objectives.pairwise import rewards
from lorafocal.policy import sequence_logps
from lorafocal.publish import check_folder_of, why_incomplete, write_atomically
from lorafocal.reference import DisabledAdapterReference
from lorafocal.report.html import check_place, write_page
from lorafocal.report.suspects_page import suspects_page
from lorafocal.run_folder import ADAPTER_CONFIG, ADAPTER_DIR, CONFIG_FILE, MODEL_DIR
from lorafocal.schema import Config


def find_suspects(
    run: Path,
    *,
    pairs: Path | None = None,
    base: str | None = None,
    reference: str | None = None,
    limit: int | None = None,
    out: Path | None = None,
    write: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Suspects:
    """Score the training pairs of `run`, or those of the file `pairs`, at each checkpoint it kept and at its end.

    `base` says where the base is, `reference` what rewards are relative to where the run's own is not at hand. At most
    `limit` suspects are taken, the most suspicious first. `out` receives a page to browse them (.html), `write` the
    confident ones as lines for `data.leave_out`. `say` is told of the progress.

    Raises InputError for a folder that is no run or kept no weights, for an objective that ranks nothing, for data that
    cannot be read, and for files that cannot be written, before any weights are loaded where that can be known.
    """
    _check_places(out, write, limit)
    states = _states(Path(run))
    config = load_config(Path(run) / CONFIG_FILE)
    subject = find_subject(states[0].folder, base=base)
    objective = _objective(config)
    compared = _compared(config, objective, subject, reference, base)
    data = _rows(Path(run), config, subject) if pairs is None else _rows_of_file(pairs, subject)
    if objective.entry.scores and not objective.entry.implicit_rewards:
        check_scores(data.pairs, data.of, objective.entry.scores)
    margins, leads = _margins(states, data.pairs, subject, compared, objective, say)
    found = replace(_suspects(data, margins, leads, limit), run=_name(run), steps=tuple(state.step for state in states))
    if len(states) == 1:
        found = replace(found, notes=(*found.notes, ONE_STATE))
    if out is not None:
        write_page(out, suspects_page(found))
    if write is not None:
        _write_list(write, found)
    return replace(found, page=out, written=write)


ONE_STATE = (
    "the run kept one state only, and a pair that was learned by heart by then is missed: keep checkpoints"
    " (training.save_steps, and no small training.save_total_limit)"
)


@dataclass(frozen=True, slots=True)
class _State:
    """Weights that the run kept, after `step` optimiser steps."""

    step: int
    folder: Path  # of an adapter, or of a whole model


@dataclass(frozen=True, slots=True)
class _Data:
    """Pairs as tokens and as rows, in one order; each once."""

    of: str
    pairs: list[TokenizedPair]
    rows: list[Preference]
    notes: tuple[str, ...] = ()


def _check_places(out: Path | None, write: Path | None, limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; it is a number of pairs, 1 or more")
    if out is not None:
        check_place(out)
    if out is not None and write is not None and out.resolve() == write.resolve():
        raise InputError(f"{out} cannot be both the page and the list: give --out and --write two names")
    if write is not None:
        check_folder_of(write)


def _write_list(path: Path, found: Suspects) -> None:
    lines = "".join(f"{each.line}\n" for each in found.to_leave_out)
    try:
        write_atomically(path, lines.encode("utf-8", "replace"))
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another") from error


def _name(run: Path) -> str:
    return Path(run).resolve().name


# ---- the run


def _states(run: Path) -> list[_State]:
    """The adapters of complete checkpoints and of the end, or the end's whole model, by step."""
    if not (run / CONFIG_FILE).is_file():
        raise InputError(
            f"{run} is no run folder: it has no {CONFIG_FILE}; give what `lorafocal train` wrote, runs/<name>"
        )
    adapters = (path for path in checkpoints(run) if (path / ADAPTER_DIR / ADAPTER_CONFIG).is_file())
    kept = {step_of(path): path / ADAPTER_DIR for path in adapters if why_incomplete(path, hashes=False) is None}
    end = next((run / name for name in (ADAPTER_DIR, MODEL_DIR) if (run / name).is_dir()), None)
    if end is not None and (lineage := lineage_of(end)) is not None:
        kept.setdefault(lineage.steps, end)
    if not kept:
        raise InputError(f"{run} holds no adapter, no model and no complete checkpoint yet: nothing can be scored")
    return [_State(step, kept[step]) for step in sorted(kept)]


def _objective(config: Config) -> Objective:
    objective = objective_from(config.objective.model_dump(mode="json"))
    if not objective.entry.rejected:
        raise InputError(f"{objective.name} looks at no rejected answers: it ranks nothing, and so nothing is suspect")
    more = objective.entry.beyond_rows
    if more and not objective.entry.implicit_rewards and not objective.entry.whole_step:
        raise InputError(
            f"{objective.name} ranks answers by {more}, which only the run had: suspects of it cannot be told. Train a"
            " short run of dpo on these pairs, and ask that one"
        )
    return objective


def _compared(
    config: Config, objective: Objective, subject: Subject, reference: str | None, base: str | None
) -> Subject | None:
    """The reference where it is other weights than the subject's base with its adapter off, which None stands for."""
    if not objective.entry.reference:
        if reference is not None:
            raise InputError(f"{objective.name} compares with no reference: leave --reference out")
        return None
    place = reference or _place_of_reference(config)
    return None if place is None else compared_with(subject, place, base=base)


def _place_of_reference(config: Config) -> str | None:
    section, adapter = config.reference, config.adapter
    place: str | None
    if section is None or section.kind == "disabled_adapter":
        return None
    if section.kind in ("moving", "several"):
        raise InputError(
            f"the run's reference was {section.kind}, which is no one adapter or model: name by --reference"
            " ADAPTER_OR_MODEL what the pairs are to be judged by"
        )
    if section.kind == "adapter":
        place, revision = section.adapter, None
    elif section.model is not None:
        place, revision = section.model, section.revision
    elif adapter is None:
        place, revision = config.model.name, config.model.revision
    else:
        place, revision = adapter.start_from, None  # a fresh adapter starts as its base
    if revision is not None:
        raise InputError(f"the reference is {place} at a commit: name its weights by --reference ADAPTER_OR_MODEL")
    return place


# ---- the data


def _rows(run: Path, config: Config, subject: Subject) -> _Data:
    """The training pairs as they were prepared for the run, copies of a weighted source once."""
    check_sources(config.data)
    part = prepare_data(config.data, subject.tokenizer, objective=config.objective.entry)["train"]
    notes = notes_of_changes(run, "train", part.tokens.pairs)
    first_copies = {digest(row): row for row in reversed(part.preferences)}
    rows = {row.id: row for row in first_copies.values()}
    pairs = [pair for pair in part.tokens.pairs if pair.id in rows]
    return _Data("its training pairs", pairs, [rows[pair.id] for pair in pairs], notes)


def _rows_of_file(path: Path, subject: Subject) -> _Data:
    loaded = load_pairs(path, subject.tokenizer, **row_settings(subject))
    if not loaded.rows:
        raise InputError(f"{path} holds token ids; who is to judge pairs needs their texts: give preference rows")
    rows = {row.id: row for row in loaded.rows}
    notes = (f"{loaded.left_out} rows of {path.name} give no pair and were left out.",) * bool(loaded.left_out)
    return _Data(path.name, loaded.pairs, [rows[pair.id] for pair in loaded.pairs], notes)


# ---- the scores


def _margins(
    states: Sequence[_State],
    pairs: Sequence[TokenizedPair],
    subject: Subject,
    compared: Subject | None,
    objective: Objective,
    say: Callable[[str], None],
) -> tuple[Tensor, Tensor | None]:
    """The margin of each pair at each state, (T, B), and the reference's lead of the chosen answer in nats, (B,)."""
    reference = None
    if compared is not None:
        say(f"scoring {len(pairs)} pairs under the reference")
        model = compared.load()
        reference = _scorer(model, pairs)(partial(sequence_logps, model))
        del model
    model = subject.load()
    score = _scorer(model, pairs)
    if objective.entry.reference and reference is None:
        reference = score(DisabledAdapterReference(model).logps)
    margins = []
    for number, state in enumerate(states, start=1):
        say(f"scoring {len(pairs)} pairs after step {state.step} ({number} of {len(states)})")
        if number > 1:
            exchange_adapter(model, state.folder)
        margins.append(margins_of(objective, pairs, score(partial(sequence_logps, model)), reference))
    leads = None if reference is None else (reference.chosen - reference.rejected).double()
    return torch.stack(margins), leads


def _scorer(model: torch.nn.Module, pairs: Sequence[TokenizedPair]) -> Callable[..., PairLogps]:
    collator = prepared(model, pairs)
    return partial(pair_logps, pairs=pairs, device=next(model.parameters()).device, collator=collator)


def margins_of(
    objective: Objective, pairs: Sequence[TokenizedPair], policy: PairLogps, reference: PairLogps | None
) -> Tensor:
    """Chosen minus rejected reward of each pair, (B,), float64: the objective's own, target margins not counted."""
    if objective.entry.implicit_rewards and reference is not None:
        chosen, rejected = rewards(policy, reference, beta=objective.parameters["beta"])
        return (chosen - rejected).double()
    lengths = torch.tensor([pair.scored_tokens for pair in pairs]).T.flatten()
    return objective(policy, reference, lengths, scores=scores_of(pairs)).margins.double()


def _suspects(data: _Data, margins: Tensor, leads: Tensor | None, limit: int | None) -> Suspects:
    """The always wrong pairs, the most suspicious first; who scored them is for the caller to say."""
    scores = suspect(margins)
    wrong = [n for n in scores.nats.argsort(descending=True, stable=True).tolist() if scores.always_wrong[n]]
    return Suspects(
        run="",
        of=data.of,
        steps=(),
        pairs=len(data.pairs),
        right=int((margins > 0).all(0).sum()),
        always_wrong=len(wrong),
        confident=int(scores.confident.sum()),
        mean_p=float(torch.exp(-scores.nats).mean()),
        found=tuple(
            Suspect(
                id=data.rows[n].id,
                place=data.rows[n].place,
                line=line_of(data.rows[n]),
                suspicion=float(scores.nats[n]),
                p=float(torch.exp(-scores.nats[n])),
                confident=bool(scores.confident[n]),
                margins=tuple(margins[:, n].tolist()),
                reference_lead=None if leads is None else float(leads[n]),
                chosen_tokens=data.pairs[n].scored_tokens[0],
                rejected_tokens=data.pairs[n].scored_tokens[1],
                prompt=as_text(data.rows[n].prompt),
                chosen=as_text(data.rows[n].chosen),
                rejected=as_text(data.rows[n].rejected),
            )
            for n in wrong[:limit]
        ),
        notes=data.notes,
    )
