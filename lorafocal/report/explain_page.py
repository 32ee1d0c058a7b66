"""One pair as a self-contained web page: its tokens in colour, where the log-ratio sits, and every number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from lorafocal.data.places import printable
from lorafocal.report import html
from lorafocal.report.explain_words import findings, in_lines, largest, places, weights
from lorafocal.report.explanation import Explanation, Token, full_colour, signed

LARGEST = 10  # tokens listed of each answer
WIDTH, HEIGHT, EDGE = 640, 220, 64  # of the picture, in its own units
_STYLE = """
:root { --more: light-dark(#3b82f6, #3b82f6); --less: light-dark(#f97316, #d9660a);
  --chosen: light-dark(#1d4ed8, #7aa7ff); --rejected: light-dark(#b45309, #f0a35e); }
.tokens { max-width: 60rem; padding: .8rem 1rem; background: var(--card); border-radius: .4rem; white-space: pre-wrap;
  overflow-wrap: anywhere; font: .95rem/1.9 ui-monospace, monospace; }
.tokens span { border-radius: .2rem; padding: .1rem 0; print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }
.tokens span:hover { outline: 1px solid var(--text); }
.tokens .more { background: color-mix(in oklab, var(--more) calc(var(--s) * 70%), transparent); }
.tokens .less { background: color-mix(in oklab, var(--less) calc(var(--s) * 70%), transparent);
  text-decoration: underline dotted var(--soft); text-underline-offset: .25em; }
.tokens .read { color: var(--soft); font-style: italic; }
.scale { display: inline-block; width: 12rem; height: .9rem; border-radius: .2rem; vertical-align: -.1rem;
  margin: 0 .5rem; background: linear-gradient(to right, color-mix(in oklab, var(--less) 70%, transparent),
  transparent, color-mix(in oklab, var(--more) 70%, transparent)); print-color-adjust: exact; }
.pieces { display: grid; gap: 0 3rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), max-content)); }
svg { max-width: 46rem; width: 100%; height: auto; font: 11px system-ui, sans-serif; fill: var(--soft); }
svg path { fill: none; stroke-width: 2; } svg line { stroke: var(--line); }
.c { stroke: var(--chosen); } .r { stroke: var(--rejected); stroke-dasharray: 5 3; }
"""


def explain_page(explanation: Explanation) -> str:
    """The whole page. Every text of the data is escaped, and its control characters are spelled out."""
    title = printable(f"Pair {explanation.id}")
    full = full_colour(explanation)
    said = [*findings(explanation), *explanation.notes]
    body = [
        f"<h1>{escape(title)}</h1>",
        html.paragraph(_about(explanation), soft=True),
        html.section("What stands out", html.items(map(printable, said))),
        html.section(
            "The pair in numbers", f'<div class="pieces">{_numbers(explanation)}{_weights(explanation)}</div>'
        ),
        html.section("Its tokens", _legend(explanation, full), *_answers(explanation, full)),
        html.section("Where the log-ratio sits", picture(explanation), _parts(explanation)),
        html.section("Over training", _history(explanation)) if explanation.history else "",
        html.section("Every token", *_all_tokens(explanation)),
    ]
    return html.document(title, "\n".join(part for part in body if part), style=_STYLE)


def _about(explanation: Explanation) -> str:
    return printable(
        f"{explanation.place}. {explanation.policy_name}, compared with {explanation.reference_name}."
        f" Objective: {explanation.objective_text}."
    )


def _numbers(explanation: Explanation) -> str:
    chosen, rejected, weighing = explanation.chosen, explanation.rejected, explanation.weighing
    counts = len(chosen.tokens), len(rejected.tokens)
    lines = [
        ("log π, nats", chosen.policy, rejected.policy),
        ("log π of the reference, nats", chosen.reference, rejected.reference),
        ("log-ratio, nats", chosen.logratio, rejected.logratio),
        ("log-ratio a token", chosen.logratio / counts[0], rejected.logratio / counts[1]),
    ]
    if weighing is not None and weighing.chosen_reward is not None and weighing.rejected_reward is not None:
        lines.append(("reward", weighing.chosen_reward, weighing.rejected_reward))
    table = [("tokens", *map(str, counts), str(counts[0] - counts[1]))]
    table += [(name, signed(ours), signed(theirs), signed(ours - theirs)) for name, ours, theirs in lines]
    return html.table(["", "chosen", "rejected", "difference"], table)


def _weights(explanation: Explanation) -> str:
    found = weights(explanation)
    return html.table(["under the objective", ""], found) if found else ""


# ---- tokens


def _legend(explanation: Explanation, full: float) -> str:
    several = max(len(answer.turns) for answer in (explanation.chosen, explanation.rejected)) > 1
    read = " What stands in italics between turns is read, and not scored." if several else ""
    return (
        '<p class="soft">log π − log π of the reference: less likely than before (underlined)'
        f'<span class="scale"></span>likelier; full colour from {full:.3g} nats on. Point at a token for its'
        f" numbers.{read}</p>"
    )


def _answers(explanation: Explanation, full: float) -> Iterator[str]:
    prompt = f'<div class="tokens" dir="auto">{escape(in_lines("".join(explanation.prompt)))}</div>'
    yield html.folded(f"The prompt, {len(explanation.prompt)} tokens, which are not scored", prompt)
    for name, answer in (("Chosen", explanation.chosen), ("Rejected", explanation.rejected)):
        spans = "".join(_span(place, token, full) for place, token in enumerate(answer.tokens, start=1))
        yield f"<h3>{name}: {answer.logratio:+.4f} nats in {len(answer.tokens)} tokens</h3>"
        yield f'<div class="tokens" dir="auto">{spans}</div>'


def _span(place: int, token: Token, full: float) -> str:
    """A token on its colour, behind what is read before it; the numbers are its title."""
    context = f'<span class="read">{escape(in_lines(token.context))}</span>' if token.context else ""
    if not token.text:
        return context
    kind = "more" if token.logratio > 0 else "less"
    share = min(abs(token.logratio) / full, 1.0)
    mark = f' class="{kind}" style="--s:{share:.2f}"' if share >= 0.05 else ""
    title = f"{place}: log-ratio {token.logratio:+.4f}; log π {token.policy:.4f}, reference {token.reference:.4f}"
    return f'{context}<span{mark} title="{title}">{escape(in_lines(token.text))}</span>'


# ---- where it sits


def picture(explanation: Explanation) -> str:
    """The log-ratios summed from the first token on, of both answers, as a drawing."""
    sums = {
        "c": _summed(explanation.chosen.logratios),
        "r": _summed(explanation.rejected.logratios),
    }
    longest = max(len(values) for values in sums.values()) - 1
    low, high = (bound(bound(values) for values in sums.values()) for bound in (min, max))
    span = (high - low) or 1.0

    def x(place: int) -> float:
        return EDGE + (WIDTH - 2 * EDGE) * place / longest

    def y(value: float) -> float:
        return HEIGHT - 24 - (HEIGHT - 44) * (value - low) / span

    lines = "".join(
        f'<path class="{kind}" d="M{" L".join(f"{x(n):.1f} {y(value):.1f}" for n, value in enumerate(values))}"/>'
        for kind, values in sums.items()
    )
    ends = "".join(
        f'<text x="{EDGE - 4}" y="{y(value) + 4:.1f}" text-anchor="end">{value:+.3g}</text>'
        for value in dict.fromkeys((low, 0.0, high))
        if value == 0 or abs(y(value) - y(0)) > 12
    )
    described = f"The chosen answer ends at {sums['c'][-1]:+.4g} nats, the rejected one at {sums['r'][-1]:+.4g}."
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{described}">'
        f'<line x1="{EDGE}" x2="{WIDTH - EDGE}" y1="{y(0):.1f}" y2="{y(0):.1f}"/>{ends}{lines}'
        f'<text x="{EDGE}" y="{HEIGHT - 4}">0</text>'
        f'<text x="{WIDTH - EDGE}" y="{HEIGHT - 4}" text-anchor="end">token {longest}</text></svg>'
        "<figcaption>Log-ratio summed from the first token on, nats: the chosen answer drawn through, the rejected one"
        f" dashed. {described}</figcaption></figure>"
    )


def _summed(values: Sequence[float]) -> list[float]:
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return sums


def _parts(explanation: Explanation) -> str:
    head = ["stretch, nats", "tokens", "chosen", "tokens", "rejected", "difference"]
    return html.table(head, places(explanation))


def _history(explanation: Explanation) -> str:
    rows = [(str(step), signed(difference)) for step, difference in explanation.history]
    return html.table(["step", "chosen minus rejected log-ratio, nats"], rows)


def _all_tokens(explanation: Explanation) -> Iterator[str]:
    for name, answer in (("chosen", explanation.chosen), ("rejected", explanation.rejected)):
        moved = _token_table(largest(answer, LARGEST), f"The {name} answer's tokens that moved most")
        whole = _token_table(list(enumerate(answer.tokens)), f"The {name} answer, token by token")
        yield moved
        yield html.folded(f"All {len(answer.tokens)} tokens of the {name} answer", whole)


def _token_table(tokens: Sequence[tuple[int, Token]], caption: str) -> str:
    rows = [
        (
            str(place + 1),
            printable(token.text) or "(part of a character)",
            f"{token.policy:.4f}",
            f"{token.reference:.4f}",
            signed(token.logratio),
        )
        for place, token in tokens
    ]
    return html.table(["number", "token", "log π", "reference", "log-ratio"], rows, caption=caption)
