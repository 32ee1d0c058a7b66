"""A sweep for a person and for programs: the table at the terminal, `sweep.csv`, one web page and its picture."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, get_args

from lorafocal.errors import InputError
from lorafocal.publish import write_atomically
from lorafocal.report import html
from lorafocal.report.plots import DARK, LIGHT
from lorafocal.report.read import SWEEP_PAGE, read_run
from lorafocal.report.sweep_plot import drawable, sweep_png
from lorafocal.report.sweep_results import (
    ACCURACY,
    DISPLACEMENT,
    LOSS,
    MARGIN,
    SEEDS,
    Choice,
    Setting,
    Status,
    SweepRecord,
    axis_label,
    choose,
    metric,
    settings,
    value_text,
    values_text,
    varied,
)
from lorafocal.report.words import Remark, remarks

PICTURE_FILE, TABLE_FILE = "sweep.png", "sweep.csv"

COLUMNS = {  # metric: head of its column, and how it is printed
    LOSS: ("loss", ".4f"),
    ACCURACY: ("accuracy", ".1%"),
    MARGIN: ("margin", "+.3f"),
    DISPLACEMENT: ("chosen, nats", "+.2f"),
}


@dataclass(frozen=True, slots=True)
class SweepReport:
    """A sweep as far as it got, its best setting, and its page, where there is something to show."""

    record: SweepRecord
    choice: Choice | None
    page: Path | None = None
    interrupted_by: int | None = None  # signal number

    def table(self) -> str:
        """For a person at a terminal."""
        head, rows = setting_rows(self.record, self.choice)
        files = [] if self.page is None else [f"page     {self.page}"]
        files += [] if self.interrupted_by is None else ["stopped  and saved; the same command goes on there"]
        return "\n\n".join(
            [
                f"sweep {self.record.name}: {counted(self.record)}\nbest by {self.record.criterion}",
                _aligned([head, *rows], words=len(axes_of_settings(self.record)) or 1),
                "\n".join([*verdict(self.record, self.choice), *troubles(self.record), *files]),
            ]
        )

    def as_dict(self) -> dict[str, Any]:
        """The same for a program; a number that is not finite is null."""
        record = self.record
        return {
            "name": record.name,
            "folder": str(record.folder),
            "criterion": {"key": record.criterion.key, "why": record.criterion.why},
            "axes": {key: list(values) for key, values in record.axes.items()},
            "runs": [point.as_dict() | {"held_out": _finite(point.held_out)} for point in record.points],
            "settings": [_setting_dict(setting) for setting in settings(record.points)],
            "best": best_dict(self.choice),
            "interrupted_by": self.interrupted_by,
            "page": None if self.page is None else str(self.page),
        }


def write_sweep(record: SweepRecord, *, interrupted_by: int | None = None) -> SweepReport:
    """Choose the best and write `sweep.csv`, and, once a run has finished, `sweep.html` and `sweep.png`."""
    choice, folder = choose(record), record.folder
    write_atomically(folder / TABLE_FILE, csv_text(record))
    panels = drawable(record)
    if not panels:
        return SweepReport(record, choice, None, interrupted_by)
    light, dark = (sweep_png(panels, record, choice, theme) for theme in (LIGHT, DARK))
    write_atomically(folder / PICTURE_FILE, light)
    write_atomically(folder / SWEEP_PAGE, page(record, choice, light, dark).encode("utf-8", "replace"))
    return SweepReport(record, choice, folder / SWEEP_PAGE, interrupted_by)


# ---- in words


def counted(record: SweepRecord) -> str:
    """`12 runs: 9 finished, 1 failed, 2 waiting`."""
    counts = {state: len(record.of(state)) for state in get_args(Status)}
    total = len(record.points)
    shown = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return f"{total} run{'s' * (total != 1)}: {shown}"


def verdict(record: SweepRecord, choice: Choice | None) -> list[str]:
    """The best setting and its run, and which settings are level with it."""
    if choice is None:
        return ["best     none yet: no setting has all its runs finished"]
    key, setting = record.criterion.key, choice.setting
    name = values_text(setting.values, record.axes) or "the one setting"
    lines = [f"best     {name}: {_measured(setting, key)}"]
    many = len(setting.points) > 1
    luck = f" (the best of {len(setting.points)} seeds: its own value flatters it, the mean does not)" if many else ""
    lines.append(f"run      {record.folder / choice.point.slug}{luck}")
    if choice.level:
        lines.append(f"level    not told apart from it by these pairs{' and seeds' if many else ''}:")
        lines += [
            f"           {values_text(rival.setting.values, record.axes)}: {rival.difference:+.3g}"
            + (f" ± {rival.error:.2g}" if rival.error else ", exactly equal; the first one given is named")
            for rival in choice.level
        ]
    edge = at_the_edge(record, choice)
    return [*lines, *([f"note     {edge}"] if edge else [])]


def at_the_edge(record: SweepRecord, choice: Choice) -> str | None:
    """A word where the best value is clearly the first or last of an axis of three numbers or more."""
    if choice.level:
        return None
    for key, values in record.axes.items():
        numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        if key in SEEDS or len(numbers) < max(3, len(values)):
            continue
        best = choice.setting.values[key]
        if best in (min(numbers), max(numbers)) and best != 0:  # what is 0 has no values beyond it
            side = "smallest" if best == min(numbers) else "largest"
            return (
                f"the best {axis_label(key, record.axes)} is the {side} that was tried: add values beyond it, and call"
                " this again"
            )
    return None


def troubles(record: SweepRecord) -> list[str]:
    """Each run that failed or was refused, with its reason."""
    return [
        f"{point.status:<8} {point.slug}: {point.reason.splitlines()[0]}" for point in record.of("failed", "refused")
    ]


# ---- tables


def axes_of_settings(record: SweepRecord) -> list[str]:
    return [key for key in record.axes if key not in SEEDS]


def on_one_scale(record: SweepRecord) -> list[str]:
    """The columns whose numbers can be compared over this grid: losses have the objective's scale, margins beta's."""
    keys = varied(record.points)
    without = {LOSS} if any(key.startswith("objective.") for key in keys) else set()
    return [key for key in COLUMNS if key not in without | ({MARGIN} if "objective.beta" in keys else set())]


def setting_rows(record: SweepRecord, choice: Choice | None) -> tuple[list[str], list[list[str]]]:
    """Head and rows: values, how many runs have finished, means with their spread over seeds."""
    shown, axes = settings(record.points), axes_of_settings(record)
    columns = [key for key in on_one_scale(record) if any(setting.measured(key) for setting in shown)]
    head = [*(axis_label(key, record.axes) for key in axes or ["setting"]), "runs"]
    head += [COLUMNS[key][0] + (" *" if key == record.criterion.key else "") for key in columns]
    rows = []
    for setting in shown:
        names = [value_text(setting.values[key]) for key in axes] or ["all"]
        names[0] += " (best)" if choice is not None and setting.values == choice.setting.values else ""
        runs = f"{len(setting.finished)}/{len(setting.points)}"
        rows.append([*names, runs, *(_cell(setting, key) for key in columns)])
    return head, rows


def run_rows(record: SweepRecord) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the single runs."""
    columns = [key for key in on_one_scale(record) if any(math.isfinite(metric(p, key)) for p in record.points)]
    head = ["run", *(axis_label(key, record.axes) for key in record.axes), "status", *(COLUMNS[k][0] for k in columns)]
    rows = []
    for point in record.points:
        values = [metric(point, key) for key in columns]
        numbers = [_number(value, COLUMNS[key][1]) for key, value in zip(columns, values, strict=True)]
        status = f"{point.status}: {point.reason}" if point.reason else point.status
        rows.append([point.slug, *(value_text(point.values[key]) for key in record.axes), status, *numbers])
    return head, rows


