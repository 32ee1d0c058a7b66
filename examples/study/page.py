"""The study's page, every number of it from the tables beside it: `python examples/study/page.py` writes it again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from analysis import LEVEL, Contrast, best_rates, contrast, holm, student_interval, values
from design import Study, read_study
from figure import draw
from table import QUANTILES, Prompts, Row, read_prompts, read_runs

from lorafocal.publish import write_atomically

HERE = Path(__file__).parent
COMMAND = "python examples/study/run.py"


def write_page(study: Study, results: Path) -> Path:
    """`results/study.md` and `results/study.png` from `results/*.csv`; the page's path."""
    runs, prompts = read_runs(results / "runs.csv"), read_prompts(results / "prompts.csv")
    base = read_runs(results / "base.csv")[0]
    sessions = json.loads((results / "sessions.json").read_text(encoding="utf-8"))
    rates = {condition.name: best_rates(runs, study, condition.name) for condition in study.conditions}
    found = compared(study, prompts, rates)
    draw(study, runs, base, rates, [*found.values()], results / "study.png")
    parts = [
        "# The study's results",
        f"Written by `{COMMAND}` from the tables beside this page; the plan is in"
        " [PREREGISTRATION.md](../PREREGISTRATION.md), the reading of it in [docs/study.md](../../../docs/study.md).",
        "## What came out",
        *headlines(study, found, rates, runs, base),
        "![every arm at every learning rate, differences, margins](study.png)",
        *(arms_table(study, runs, base, rates[name], name) for name in rates),
        contrasts_table(study, found),
        protocol_table(study, runs, prompts, rates),
        answers_table(study, runs, read_runs(results / "answers.csv"), rates[study.primary]),
        *(pairs_table(study, runs, rates[name], name) for name in rates),
        kinds_table(study, runs, rates[study.primary]),
        rates_table(study, runs),
        *(same_rate_table(study, [*runs, *_added(results)], name) for name in rates),
        made(study, runs, sessions),
    ]
    page = results / "study.md"
    write_atomically(page, "\n\n".join(parts) + "\n")
    return page


Found = Mapping[tuple[str, str, str], Contrast]  # by condition, arm, against


def compared(study: Study, prompts: Prompts, rates: Mapping[str, Mapping[str, float]]) -> Found:
    """Every contrast in every condition; Holm's adjustment over the secondary ones of the primary condition."""
    found = {}
    for condition in study.conditions:
        for pair in (study.contrast, *study.secondary):
            found[condition.name, *pair] = contrast(prompts, condition.name, pair, rates[condition.name])
    keys = [(study.primary, *pair) for pair in study.secondary]
    for key, p in zip(keys, holm([found[key].p for key in keys]), strict=True):
        found[key] = replace(found[key], adjusted=p)
    return found


def headlines(
    study: Study, found: Found, rates: Mapping[str, Mapping[str, float]], runs: Sequence[Row], base: Row
) -> list[str]:
    """The result in sentences; docs/study.md repeats the first ones word for word."""
    said = []
    for condition in (study.primary, *(other.name for other in study.conditions if other.name != study.primary)):
        of = found[condition, *study.contrast]
        right = {arm: _right(runs, condition, arm, rates[condition][arm]) for arm in study.contrast}
        kind, tested = "Other condition", "not tested"
        if condition == study.primary:
            kind, tested = "Primary", f"p {of.p:.2g}: {of.verdict(study.equivalence)}"
        said.append(
            f"{kind} ({condition}): {', '.join(f'{arm} {value:.2f}%' for arm, value in right.items())} right answers"
            f" (base {100 * base['test_right']:.2f}%); difference {of.value:+.2f} points, 95% interval over {of.seeds}"
            f" seeds [{of.low:+.2f}, {of.high:+.2f}], {tested}."
        )
    secondary = [found[study.primary, *pair] for pair in study.secondary]
    stand = [of for of in secondary if of.adjusted is not None and of.adjusted < LEVEL]
    said.append(f"Secondary contrasts in {study.primary} that stand after Holm's adjustment: {_listed(stand)}.")
    said.append(f"Those that do not: {_listed([of for of in secondary if of not in stand])}.")
    for other in (condition.name for condition in study.conditions if condition.name != study.primary):
        shown = [found[other, *pair] for pair in study.secondary]
        clear = [one for one in shown if one.low > 0 or one.high < 0]
        said.append(f"Secondary contrasts in {other}, not tested, whose 95% interval leaves out 0: {_listed(clear)}.")
    return said


