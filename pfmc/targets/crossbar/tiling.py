"""Where the tiles of a matrix lie: as few tiles as possible, of nearly equal size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]


def split(length: int, limit: int) -> Ints:
    """Edges of ``ceil(length / limit)`` parts, the longer first: int32 ``[parts + 1]``.

    Even parts (aihwkit tiles/array.py splits in the same way) give every partial sum the same
    noise and the same converter range; the number of tiles is the smallest possible.
    """
    parts = -(-length // limit)
    base, longer = divmod(length, parts)
    sizes = [base + 1] * longer + [base] * (parts - longer)
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)


@dataclass(frozen=True)
class Grid:
    """The tiles of one matrix: `row_edges` over its inputs, `column_edges` over its outputs."""

    row_edges: Ints
    column_edges: Ints

    @property
    def down(self) -> int:
        """Tiles along the inputs: partial sums of an output."""
        return len(self.row_edges) - 1

    @property
    def across(self) -> int:
        """Tiles along the outputs: copies of an input."""
        return len(self.column_edges) - 1

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return self.down * self.across

    def table(self) -> dict[str, Ints]:
        """``row0, col0, rows, cols`` of every tile, int32; tiles run along the outputs first."""
        rows, columns = np.diff(self.row_edges), np.diff(self.column_edges)
        return {
            "row0": np.repeat(self.row_edges[:-1], self.across),
            "col0": np.tile(self.column_edges[:-1], self.down),
            "rows": np.repeat(rows, self.across),
            "cols": np.tile(columns, self.down),
        }


def grid(inputs: int, outputs: int, rows: int, columns: int) -> Grid:
    """The tiles of an ``inputs x outputs`` matrix on tiles of ``rows x columns`` pairs."""
    return Grid(split(inputs, rows), split(outputs, columns))


def from_table(table: Mapping[str, npt.NDArray[Any]], inputs: int, outputs: int) -> Grid:
    """The grid a tile table describes."""
    rows, columns = (np.unique(np.asarray(table[k], np.int64)) for k in ("row0", "col0"))
    edges = (np.append(rows, inputs), np.append(columns, outputs))
    return Grid(edges[0].astype(np.int32), edges[1].astype(np.int32))