def csv_text(record: SweepRecord) -> str:
    """One line a run: slug, status, steps, the values under their dotted keys, every held-out metric, the reason."""
    metrics = sorted({key for point in record.points for key in point.held_out})
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["run", "status", "steps", *record.axes, *metrics, "reason"])
    for point in record.points:
        values = [value_text(point.values[key]) for key in record.axes]
        numbers = [repr(point.held_out[key]) if key in point.held_out else "" for key in metrics]
        writer.writerow([point.slug, point.status, point.steps, *values, *numbers, point.reason])
    return file.getvalue()


def page(record: SweepRecord, choice: Choice | None, light: bytes, dark: bytes) -> str:
    """The whole page as text."""
    title = f"Sweep: {record.name}"
    head, rows = setting_rows(record, choice)
    caption = f"Held-out pairs; means over finished runs, ± standard deviation over seeds. * {record.criterion}"
    run_head, runs = run_rows(record)
    picture = html.picture(light, dark, description="Held-out metrics over the first axis of the sweep")
    lines = [line.strip() for line in verdict(record, choice)]
    body = [
        f"<h1>{escape(title)}</h1>",
        html.paragraph(counted(record), soft=True),
        html.section("Best", html.items(lines), *map(_remark, _of_the_best(record, choice))),
        html.section("Settings", html.table(head, rows, caption=caption)),
        html.section("Pictures", picture),
        html.section("Runs", html.table(run_head, runs, numbers=False)),
    ]
    return html.document(title, "\n".join(body))


def _of_the_best(record: SweepRecord, choice: Choice | None) -> Sequence[Remark]:
    """What the run's own report says of it."""
    if choice is None:
        return []
    try:
        return remarks(read_run(record.folder / choice.point.slug, choice.point.slug))
    except InputError:
        return []


def _remark(remark: Remark) -> str:
    lines = "".join(f"<p>{escape(text)}</p>\n" for text in (remark.seen, remark.means, remark.do))
    return f'<div class="remark">\n{lines}</div>'


# ---- for a program


def best_dict(choice: Choice | None) -> dict[str, Any] | None:
    """The best setting and run, and the settings level with it."""
    if choice is None:
        return None
    level = [
        {"values": dict(rival.setting.values), "difference": rival.difference, "error": rival.error}
        for rival in choice.level
    ]
    return {"run": choice.point.slug, **_setting_dict(choice.setting), "level": level}


def _setting_dict(setting: Setting) -> dict[str, Any]:
    keys = [key for key in COLUMNS if setting.measured(key)]
    return {
        "values": dict(setting.values),
        "runs": [point.slug for point in setting.points],
        "finished": len(setting.finished),
        "mean": {key: setting.mean(key) for key in keys},
        "spread": {key: setting.spread(key) for key in keys},
    }


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


# ---- texts


def _measured(setting: Setting, key: str) -> str:
    mean, spread = setting.mean(key), setting.spread(key)
    return f"{key} {mean:.4f}" + (f" ± {spread:.4f} over {len(setting.points)} seeds" if spread is not None else "")


def _cell(setting: Setting, key: str) -> str:
    mean, spread, form = setting.mean(key), setting.spread(key), COLUMNS[key][1]
    if mean is None:
        return "–"
    return _number(mean, form) + (f" ± {format(spread, form.lstrip('+'))}" if spread is not None else "")


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "–"


def _aligned(rows: Sequence[Sequence[str]], *, words: int) -> str:
    """Rows in columns; the first `words` columns to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if place < words else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
