"""The parts of a page of the documentation that are made, each between `<!-- name -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Iterable


def made_anew(text: str, **parts: Iterable[str]) -> str:
    """The page with the lines of these parts, by their names."""
    for name, lines in parts.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert marked.search(text), name
        made = "".join(f"{line}\n" for line in lines)
        text = marked.sub(lambda found, made=made: found[1] + made + found[2], text)
    return text
