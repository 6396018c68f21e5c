"""How a matrix falls apart into tiles, and how many parts of each kind that needs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pfmc.technology import Technology


@dataclass(frozen=True)
class Grid:
    """Tiles of a matrix ``[inputs, outputs]``: `rows` x `columns` tiles of `height` x `width`.

    Tile number r * columns + c holds inputs from r * height and outputs from c * width; the last
    row and column of tiles may be smaller.
    """

    inputs: int
    outputs: int
    height: int
    width: int

    @property
    def rows(self) -> int:
        """Rows of tiles: tiles that share outputs, whose partial sums are added."""
        return -(-self.inputs // self.height)

    @property
    def columns(self) -> int:
        """Columns of tiles: tiles that share inputs, by optical copies."""
        return -(-self.outputs // self.width)

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return self.rows * self.columns

    def heights(self) -> npt.NDArray[np.int32]:
        """Inputs of each row of tiles, int32 ``[rows]``."""
        starts = np.arange(self.rows, dtype=np.int32) * self.height
        return np.minimum(self.height, self.inputs - starts).astype(np.int32)

    def widths(self) -> npt.NDArray[np.int32]:
        """Outputs of each column of tiles, int32 ``[columns]``."""
        starts = np.arange(self.columns, dtype=np.int32) * self.width
        return np.minimum(self.width, self.outputs - starts).astype(np.int32)

    def shapes(self) -> Iterator[tuple[int, int, int]]:
        """The at most four tile shapes: (inputs, outputs, how many tiles have it)."""
        for height, down in _counts(self.inputs, self.height):
            for width, across in _counts(self.outputs, self.width):
                yield height, width, down * across

    def split(self, matrix: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """Cuts ``[inputs, outputs]`` into ``[tiles, height, width]``, filled up with zeros."""
        padded = np.zeros((self.rows * self.height, self.columns * self.width), matrix.dtype)
        padded[: self.inputs, : self.outputs] = matrix
        cut = padded.reshape(self.rows, self.height, self.columns, self.width)
        return cut.transpose(0, 2, 1, 3).reshape(self.tiles, self.height, self.width)

    def join(self, tiles: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """Puts ``[tiles, height, width]`` together again: the inverse of `split`."""
        grid = tiles.reshape(self.rows, self.columns, self.height, self.width)
        whole = grid.transpose(0, 2, 1, 3).reshape(self.rows * self.height, -1)
        return whole[: self.inputs, : self.outputs]


def _counts(length: int, size: int) -> list[tuple[int, int]]:
    full, rest = divmod(length, size)
    return [(size, full)] * (full > 0) + [(rest, 1)] * (rest > 0)


def grid(inputs: int, outputs: int, technology: Technology) -> Grid:
    """The tiles of a matrix on a technology."""
    height = technology.integer("array.tile_inputs")
    return Grid(inputs, outputs, height, technology.integer("array.tile_outputs"))


def modulators(tiles: Grid, technology: Technology) -> int:
    """Modulated inputs: each feeds up to ``splitter.copies`` tiles by a tree of 1:2 splitters."""
    return tiles.inputs * -(-tiles.columns // technology.integer("splitter.copies"))


def splitter_stages(tiles: Grid, technology: Technology) -> int:
    """1:2 stages between a modulator and a tile."""
    return math.ceil(math.log2(min(tiles.columns, technology.integer("splitter.copies"))))


def counts(tiles: Grid, technology: Technology) -> dict[str, float]:
    """What the cost of a layer needs, per position: samples, partial sums, tiles."""
    driven = modulators(tiles, technology)
    partial = tiles.rows * tiles.outputs
    return {
        "macs": float(tiles.inputs * tiles.outputs),
        "tiles": float(tiles.tiles),
        "dac_samples": float(driven),
        "modulator_samples": float(driven),
        "driven_modes": float(tiles.inputs * tiles.columns),
        "receiver_samples": float(partial),
        "adc_samples": float(partial),
        "partial_sums": float(partial),
    }
