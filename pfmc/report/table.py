"""One table, four ways to print it: for a terminal, as Markdown, as CSV, as JSON rows."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_ENDLESS: Final = 10_000


@dataclass(frozen=True)
class Table:
    """Rows of text under headings.

    Attributes:
        headings: one a column.
        rows: cells as text; a row shorter than the headings is a section title.
        title: above the table.
        numbers: whether all columns but the first hold numbers, set to the right.
    """

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    numbers: bool = False

    def markdown(self) -> str:
        """A GitHub-flavoured Markdown table."""
        lines = [f"**{self.title}**", ""] if self.title else []
        lines += [_pipes(self.headings), _pipes(["---"] * len(self.headings))]
        for row in self.rows:
            section = (f"**{''.join(row)}**", *self._blank())
            lines.append(_pipes(row if len(row) > 1 else section))
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """Comma-separated values with one line of headings; sections are left out."""
        sink = io.StringIO()
        writer = csv.writer(sink, lineterminator="\n")
        writer.writerow(self.headings)
        writer.writerows(r for r in self.rows if len(r) > 1)
        return sink.getvalue()

    def _blank(self) -> list[str]:
        return [""] * (len(self.headings) - 1)

    def show(self) -> None:
        """Prints it to stdout; without a terminal every row is one line, however long."""
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else _ENDLESS)
        drawn = RichTable(box=None, pad_edge=False)
        for index, heading in enumerate(self.headings):
            right = self.numbers and index > 0
            drawn.add_column(Text(heading), justify="right" if right else "left", overflow="fold")
        for row in self.rows:
            if len(row) > 1:
                drawn.add_row(*map(Text, row))
            else:
                drawn.add_row(*self._blank(), "")
                drawn.add_row(Text("".join(row), "bold"), *self._blank())
        with console.capture() as captured:  # by ourselves: rich exits with 1 at a closed pipe
            if self.title:
                console.print(Text(self.title, "italic"))
            console.print(drawn)
        sys.stdout.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"
