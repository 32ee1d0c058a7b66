"""What a run's numbers say, in plain words: what was seen, what it usually means, what to do.

Each rule is a pure function of a record that answers a Remark or None; `RULES` names what it looks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lorafocal.report.numbers import (
    HELD_OUT,
    at,
    at_the_end,
    displacement,
    flips,
    gap_series,
    good_answers,
    is_finite,
    last,
    parts,
    turned_share,
)
from lorafocal.report.read import RunRecord

FELL_NATS = 1.0  # mean fall of chosen answers worth a word
RIGHT_FELL = 0.02  # share of right answers; below it a few hundred answers show nothing
ACCURACY_FELL = 0.02  # reward accuracy that fell by more says itself that something is wrong
MOVED_MARGIN = 1e-3  # a margin that never exceeded this is as good as none
MOSTLY_TIES = 0.9
TIES_HIDE = 0.05  # what leaving ties out would add to the accuracy
LOSS_ROSE = 0.01  # share of the held-out loss at its best
WIDE_GAP = 0.1  # share of the held-out loss
MOVED_WRONG = 0.6  # reward accuracy, of pairs that the reference ranks wrong, that looks like a success
FEW_MENDED = 0.1  # share of these pairs that the policy ranks right
FEW_CARRY = 0.25  # effective share of the pairs below which few of them lead the gradient
GOES_WITH_LENGTH = 0.5  # correlation of margin and length difference
A_FEW_PAIRS = 20  # below it a share of pairs says little


@dataclass(frozen=True, slots=True)
class Remark:
    """One line in plain words."""

    seen: str
    means: str
    do: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def chosen_fell(record: RunRecord) -> Remark | None:
    """Chosen answers lost more than a nat on average."""
    moved = displacement(record)
    if moved is None or not moved.chosen < -FELL_NATS:
        return None
    share = "" if moved.chosen_fell_share is None else f"; {moved.chosen_fell_share:.0%} of them fell"
    return Remark(
        f"The {moved.pairs} chosen answers became less likely, by {-moved.chosen:.1f} nats on average{share}"
        f" (rejected answers: {moved.rejected:+.1f} nats).",
        "The model unlearns the very answers it should give (likelihood displacement)."
        + (
            " Rejected answers fell faster, so margins and reward accuracy look fine."
            if moved.rejected < moved.chosen
            else ""
        ),
        "Judge by answers and not by reward accuracy: a rule, a held-out task, a judge. If they got worse, lower"
        " training.learning_rate or raise objective.beta, train fewer steps, and look for pairs whose two answers are"
        " nearly the same.",
    )


def answers_fell(record: RunRecord) -> Remark | None:
    """Fewer answers are good, by a rule or a reward model, while reward accuracy shows nothing of it.

    Where the interval of the change was logged, it must lie below 0: few answers show nothing.
    """
    good = good_answers(record)
    accuracy = record.series(f"{HELD_OUT}rewards/accuracies")
    if len(accuracy.values) < 2:
        accuracy = record.series("rewards/accuracies")
    if good is None or len(good.share.values) < 2 or len(accuracy.values) < 2:
        return None
    after, change, highest = good.share.values[-1], last(good.change), last(good.change_high)
    before = good.share.values[0] if change is None else after - change
    fell = before - after > RIGHT_FELL if highest is None else highest < 0
    then, now = accuracy.values[0], accuracy.values[-1]
    if not (fell and now > then - ACCURACY_FELL):
        return None
    answers = good.words[0].upper() + good.words[1:]
    went = f"rose from {then:.1%} to {now:.1%}" if now > then else f"stayed ({then:.1%}, now {now:.1%})"
    return Remark(
        f"{answers} fell from {before:.1%} to {after:.1%}, while reward accuracy {went}.",
        "The model tells the two given answers apart and writes worse ones: reward accuracy is not the goal.",
        "Do not release this adapter. Lower training.learning_rate first, then train fewer steps, and choose the"
        " settings by the answers.",
    )


def pairs_turned(record: RunRecord) -> Remark | None:
    """Some pairs are past the turning point of FocalPO, or of another loss with its factor."""
    turned = turned_share(record)
    seen = [(step, share) for step, share in zip(*turned, strict=True) if share > 0]
    if not seen:
        return None
    step, most = max(seen, key=lambda entry: entry[1])
    where = "" if record.turning_point == -math.inf else f" (margin below {record.turning_point:.2f})"
    own = record.objective
    gamma = "objective.gamma" if own is None or own.focal is None else "objective.focal.gamma"
    effect = "a step lowers the margin of these pairs, which are misranked already, still further"
    if own is not None and own.guard:
        effect = f"objective.guard: {own.guard} leaves these pairs without one, so that nothing is learned of them"
    return Remark(
        f"Up to {most:.2%} of the pairs (step {step}) were past the turning point{where}, from step {seen[0][0]} on.",
        f"FocalPO's gradient changes its sign there: {effect}.",
        f"Use a smaller {gamma} (the paper's 0.05 turns at a margin of -20), or a smaller objective.beta; look"
        " at these pairs, whose labels may be swapped.",
    )


def nothing_moved(record: RunRecord) -> Remark | None:
    """Policy and reference still answer alike; without a reference a small margin may be where the model started."""
    if record.objective is not None and not record.objective.entry.reference:
        return None
    margins, ties = record.series("rewards/margins").finite(), record.series("rewards/ties")
    if not margins.steps or margins.steps[-1] <= 1:  # the first step is measured before anything has moved
        return None
    largest = max(abs(margin) for margin in margins.values)
    tied = last(ties)
    if not (largest < MOVED_MARGIN or (tied is not None and tied >= MOSTLY_TIES)):
        return None
    shown = "" if tied is None else f" and {tied:.0%} of the pairs are exact ties"
    return Remark(
        f"After step {margins.steps[-1]} nothing has moved: the largest mean margin so far is {largest:.2g}{shown}.",
        "Policy and reference give almost the same log-probs: the learning rate is far too small, or still warming up,"
        " or the steps do not reach the adapter.",
        "Look at the learning rate and the gradient norm; LoRA needs a learning rate about ten times that of full"
        " fine-tuning (5e-6 with beta 0.01 is the nearest published recipe).",
    )


def held_out_rose(record: RunRecord) -> Remark | None:
    """Held-out loss rises while training loss falls."""
    held_out, training = record.series(f"{HELD_OUT}loss").finite(), record.series("loss").finite()
    if len(held_out.values) < 2:
        return None
    best, best_step = min(zip(held_out.values, held_out.steps, strict=True))
    end = held_out.values[-1]
    then, now = at(training, best_step), last(training)
    if then is None or now is None or not (end - best > LOSS_ROSE * abs(best) and now < then):
        return None
    return Remark(
        f"Held-out loss was lowest at step {best_step} ({best:.4f}) and rose to {end:.4f}, while training loss fell"
        f" from {then:.4f} to {now:.4f}.",
        "The run learns its training pairs by heart.",
        f"Take the checkpoint nearest step {best_step} (compare by `lorafocal score`), or train fewer epochs or with a"
        " lower learning rate.",
    )


def fits_training_closer(record: RunRecord) -> Remark | None:
    """Training loss lies far below held-out loss."""
    gap, held_out = last(gap_series(record)), last(record.series(f"{HELD_OUT}loss"))
    if gap is None or held_out is None or not gap > WIDE_GAP * abs(held_out):
        return None
    return Remark(
        f"At the end the training loss (mean since the evaluation before) is {gap:.4f} nats below the held-out loss"
        f" ({held_out:.4f}).",
        "Pairs that were seen before are fitted closer than new ones: several epochs (the loss then falls in a step"
        " at each epoch's start), or doubles within the training pairs.",
        "Read the held-out curve, not the training one; train one epoch, and look for doubles with `lorafocal check`.",
    )


def ties_hidden(record: RunRecord) -> Remark | None:
    """Accuracy would look high with ties left out."""
    for prefix, pairs in ((HELD_OUT, "held-out"), ("", "training")):
        accuracy, ties = (last(record.series(f"{prefix}rewards/{key}")) for key in ("accuracies", "ties"))
        if accuracy is None or ties is None or not ties < 1:
            continue
        without = accuracy / (1 - ties)
        if without - accuracy < TIES_HIDE or ties >= MOSTLY_TIES:
            return None
        return Remark(
            f"{ties:.0%} of the {pairs} pairs are exact ties. Reward accuracy is {accuracy:.0%} because ties count as"
            f" wrong; with ties left out it would read {without:.0%}.",
            "A tie is a pair that nothing was learned about. A tool that leaves ties out of the accuracy, or counts"
            " them as right, shows a higher number for the same model.",
            "Compare accuracies only where ties are counted alike. Ties after the first steps come from a tiny"
            " learning rate, or from pairs whose two answers are the same text.",
        )
    return None


def more_unlearned(record: RunRecord) -> Remark | None:
    """Clearly more pairs went from right to wrong than from wrong to right."""
    groups = {(flip.initially_right, flip.finally_right): flip.pairs for flip in flips(record)}
    lost, won = groups.get((True, False), 0), groups.get((False, True), 0)
    if lost - won <= 2 * math.sqrt(lost + won):  # within what chance gives
        return None
    return Remark(
        f"By its own log-probs the model now ranks {lost} held-out pairs wrong that the reference ranked right, and"
        f" only {won} the other way round.",
        "The margin rewards a change against the reference, not the ranking itself; training undid rankings that were"
        " right before.",
        "Look at these pairs in the last file of evaluations/; lower training.learning_rate or raise objective.beta.",
    )


def ranking_did_not_follow(record: RunRecord) -> Remark | None:
    """Reward accuracy is high on pairs that the reference ranks wrong, and hardly one of them is ranked right now."""
    wrong = next((part for part in parts(record) if not part.initially_right), None)
    if wrong is None or wrong.accuracy is None or wrong.pairs < A_FEW_PAIRS:
        return None
    if not (wrong.accuracy >= MOVED_WRONG and wrong.finally_right < FEW_MENDED):
        return None
    return Remark(
        f"Of the {wrong.pairs} held-out pairs that the reference ranks wrong by log-prob, the policy ranks"
        f" {wrong.finally_right:.1%} right, though reward accuracy on them is {wrong.accuracy:.0%}.",
        "Reward accuracy counts pairs whose margin grew, however little. It says nothing of whether the model now finds"
        " the chosen answer likelier, and wrongly ranked pairs are seldom mended.",
        "Do not read reward accuracy as a share of pairs ranked right: `ranking/policy` is that share, `ranking/kept`"
        " and `ranking/mended` are its two parts.",
    )


def few_pairs_lead(record: RunRecord) -> Remark | None:
    """The gradient's weight lies on few of the pairs."""
    share = at_the_end(record, "focal/effective_share")
    if share is None or not share < FEW_CARRY:
        return None
    return Remark(
        f"By their weight in the gradient the pairs count for {share:.0%} of their number (effective share).",
        "Most pairs hardly weigh any more, being ranked right with a wide margin, or wrong with one if the objective"
        " spends little there: a few pairs, mislabelled ones among them, lead the training.",
        "Look at the pairs with the lowest margins: lorafocal suspects lists them. A smaller objective.beta or fewer"
        " epochs spread the weight.",
    )


