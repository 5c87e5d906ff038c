"""Tables as aligned text and as HTML."""

from __future__ import annotations

import html
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Rows: TypeAlias = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Table:
    """A table of text cells.

    Args:
        rows: The rows, all of the same length.
        titles: Titles of the columns; empty for none.
        numeric: Titles of the columns that are aligned to the right.

    Example:
        >>> table = Table((("weights", "1.5 KiB"), ("buffers", "80 B")), ("what", "size"), frozenset({"size"}))
        >>> print(table.to_text())
          what        size
          weights  1.5 KiB
          buffers     80 B
    """

    rows: Rows
    titles: tuple[str, ...] = ()
    numeric: frozenset[str] = frozenset()

    def to_text(self) -> str:
        """Return the rows as indented lines with aligned cells."""
        rows = [self.titles, *self.rows] if self.titles else self.rows
        right = [number for number, title in enumerate(self.titles) if title in self.numeric]
        return "\n".join(f"  {line}".rstrip() for line in align(rows, right)) if self.rows else "  (none)"

    def to_html(self) -> str:
        """Return an HTML table. Colours are those of the page, so that it is readable in light and dark themes."""
        head = f"<thead>{self._to_row(self.titles, 'th')}</thead>" if self.titles else ""
        return f"<table>{head}<tbody>{''.join(self._to_row(row, 'td') for row in self.rows)}</tbody></table>"

    def _to_row(self, cells: Sequence[str], tag: str) -> str:
        row = ""
        for cell, is_numeric in zip(cells, self._are_numeric(len(cells)), strict=True):
            row += f'<{tag} style="text-align: {"right" if is_numeric else "left"}">{html.escape(cell)}</{tag}>'
        return f"<tr>{row}</tr>"

    def _are_numeric(self, columns: int) -> list[bool]:
        return [title in self.numeric for title in self.titles] or [False] * columns


def align(rows: Sequence[Sequence[str]], right: Collection[int]) -> list[str]:
    """Return rows as lines with aligned cells: to the right in the columns of these numbers, to the left in others."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pads = [str.rjust if number in right else str.ljust for number in range(len(widths))]
    lines = ("  ".join(pad(cell, width) for pad, cell, width in zip(pads, row, widths, strict=True)) for row in rows)
    return [line.rstrip() for line in lines]


def html_section(title: str, table: Table, *, is_open: bool = True) -> str:
    """Return a table in HTML below a title that opens and closes it."""
    state = " open" if is_open else ""
    return f"<details{state}><summary>{html.escape(title)}</summary>{table.to_html()}</details>"