def _listed(contrasts: Sequence[Contrast]) -> str:
    found = (f"{of.arm} - {of.against} {of.value:+.2f} [{of.low:+.2f}, {of.high:+.2f}]" for of in contrasts)
    return "; ".join(found) or "none"


def arms_table(study: Study, runs: Sequence[Row], base: Row, rates: Mapping[str, float], condition: str) -> str:
    """Each arm at its own best rate."""
    rows = [["base", "", _share(base["test_right"], 2), "", "", _share(base["ranked"]), "0", "100", "", "", "", ""]]
    for arm in study.arms:
        of = {key: _mean(values(runs, key, condition, arm.name, rates[arm.name])) for key in _ARM_KEYS}
        right = values(runs, "test_right", condition, arm.name, rates[arm.name])
        gap = 100 * np.mean(right) - _right(runs, condition, "dpo", rates["dpo"])
        rows.append(
            [
                arm.name,
                f"{rates[arm.name] * arm.rate_factor:g}",
                f"{100 * np.mean(right):.2f} ± {100 * np.std(right, ddof=1):.2f}",
                f"{gap:+.2f}",
                f"{50 + gap / 2:.2f}",
                *(_share(of[key]) for key in ("ranked", "ranked_where_wrong", "ranked_where_right")),
                *(_signed(of[key]) for key in ("chosen_shift", "rejected_shift")),
                _number(of["ratio_to_dpo"], ".3f"),
                _share(of["turned_share"]),
            ]
        )
    head = [
        "arm", "rate", "right, % ± sd of seeds", "minus dpo", "win rate against dpo, %", "ranked right, %",
        "of those wrong before", "of those right before", "chosen, nats", "rejected, nats", "weight over DPO's",
        "turned, %",
    ]  # fmt: skip
    words = (
        "Right answers: the exact probability of the right answer at temperature 1, mean of the test questions. Win"
        " rate: expected, by the rule, ties half, of independent answers, which is half the difference above 50%."
        " Ranked: by likelihood, test pairs; chosen and rejected: displacement from the base on them. The last two are"
        " means over training."
    )
    return f"## Arms at their own best learning rates: {condition}\n\n{words}\n\n{_table(head, rows)}"


_ARM_KEYS = (
    "ranked", "ranked_where_wrong", "ranked_where_right", "chosen_shift", "rejected_shift", "ratio_to_dpo",
    "turned_share",
)  # fmt: skip


def contrasts_table(study: Study, found: Found) -> str:
    """All contrasts, with their tests and verdicts; `Holm` over the secondary ones of the primary condition."""
    rows = []
    for of in found.values():
        first = (of.arm, of.against) == study.contrast and of.condition == study.primary
        rows.append(
            [
                of.condition,
                f"**{of.arm} - {of.against}**" if first else f"{of.arm} - {of.against}",
                f"{of.value:+.2f}",
                f"[{of.low:+.2f}, {of.high:+.2f}]",
                f"[{of.drawn[0]:+.2f}, {of.drawn[1]:+.2f}]",
                f"{of.p:.2g}",
                f"{of.flips:.2g}",
                "" if of.adjusted is None else f"{of.adjusted:.2g}",
                of.verdict(study.equivalence) if of.condition == study.primary else "(not tested)",
            ]
        )
    head = [
        "condition", "contrast", "points", "95%, seeds", "95%, seeds and questions", "p", "p, sign flips", "p, Holm",
        "verdict",
    ]  # fmt: skip
    words = f"The primary one is bold; the equivalence margin is {study.equivalence:g} points."
    return f"## Contrasts\n\n{words}\n\n{_table(head, rows)}"