def margin_goes_with_length(record: RunRecord) -> Remark | None:
    """Margins go along with how much longer the chosen answer is."""
    found = at_the_end(record, "rewards/length_correlation")
    if found is None or not abs(found) > GOES_WITH_LENGTH:
        return None
    longer = "longer" if found > 0 else "shorter"
    return Remark(
        f"The margin goes along with the difference in length of the two answers (correlation {found:+.2f}).",
        f"Part of what the model has learned may be that the {longer} answer is the better one.",
        "Compare the lengths of its answers with those of the base, and its accuracy on pairs with a longer and with a"
        " shorter chosen answer (`lorafocal evaluate pairs`). An objective that takes length into account is another"
        " way: simpo, length-dpo, dpo-norm.",
    )


def not_finite(record: RunRecord) -> Remark | None:
    """The loss or the gradient norm stopped being a finite number."""
    for key in ("loss", "grad_norm", f"{HELD_OUT}loss"):
        bad = [step for step, value in zip(*record.series(key), strict=True) if not is_finite(value)]
        if bad:
            return Remark(
                f"{key} was not a finite number at step {bad[0]}.",
                "A run stops by itself where its loss is not finite and names the pairs; a gradient alone may overflow"
                " for one step and be clipped.",
                "Look at the step before it: a spike in the gradient norm asks for a lower learning rate or a smaller"
                " max_grad_norm.",
            )
    return None


