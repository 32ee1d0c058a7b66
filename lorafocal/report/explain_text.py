"""One pair for a terminal: its tokens in colour, or as rows where there are no colours."""

from __future__ import annotations

import io
from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from lorafocal.data.places import printable
from lorafocal.report.explain_words import findings, in_lines, largest, places, weights
from lorafocal.report.explanation import Answer, Explanation, Gap, Token, folded, full_colour, signed

ROWS, COLOURED, BLOCK = 40, 600, 25  # tokens shown of an answer: as rows, in colour and then in blocks of so many
UNSCORED = 2000  # characters of a prompt, or of what stands between two turns
LARGEST = 5  # tokens listed below the coloured text
BAR = 8  # signs of a full bar
NARROWEST = 76  # columns; a narrower terminal breaks lines itself, and no number loses digits
# Blue for likelier, orange for less likely: told apart with every common colour blindness. Of xterm's 256 colours.
_MORE = ("color(153)", "color(111)", "color(69)", "color(27)")
_LESS = ("color(223)", "color(215)", "color(208)", "color(166)")


def explain_text(explanation: Explanation, *, colour: bool, width: int | None = None) -> str:
    """The whole explanation; every control character of the data is spelled out."""
    console = Console(
        file=io.StringIO(),
        force_terminal=colour,
        color_system="256" if colour else None,
        no_color=not colour,
        width=max(width or 100, NARROWEST),
        legacy_windows=False,
        highlight=False,
    )
    for shown in _shown(explanation, colour=colour):
        console.print(shown)
    written: io.StringIO = console.file  # type: ignore[assignment]
    return "\n".join(line.rstrip() for line in written.getvalue().rstrip("\n").split("\n"))


def _shown(explanation: Explanation, *, colour: bool) -> Iterator[RenderableType]:
    yield from _head(explanation)
    yield numbers(explanation)
    yield ""
    said = Table.grid(padding=(0, 1, 0, 0))
    for sentence in (*findings(explanation), *(f"note: {note}" for note in explanation.notes)):
        said.add_row("-", Text(printable(sentence), overflow="fold"))
    yield said
    full = full_colour(explanation)
    yield from _titled("prompt (not scored)", Text(shortened("".join(explanation.prompt))))
    for name, answer in (("chosen", explanation.chosen), ("rejected", explanation.rejected)):
        title = f"{name}  {answer.logratio:+.4f} nats in {len(answer.tokens)} tokens"
        yield from _titled(title, coloured(answer, full) if colour else rows(answer, full))
    if colour:
        yield from _titled(f"colours: log pi - log pi_ref, full at {full:.3g} nats", _legend())
        yield from _titled("tokens that moved most", _movers(explanation, full))
    yield from _titled("where the log-ratio sits, nats", _places(explanation))
    if explanation.history:
        yield from _titled("over training, chosen minus rejected log-ratio, nats", _history(explanation))


def _titled(title: str, below: RenderableType) -> Iterator[RenderableType]:
    yield ""
    yield Text(title, style="bold")
    yield below


def _head(explanation: Explanation) -> Iterator[RenderableType]:
    yield Text(printable(f"pair {explanation.id}"), style="bold")
    yield Text(printable(f"{explanation.place}; {explanation.policy_name} against {explanation.reference_name}"))
    yield Text(printable(f"objective: {explanation.objective_text}"))
    yield ""


def numbers(explanation: Explanation) -> Table:
    """Both answers side by side, and their difference."""
    chosen, rejected, weighing = explanation.chosen, explanation.rejected, explanation.weighing
    table = _table("", "chosen", "rejected", "difference")
    table.add_row(
        "tokens",
        str(len(chosen.tokens)),
        str(len(rejected.tokens)),
        str(len(chosen.tokens) - len(rejected.tokens)),
    )
    lines = [
        ("log pi, nats", chosen.policy, rejected.policy),
        ("log pi_ref, nats", chosen.reference, rejected.reference),
        ("log-ratio, nats", chosen.logratio, rejected.logratio),
    ]
    if weighing is not None and weighing.chosen_reward is not None and weighing.rejected_reward is not None:
        lines.append(("reward", weighing.chosen_reward, weighing.rejected_reward))
    for name, ours, theirs in lines:
        table.add_row(name, signed(ours), signed(theirs), signed(ours - theirs))
    for name, value in weights(explanation):
        table.add_row(name, "", "", value)
    return table


