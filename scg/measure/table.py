"""One table, as text, Markdown, HTML and CSV."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Cells as text for people, with a title above and remarks below.

    >>> print(Table("Sizes", ("what", "size"), (("a", "1"), ("b", "20")), ("in metres",)))
    Sizes
    <BLANKLINE>
    what  size
    ────  ────
    a        1
    b       20
    <BLANKLINE>
    in metres
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        lines = [self.title]
        if self.rows:
            widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
            lines += ["", self._line(self.header, widths), "  ".join("─" * width for width in widths)]
            lines += [self._line(row, widths) for row in self.rows]
        if self.notes:
            lines += ["", *self.notes]
        return "\n".join(lines)

    def _line(self, row: Sequence[str], widths: Sequence[int]) -> str:
        """The first column to the left, numbers to the right."""
        first, *rest = row
        return "  ".join(
            [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]
        ).rstrip()

    def to_markdown(self) -> str:
        """GitHub-flavoured."""

        def line(row: Sequence[str]) -> str:
            return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"

        rule = f"|{' --- |' * len(self.header)}"
        return "\n".join([f"**{self.title}**", "", line(self.header), rule, *map(line, self.rows), "", *self.notes])

    def to_html(self) -> str:
        """The table alone, without any style."""

        def line(row: Sequence[str], tag: str) -> str:
            return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row)}</tr>"

        body = "".join(line(row, "td") for row in self.rows)
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        caption = f"<caption>{html.escape(self.title)}</caption>"
        return f"<table>{caption}<thead>{line(self.header, 'th')}</thead><tbody>{body}</tbody></table>{notes}"


def to_csv(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Comma-separated, one line a row."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def page(title: str, *parts: str) -> str:
    """A whole HTML file that needs no network."""
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:75em;padding:0 1em}"
        "table{border-collapse:collapse;margin:1.5em 0}caption{text-align:left;font-weight:600;padding:.3em 0}"
        "td,th{padding:.25em .8em;text-align:right;border-bottom:1px solid #8884}"
        "td:first-child,th:first-child{text-align:left}:root{color-scheme:light dark}"
    )
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{style}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"
