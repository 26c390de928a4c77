"""The frame of the HTML pages: one file each, without network, library or server."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from orchestrator.errors import printable

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def frame(title: str, parts: Sequence[str], style: str = "") -> str:
    """Return a page.

    Args:
        title: as text.
        parts: of its body, as HTML; empty ones are left out.
        style: CSS behind that of all pages.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(title)}</title>\n"
        f'<link rel="icon" href="data:,">\n<style>\n{_asset("report.css")}{style}</style>\n</head>\n'
        f"<body>\n<main>\n{chr(10).join(part for part in parts if part)}\n</main>\n"
        f"<script>\n{_asset('report.js')}</script>\n</body>\n</html>\n"
    )


def table(names: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a table as HTML, the first column of which names the rows.

    Args:
        names: of the columns, as text.
        rows: of cells, as text.
    """
    head = "".join(f'<th scope="col">{escaped(name)}</th>' for name in names)
    body = "".join(
        f'<tr><th scope="row">{escaped(first)}</th>{"".join(f"<td>{escaped(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def escaped(text: object) -> str:
    """Return text as HTML that says no more than the text.

    Args:
        text: from anybody.
    """
    return escape(printable(text))


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