# ---- tokens


def shortened(text: str) -> str:
    """What is not scored as it stands, its control characters spelled out and the middle of a long one left out."""
    text = in_lines(text)
    return text if len(text) <= UNSCORED else f"{text[: UNSCORED // 2]} [...] {text[-UNSCORED // 2 :]}"


def coloured(answer: Answer, full: float) -> Text:
    """The answer's text, each token on the colour of its log-ratio."""
    text = Text(overflow="fold")
    for piece in folded(answer, most=COLOURED, block=BLOCK):
        if isinstance(piece, Gap):
            text.append(f" [{piece.tokens} tokens, {piece.logratio:+.2f} nats] ", style="dim")
        else:
            token = answer.tokens[piece]
            text.append(shortened(token.context), style="dim italic")
            text.append(in_lines(token.text), style=_style(token, full))
    return text


def rows(answer: Answer, full: float) -> Table:
    """The answer's tokens as rows; those that moved little stand together, so that the last column adds up."""
    table = _table("#", "log pi", "log pi_ref", "log-ratio", "sum", "", "token")
    table.columns[5].justify = table.columns[6].justify = "left"
    table.columns[6].overflow = "fold"
    total, number = 0.0, 0
    for piece in folded(answer, most=ROWS):
        if isinstance(piece, Gap):
            number += piece.tokens
            total += piece.logratio
            table.add_row("...", "", "", signed(piece.logratio), signed(total), "", f"({piece.tokens} tokens)")
            continue
        token = answer.tokens[piece]
        if token.context:
            table.add_row("", "", "", "", "", "", Text(f"(not scored) {shortened(token.context)}"))
        number += 1
        total += token.logratio
        table.add_row(str(number), *_row(token), signed(total), bar(token, full), spelled(token))
    return table


def _row(token: Token) -> tuple[str, str, str]:
    return f"{token.policy:.4f}", f"{token.reference:.4f}", signed(token.logratio)


def bar(token: Token, full: float) -> str:
    """How far the token moved, as + or - signs."""
    signs = min(BAR, round(BAR * abs(token.logratio) / full))
    return ("+" if token.logratio > 0 else "-") * signs


def spelled(token: Token) -> Text:
    """A token's text between bars, which show its spaces, line feeds and all that is not printable spelled out."""
    if not token.text:
        return Text("(part of a character)")
    return Text(f"|{printable(token.text)}|")


def _style(token: Token, full: float) -> str:
    share = abs(token.logratio) / full
    scale = _MORE if token.logratio > 0 else _LESS
    if share < 0.5 / len(scale):
        return ""
    shade = scale[min(int(share * len(scale)), len(scale) - 1)]
    return f"{'color(231)' if shade == _MORE[-1] else 'color(16)'} on {shade}"


def _legend() -> Text:
    text = Text("less likely than under the reference ")
    for shade in (*reversed(_LESS), "", *_MORE):
        text.append("   ", style=f"on {shade}" if shade else "")
    return text.append(" likelier")


def _movers(explanation: Explanation, full: float) -> Table:
    table = _table("", "#", "log pi", "log pi_ref", "log-ratio", "token")
    table.columns[5].justify = "left"
    table.columns[5].overflow = "fold"
    for name, answer in (("chosen", explanation.chosen), ("rejected", explanation.rejected)):
        for place, token in largest(answer, LARGEST):
            text = spelled(token)
            text.stylize(_style(token, full))
            table.add_row(name, str(place + 1), *_row(token), text)
    return table


def _places(explanation: Explanation) -> Table:
    table = _table("", "tokens", "chosen", "tokens", "rejected", "difference")
    for row in places(explanation):
        table.add_row(*row)
    for name, place in (("its first token", 0), ("its last token", -1)):
        ends = [answer.tokens[place].logratio for answer in (explanation.chosen, explanation.rejected)]
        table.add_row(name, "1", signed(ends[0]), "1", signed(ends[1]), signed(ends[0] - ends[1]))
    return table


def _history(explanation: Explanation) -> Table:
    table = _table("step", "difference")
    for step, difference in explanation.history:
        table.add_row(str(step), signed(difference))
    return table


def _table(*names: str) -> Table:
    """A table without lines, its numbers at the right; the first column names the rows."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for position, name in enumerate(names):
        table.add_column(name, justify="right" if position else "left", no_wrap=name != "token")
    return table
