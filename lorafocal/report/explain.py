"""`lorafocal explain RUN --pair ID`: why one pair gets the reward and the weight that it gets, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lorafocal.data.packing import Pack, scores_of
from lorafocal.data.tokens import TokenizedPair
from lorafocal.errors import InputError
from lorafocal.evaluate.score import compared_with, is_its_own_reference, prepared, row_settings
from lorafocal.evaluations import evaluation_files, read_evaluation
from lorafocal.generation.subject import Subject, find_subject
from lorafocal.lineage import lineage_of
from lorafocal.model.adapters import AdapterSwitch
from lorafocal.model.saved import run_of
from lorafocal.objectives import PARAMETERS, Objective, PairLogps, build_objective
from lorafocal.policy import token_logps
from lorafocal.publish import check_folder_of, write_atomically
from lorafocal.report.explanation import Answer, Explanation, Token, Weighing
from lorafocal.report.find_pair import FoundPair, find_pair
from lorafocal.report.token_texts import token_texts

OWN_BASE = "its own base, the adapter off"


def explain(
    run: str | Path,
    pair_id: str,
    *,
    pairs: Path | None = None,
    base: str | None = None,
    reference: str | None = None,
    out: Path | None = None,
) -> Explanation:
    """Score one pair of a run token by token, and say what its objective makes of it.

    `run` is a run folder, an adapter, or a model; `base` says where an adapter's base is. The pair is looked for by its
    id among the held-out pairs that the run keeps and the rows of its config, or in the file `pairs`. Compared with is
    the base, the adapter off, where that is the adapter's start, else `reference`, an adapter or a model. `out`
    receives the web page, complete or not at all.

    Raises InputError where there is no such pair or no reference, before any weights are loaded.
    """
    if out is not None:
        check_folder_of(out)
    subject = find_subject(run, base=base)
    compared = None if reference is None else compared_with(subject, reference, base=base)
    if compared is None:
        _check_starts_at_its_base(subject)
    objective = _objective(subject)
    scored = objective is not None and objective.entry.scores
    found = find_pair(pair_id, subject, pairs, row_settings(subject), scored=scored)
    explanation = _explanation(subject, compared, objective, found)
    if out is not None:
        write_explanation(explanation, out)
    return explanation


def write_explanation(explanation: Explanation, path: Path) -> None:
    """Write the page; complete or not at all. Raises InputError where `path` cannot be written."""
    try:
        write_atomically(path, explanation.html().encode("utf-8", "replace"))
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another --out") from error


def _check_starts_at_its_base(subject: Subject) -> None:
    """Refuse what was not trained from its bare base: with the adapter off it would be compared with another model."""
    lineage = None if subject.folder is None else lineage_of(subject.folder)
    fresh = lineage is None or (lineage.start is None and lineage.reference in (None, "cached"))
    if subject.saved is not None and (is_its_own_reference(subject) or fresh):
        return
    trained = "" if lineage is None or lineage.reference is None else f" (it was trained against: {lineage.reference})"
    raise InputError(
        f"{subject.name} was not trained from its bare base{trained}: name by --reference ADAPTER_OR_MODEL what it is"
        " to be compared with"
    )


def _objective(subject: Subject) -> Objective | None:
    """What the run was trained by; None where that is unknown."""
    lineage = None if subject.folder is None else lineage_of(subject.folder)
    if lineage is None or lineage.objective is None:
        return None
    given = {key: lineage.objective[key] for key in PARAMETERS.keys() & lineage.objective.keys()}
    return build_objective(str(lineage.objective.get("name")), **given)


# ---- scores


def _explanation(
    subject: Subject, compared: Subject | None, objective: Objective | None, found: FoundPair
) -> Explanation:
    pair, tokenizer = found.pair, subject.tokenizer
    policy, own = _token_logps(subject, pair, adapter_off=compared is None)
    reference = own if compared is None else _token_logps(compared, pair, adapter_off=False)[0]
    ends = subject.ends
    ids = (pair.chosen_ids, pair.rejected_ids)
    sides = zip(ids, policy.split([*map(len, ids)]), reference.split([*map(len, ids)]), strict=True)
    chosen, rejected = (
        Answer(
            tuple(map(Token, token_texts(tokenizer, side, before=pair.prompt_ids), ours.tolist(), theirs.tolist())),
            side[-1] in ends,
        )
        for side, ours, theirs in sides
    )
    return Explanation(
        id=pair.id,
        place=found.place,
        policy_name=subject.name,
        reference_name=OWN_BASE if compared is None else compared.name,
        objective=None if objective is None else {"name": objective.name, **objective.parameters},
        prompt=token_texts(tokenizer, pair.prompt_ids),
        chosen=chosen,
        rejected=rejected,
        shared_start=_shared_start(*ids),
        weighing=None if objective is None else weighing(objective, pair, chosen, rejected),
        history=tuple(_history(subject, pair.id)) if found.of_the_run else (),
        notes=found.notes,
    )


def _token_logps(subject: Subject, pair: TokenizedPair, *, adapter_off: bool) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the chosen answer's tokens, then the rejected one's, (C + R,) float64: of the subject, and where
    asked of its base."""
    model = subject.load()
    [pack] = prepared(model, [pair])([pair]).packs
    pack = pack.to(next(model.parameters()).device)
    ours = _scored(model, pack)
    if not adapter_off:
        return ours, None
    with AdapterSwitch(model).off():
        return ours, _scored(model, pack)


@torch.no_grad()
def _scored(model: nn.Module, pack: Pack) -> Tensor:
    return token_logps(model, pack).double().cpu()


def weighing(objective: Objective, pair: TokenizedPair, chosen: Answer, rejected: Answer) -> Weighing | None:
    """What the objective makes of a pair alone; None where a pair's loss depends on the others of its step."""
    if objective.entry.statistics is not None:
        return None
    policy, reference = (
        PairLogps(*(torch.tensor([getattr(side, name)], dtype=torch.float64) for side in (chosen, rejected)))
        for name in ("policy", "reference")
    )
    scores = scores_of([pair])
    lengths = torch.tensor([len(chosen.tokens), len(rejected.tokens)])
    losses = objective(policy, reference, lengths, scores=scores)
    log_odds = losses.log_odds
    return Weighing(
        loss=losses.losses.item(),
        chosen_reward=_number(losses.chosen_rewards),
        rejected_reward=_number(losses.rejected_rewards),
        log_odds=_number(log_odds),
        weight=None if log_odds is None else objective.weights(log_odds, scores).item(),
    )


def _number(values: Tensor | None) -> float | None:
    return None if values is None or not len(values) else values.item()


def _shared_start(chosen: Sequence[int], rejected: Sequence[int]) -> int:
    """The tokens with which both answers begin."""
    pairs = zip(chosen, rejected, strict=False)
    return next((n for n, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(chosen), len(rejected)))


def _history(subject: Subject, pair_id: str) -> Iterator[tuple[int, float]]:
    """The pair's difference of log-ratios at each evaluation that the run left a table of, in nats."""
    run = None if subject.folder is None else run_of(subject.folder)
    for step, path in ({} if run is None else evaluation_files(run)).items():
        rows = [row for row in read_evaluation(path) if row.id == pair_id]
        if len(rows) == 1:
            [row] = rows
            yield step, row.policy_chosen - row.reference_chosen - (row.policy_rejected - row.reference_rejected)
