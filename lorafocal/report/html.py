"""Self-contained HTML: one document with its style and at most one script, nothing loaded; every text is escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from lorafocal.errors import InputError
from lorafocal.publish import check_file, check_folder_of, published, write_atomically

# Nothing may be fetched, whatever text a run brings: pictures come as data, the style from this page.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_GENERATOR = '<meta name="generator" content="lorafocal">'
_HEAD_BYTES = 4096  # of a page, within which that stands

_STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --text: #1c2024; --soft: #5b6470; --line: #d5dae0; --card: #f5f7f9;
  --warn: #b45309; }
@media screen and (prefers-color-scheme: dark) {
  :root { --back: #14171b; --text: #e6e9ed; --soft: #9aa4b0; --line: #343b44; --card: #1c2127; --warn: #f0b252; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem 1rem 4rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
p, ul, dl { max-width: 46rem; } .soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; }
.scroll { overflow-x: auto; max-width: 100%; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; } img { display: block; width: 100%; height: auto; border-radius: .4rem; }
.remark { max-width: 46rem; margin: 0 0 1rem; padding: .7rem 1rem; background: var(--card);
  border-left: .25rem solid var(--warn); }
.remark p { margin: .2rem 0; }
.legend { list-style: none; margin: .5rem 0 1rem; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; }
.legend span { display: inline-block; width: .9rem; height: .9rem; border-radius: .2rem; margin-right: .4rem;
  vertical-align: -.1rem; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
summary { cursor: pointer; } code { font-size: .9em; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } figure, .remark, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; } .scroll { overflow: visible; } .grid { grid-template-columns: 1fr 1fr; }
  details::details-content { content-visibility: visible; display: block; } }
"""


def document(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """A whole page; `title` is text, `body` is HTML, `style` is CSS beside the page's own.

    `script` runs after the body; the policy names its digest, so that no other script can run.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"{_POLICY}; script-src 'sha256-{digest}'" if script else _POLICY
    ending = f"<script>{script}</script>\n" if script else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"{_GENERATOR}\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n{body}\n{ending}</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading and HTML below it; nothing where there is nothing below."""
    inside = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{inside}\n</section>" if inside else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "", numbers: bool = True) -> str:
    """A table of texts whose first column names its rows; the others are numbers unless said otherwise."""
    kind = ' class="number"' if numbers else ""
    caption = f"<caption>{escape(caption)}</caption>" if caption else ""
    first, *rest = head
    cells = f'<th scope="col">{escape(first)}</th>' + "".join(
        f'<th scope="col"{kind}>{escape(name)}</th>' for name in rest
    )
    lines = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td{kind}>{escape(value)}</td>" for value in values)
        + "</tr>"
        for name, *values in rows
    )
    return (
        f'<div class="scroll"><table>{caption}\n<thead><tr>{cells}</tr></thead>\n<tbody>\n{lines}\n</tbody>'
        "</table></div>"
    )


def items(texts: Iterable[str]) -> str:
    """A list of texts; nothing where there are none."""
    lines = "".join(f"<li>{escape(text)}</li>\n" for text in texts)
    return f"<ul>\n{lines}</ul>" if lines else ""


def paragraph(text: str, *, soft: bool = False) -> str:
    kind = ' class="soft"' if soft else ""
    return f"<p{kind}>{escape(text)}</p>"


def folded(title: str, inside: str) -> str:
    """HTML behind a line that opens it."""
    return f"<details>\n<summary>{escape(title)}</summary>\n{inside}\n</details>"


def picture(light: bytes, dark: bytes, *, description: str, caption: str = "") -> str:
    """A PNG for light pages and print, and one for dark screens, both inside the page."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return (
        f'<figure><picture><source media="screen and (prefers-color-scheme: dark)" srcset="{_data(dark)}">'
        f'<img src="{_data(light)}" alt="{escape(description)}"></picture>{below}</figure>'
    )


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def check_place(path: Path) -> None:
    """Refuse (`InputError`) a name that is no page's or a page of others, and a folder that is not there."""
    if path.suffix != ".html":
        raise InputError(f"{path}: the page is one .html file; name it so")
    check_folder_of(path)
    check_file(path)
    if path.is_file() and path.stat().st_size and not _is_ours(path):
        raise InputError(f"{path} is no page of lorafocal, and would be replaced; choose another name or remove it")


def _is_ours(page: Path) -> bool:
    """Whether a page says so in its head."""
    with page.open("rb") as file:
        return _GENERATOR.encode() in file.read(_HEAD_BYTES)


def write_page(path: Path, page: str) -> None:
    """The page in the file `path`; complete or not at all. Raises InputError where it cannot be written."""
    check_place(path)
    try:
        write_atomically(path, page.encode("utf-8", "replace"))
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another place for the page") from error


def write_folder(target: Path, files: Mapping[str, bytes]) -> None:
    """A folder of `files` in the place of `target`; complete or not at all. Raises InputError where it cannot be."""
    try:
        with published(target, replace=True, record=False) as folder:
            for name, content in files.items():
                (folder / name).write_bytes(content)
    except OSError as error:
        raise InputError(f"{target} cannot be written ({error.strerror}); choose another --out") from error
