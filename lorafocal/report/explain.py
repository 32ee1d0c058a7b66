"""`lorafocal explain RUN --pair ID`: why one pair gets the reward and the weight that it gets, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import repeat, takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorafocal.data.needs import check_scores
from lorafocal.data.packing import Pack, scores_of
from lorafocal.data.tokens import TokenizedPair
from lorafocal.data.turns import CONTEXT, Turns
from lorafocal.errors import InputError
from lorafocal.evaluate.score import OWN_BASE, compared_with, is_its_own_reference, prepared, row_settings, trained_by
from lorafocal.evaluations import evaluation_files, read_evaluation
from lorafocal.generation.subject import Subject, find_subject
from lorafocal.lineage import lineage_of
from lorafocal.model.adapters import AdapterSwitch
from lorafocal.model.saved import SavedAdapter
from lorafocal.objectives import Objective, PairLogps
from lorafocal.objectives.pairwise import dpo_weight, rewards
from lorafocal.policy import token_logps
from lorafocal.report.explanation import Answer, Explanation, Token, Weighing
from lorafocal.report.find_pair import FoundPair, find_pair
from lorafocal.report.html import check_place, write_page
from lorafocal.report.token_texts import token_texts
from lorafocal.run_folder import read_manifest, run_of


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
        check_place(out)
    subject = find_subject(run, base=base)
    compared = None if reference is None else compared_with(subject, reference, base=base)
    if compared is None:
        _check_starts_at_its_base(subject)
    objective = trained_by(subject)
    entry = None if objective is None else objective.entry
    found = find_pair(pair_id, subject, pairs, row_settings(subject), objective=entry)
    if entry is not None and entry.scores:
        check_scores([found.pair], found.place, entry.scores)
    explanation = _explanation(subject, compared, objective, found)
    if out is not None:
        write_page(out, explanation.html())
    return explanation


def _check_starts_at_its_base(subject: Subject) -> None:
    """Refuse what was not trained from its bare base: with the adapter off it would be compared with another model."""
    lineage = None if subject.folder is None else lineage_of(subject.folder)
    if subject.saved is not None and (is_its_own_reference(subject) or _started_bare(subject.saved)):
        return
    kind = None if lineage is None else lineage.reference_kind
    against = "" if kind is None else f" with `reference.kind: {kind}`,"
    raise InputError(
        f"{subject.name} was trained{against} not against its bare base: name by --reference ADAPTER_OR_MODEL what it"
        " was compared with then"
    )


def _started_bare(saved: SavedAdapter) -> bool:
    """Whether a fresh adapter was trained without a reference, or against stored log-probs of its base."""
    if saved.lineage is None or saved.lineage.start is not None:
        return False
    if saved.lineage.reference is None:
        return True
    run = read_manifest(run_of(saved.folder))
    return saved.lineage.reference_kind == "cached" and "reference_model" in run and run["reference_model"] is None


# ---- scores


def _explanation(
    subject: Subject, compared: Subject | None, objective: Objective | None, found: FoundPair
) -> Explanation:
    pair, tokenizer = found.pair, subject.tokenizer
    history = tuple(_history(subject, pair.id)) if found.of_the_run else ()  # first: a damaged table is told at once
    scored = _scored(subject, pair, with_base=compared is None)
    policy, reference = scored if compared is None else (*scored, *_scored(compared, pair, with_base=False))
    ends = subject.ends
    sides = ((pair.chosen_ids, pair.chosen_turns), (pair.rejected_ids, pair.rejected_turns))
    chosen, rejected = (
        Answer(tuple(_tokens(token_texts(tokenizer, ids, before=pair.prompt_ids), turns, *values)), ids[-1] in ends)
        for (ids, turns), *values in zip(sides, policy.of_answers(), reference.of_answers(), strict=True)
    )
    return Explanation(
        id=pair.id,
        place=found.place,
        policy_name=subject.name,
        reference_name=OWN_BASE if compared is None else compared.name,
        objective=None if objective is None else objective.as_dict(),
        prompt=token_texts(tokenizer, pair.prompt_ids),
        chosen=chosen,
        rejected=rejected,
        shared_start=_shared_start(*sides),
        weighing=None if objective is None else weighing(objective, pair, chosen, rejected, policy.collisions),
        history=history,
        notes=(*found.notes, *_notes(objective)),
    )


class _Scored(NamedTuple):
    """A pair under one model: the chosen answer's tokens, then the rejected one's, float64."""

    logps: Tensor  # (C + R,) nats
    collisions: Tensor  # (2,) log sum_v pi_v^2 summed over each answer's tokens, nats
    lengths: Sequence[int]

    def of_answers(self) -> list[list[float]]:
        return [side.tolist() for side in self.logps.split(list(self.lengths))]


def _scored(subject: Subject, pair: TokenizedPair, *, with_base: bool) -> list[_Scored]:
    """Under the subject, and where asked under its base, the adapter off."""
    model = subject.load()
    [pack] = prepared(model, [pair])([pair]).packs
    pack = pack.to(next(model.parameters()).device)
    found = [_under(model, pack)]
    if with_base:
        with AdapterSwitch(model).off():
            found.append(_under(model, pack))
    return found


@torch.no_grad()
def _under(model: nn.Module, pack: Pack) -> _Scored:
    collisions = torch.empty(len(pack.index.labels), dtype=torch.float64, device=pack.input_ids.device)
    logps = token_logps(model, pack, collisions).double().cpu()
    lengths = pack.index.lengths.tolist()
    return _Scored(logps, torch.stack([side.sum() for side in collisions.cpu().split(lengths)]), lengths)


def weighing(
    objective: Objective, pair: TokenizedPair, chosen: Answer, rejected: Answer, collisions: Tensor
) -> Weighing:
    """What the objective makes of a pair alone; rewards alone, if any, where its loss takes more than the pair's row.

    `collisions` (2,) are the policy's, log sum_v pi_v^2 summed over each answer's tokens.
    """
    policy, reference = (
        PairLogps(*(torch.tensor([getattr(side, name)], dtype=torch.float64) for side in (chosen, rejected)))
        for name in ("policy", "reference")
    )
    if objective.entry.beyond_rows:
        if not (objective.entry.implicit_rewards and objective.entry.reference):
            return Weighing(None, None, None)
        chosen_reward, rejected_reward = rewards(policy, reference, beta=objective.parameters["beta"])
        return Weighing(None, chosen_reward.item(), rejected_reward.item())
    lengths = torch.tensor([len(chosen.tokens), len(rejected.tokens)])
    losses = objective(policy, reference, lengths, scores=scores_of([pair]), collisions=collisions)
    own = Weighing(losses.losses.item(), _number(losses.chosen_rewards), _number(losses.rejected_rewards))
    if (log_odds := losses.log_odds) is None:
        return own
    return replace(
        own,
        log_odds=log_odds.item(),
        p=torch.sigmoid(log_odds).item(),
        weight=objective.weights(log_odds, *losses.constants).item() + 0.0,  # never -0
        dpo_weight=dpo_weight(log_odds).item(),
        turned=bool(objective.turned(log_odds).item()),
    )


def _notes(objective: Objective | None) -> Iterator[str]:
    if objective is None:
        yield "What it was trained by is not known (there is no lorafocal.json that says so): no rewards, no weights."
    elif objective.entry.whole_step:
        yield f"The loss of {objective.name} depends on the other pairs of a step: one alone has none, and no weight."
    elif more := objective.entry.beyond_rows:
        yield f"The loss of {objective.name} takes {more}, which the run alone had: none is told here, and no weight."
    elif not objective.entry.bradley_terry:
        yield f"{objective.name} has no probability of a pair's ranking, and so no weight to compare with DPO's."


def _number(values: Tensor) -> float | None:
    return values.item() if len(values) else None


def _tokens(texts: Sequence[str], turns: Turns, policy: Sequence[float], reference: Sequence[float]) -> Iterator[Token]:
    """The scored tokens of an answer, each with what is read before it."""
    logps, context = zip(policy, reference, strict=True), ""
    for text, turn in zip(texts, turns or repeat(0, len(texts)), strict=True):
        if turn == CONTEXT:
            context += text
        else:
            yield Token(text, *next(logps), context)
            context = ""


def _shared_start(chosen: tuple[list[int], Turns], rejected: tuple[list[int], Turns]) -> int:
    """The scored tokens with which both answers begin."""
    ours, theirs = (zip(ids, turns or repeat(0), strict=False) for ids, turns in (chosen, rejected))
    same = takewhile(lambda both: both[0] == both[1], zip(ours, theirs, strict=False))
    return sum(turn != CONTEXT for (_, turn), _ in same)


def _history(subject: Subject, pair_id: str) -> Iterator[tuple[int, float]]:
    """The pair's difference of log-ratios at each evaluation that the run left a table of, in nats."""
    run = None if subject.folder is None else run_of(subject.folder)
    for step, path in ({} if run is None else evaluation_files(run)).items():
        rows = [row for row in read_evaluation(path) if row.id == pair_id]
        if len(rows) == 1:
            [row] = rows
            yield step, row.policy_chosen - row.reference_chosen - (row.policy_rejected - row.reference_rejected)