def protocol_table(
    study: Study, runs: Sequence[Row], prompts: Prompts, rates: Mapping[str, Mapping[str, float]]
) -> str:
    """The paper's protocol: one rate, FocalPO's best, for both emphases, and DPO as it was handed down."""
    rows = []
    for condition in study.conditions:
        shared = rates[condition.name][study.contrast[0]]
        given = {"dpo": study.published_rate, study.contrast[0]: shared, "focal-hard-1": shared}
        for arm in given:
            right = _right(runs, condition.name, arm, given[arm])
            of = None if arm == "dpo" else contrast(prompts, condition.name, (arm, "dpo"), given)
            gap = ["", ""] if of is None else [f"{of.value:+.2f}", f"[{of.low:+.2f}, {of.high:+.2f}]"]
            rows.append([condition.name, arm, f"{given[arm]:g}", f"{right:.2f}", *gap])
    head = ["condition", "arm", "rate", "right, %", "minus dpo", "95%, seeds"]
    words = "DPO at the rate it was handed down with, FocalPO and hard emphasis at FocalPO's best rate: Figure 1's way."
    return f"## The paper's own protocol\n\n{words}\n\n{_table(head, rows)}"


def answers_table(study: Study, runs: Sequence[Row], answers: Sequence[Row], rates: Mapping[str, float]) -> str:
    """Answers that were written, beside the probabilities that the study compares."""
    rows = []
    for arm in study.contrast:
        of = {key: _share(_mean([row[key] for row in answers if row["arm"] == arm]), 2) for key in _ANSWER_KEYS}
        rows.append([arm, f"{_right(runs, study.primary, arm, rates[arm]):.2f}", *of.values()])
    head = ["arm", "exact, %", "sampled, %", "wins, sampled, %", "greedy, %", "wins, greedy, %"]
    words = (
        f"One answer a test question and seed of {study.primary}, by `lorafocal.generation` and the rule, at"
        f" temperature 1 and greedy. Wins: over {study.contrast[1]}'s of the same seed, drawn with the same random"
        " numbers, ties half. Exact is what sampled answers have in expectation."
    )
    return f"## Answers that were written\n\n{words}\n\n{_table(head, rows)}"


_ANSWER_KEYS = ("sampled_right", "sampled_wins", "greedy_right", "greedy_wins")


def pairs_table(study: Study, runs: Sequence[Row], rates: Mapping[str, float], condition: str) -> str:
    """Training pairs, clean and swapped apart, after training."""
    kinds = ("clean", "swapped") if study.condition(condition).noise > 0 else ("clean",)
    rows = []
    for arm in study.arms:
        row = [arm.name]
        for kind in kinds:
            of = [
                _mean(values(runs, f"{kind}_{what}", condition, arm.name, rates[arm.name]))
                for what in ("fitted", *(f"margin_{q}" for q in QUANTILES))
            ]
            row += [_share(of[0]), " / ".join(_number(margin, ".2f") for margin in of[1:])]
        rows.append(row)
    head = [
        "arm",
        *(f"{kind}: {what}" for kind in kinds for what in ("fitted, %", "margin, nats (5, 25, 50, 75, 95%)")),
    ]
    words = (
        "Fitted: the implicit reward ranks the training pair as it is labelled. Margin: the log-ratio of chosen over"
        " rejected, which beta makes DPO's log-odds."
    )
    return f"## Training pairs after training: {condition}\n\n{words}\n\n{_table(head, rows)}"