RULES: Mapping[str, Callable[[RunRecord], Remark | None]] = {
    "numbers that are not finite": not_finite,
    "runs that do not move": nothing_moved,
    "chosen answers that became less likely": chosen_fell,
    "answers that get worse while reward accuracy does not": answers_fell,
    "pairs past the turning point": pairs_turned,
    "rankings that training undid": more_unlearned,
    "rankings that did not follow the margin": ranking_did_not_follow,
    "a gradient that few pairs lead": few_pairs_lead,
    "margins that go along with length": margin_goes_with_length,
    "held-out loss that rises while training loss falls": held_out_rose,
    "training loss far below held-out loss": fits_training_closer,
    "ties that an accuracy hides": ties_hidden,
}


def remarks(record: RunRecord) -> list[Remark]:
    """What every rule has to say about a run, the gravest first."""
    return [remark for rule in RULES.values() if (remark := rule(record)) is not None]


def comparison_remarks(records: Sequence[RunRecord]) -> list[Remark]:
    """What keeps runs on one page from being compared number by number."""
    found = []
    betas = {record.name: record.beta for record in records if record.beta is not None}
    if len(set(betas.values())) > 1:
        found.append(
            Remark(
                f"The runs differ in beta ({_listed(betas)}).",
                "Margins and rewards are beta times a log-ratio, so they are not on one scale.",
                "Compare accuracies, and the displacement in nats.",
            )
        )
    for words, keys in (("held-out pairs", ("data", "eval", "tokens_sha256")), ("base model", ("base", "sha256"))):
        values = [_inside(record.manifest, keys) for record in records]
        if len({value for value in values if value is not None}) > 1:
            found.append(
                Remark(
                    f"The runs do not share their {words}.",
                    "Their held-out numbers answer different questions.",
                    "Score the adapters on one file of pairs: `lorafocal score ADAPTER PAIRS`.",
                )
            )
    return found


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def _inside(value: Any, keys: Sequence[str]) -> str | None:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else None
