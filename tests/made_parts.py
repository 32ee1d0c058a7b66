"""The parts of a page of the documentation that are made, each between `<!-- name -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Iterable


def made_part(text: str, name: str) -> str:
    """The lines of this part of a page, which stands there once."""
    [(_, lines, _)] = _marked(name).findall(text)
    return str(lines)


def made_anew(text: str, **parts: Iterable[str]) -> str:
    """The page with the lines of these parts, by their names."""
    for name, lines in parts.items():
        marked = _marked(name)
        assert marked.search(text), name
        made = "".join(f"{line}\n" for line in lines)
        text = marked.sub(lambda found, made=made: found[1] + made + found[3], text)
    return text


def _marked(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name} -->\n)(.*?)(<!-- end -->)", re.DOTALL)