def kinds_table(study: Study, runs: Sequence[Row], rates: Mapping[str, float]) -> str:
    """Right answers by difficulty in the primary condition."""
    kinds = [key for key in runs[0] if key.startswith("right ")]
    rows = [
        [arm.name, *(_share(_mean(values(runs, kind, study.primary, arm.name, rates[arm.name]))) for kind in kinds)]
        for arm in study.arms
    ]
    head = ["arm", *(kind.removeprefix("right ") for kind in kinds)]
    return f"## Right answers by difficulty, %: {study.primary}\n\n{_table(head, rows)}"


def rates_table(study: Study, runs: Sequence[Row]) -> str:
    """Every cell: right answers on test questions."""
    rows = []
    for arm in study.arms:
        row = [arm.name]
        for condition in study.conditions:
            row += [f"{_right(runs, condition.name, arm.name, rate):.2f}" for rate in study.rates]
        rows.append(row)
    head = ["arm", *(f"{condition.name}, {rate:g}" for condition in study.conditions for rate in study.rates)]
    return f"## Right answers at every learning rate, %\n\n{_table(head, rows)}"


def same_rate_table(study: Study, runs: Sequence[Row], condition: str) -> str:
    """Every arm minus DPO at one and the same rate, where also a rate that was added afterwards."""
    grid, rows = sorted({row["grid_rate"] for row in runs}), []
    for arm in study.arms:
        if arm.name != "dpo":
            found = [_gap_at(runs, condition, arm.name, rate) for rate in grid]
            rows.append([arm.name, *(f"{value:+.2f} [{low:+.2f}, {high:+.2f}]" for value, low, high in found)])
    rows.append(["right answers of dpo, %", *(f"{_right(runs, condition, 'dpo', rate):.2f}" for rate in grid)])
    words = (
        "Not preregistered: points of right answers, Student's 95% interval over seeds; no choice of rates is in it."
        " dpo-scaled, at its factor of the rate, shows whether a slower DPO would be better there or worse."
    )
    head = ["arm", *(f"at {rate:g}" + (", added" if rate not in study.rates else "") for rate in grid)]
    return f"## Minus DPO at the same learning rate: {condition}\n\n{words}\n\n{_table(head, rows)}"


def _added(results: Path) -> list[Row]:
    """Runs at a rate beyond the grid that was tried afterwards (lower.yaml), where there are any."""
    added = results / "lower" / "runs.csv"
    return read_runs(added) if added.exists() else []


def _gap_at(runs: Sequence[Row], condition: str, arm: str, rate: float) -> tuple[float, float, float]:
    ours, theirs = (np.asarray(values(runs, "test_right", condition, name, rate)) for name in (arm, "dpo"))
    return student_interval(100 * (ours - theirs))


def made(study: Study, runs: Sequence[Row], sessions: Sequence[Mapping[str, Any]]) -> str:
    """How the tables came to be: runs, seeds, times, versions."""
    cpu = sum(row["cpu_s"] for row in runs)
    seeds = "; ".join(f"{of.name}: {of.seeds[0]} to {of.seeds[-1]}" for of in study.conditions)
    lines = [
        f"{len(runs)} runs by `{COMMAND}`; seeds {seeds}. {cpu / 60:.0f} minutes of processor time in the runs,"
        f" {cpu / len(runs):.1f} s each.",
        *(
            f"- {of['began']}: {of['runs']} runs in {of['minutes']:g} minutes, {of['workers']} workers on {of['cores']}"
            f" cores (Python {of['python']}, torch {of['torch']}, transformers {of['transformers']})"
            for of in sessions
        ),
    ]
    return "## How it was made\n\n" + "\n".join(lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def _right(runs: Sequence[Row], condition: str, arm: str, rate: float) -> float:
    """Right answers of a cell on test questions, in percent."""
    return 100 * float(np.mean(values(runs, "test_right", condition, arm, rate)))


def _mean(found: Sequence[float]) -> float | None:
    return float(np.mean(found)) if found else None


def _share(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{digits}f}"


def _signed(value: float | None) -> str:
    return _number(value, "+.2f")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


if __name__ == "__main__":
    print(write_page(read_study(HERE / "study.yaml"), HERE / "results"))
