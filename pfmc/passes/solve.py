"""Rounds a model on calibration data before it is quantised: one layer after the other.

Called where the recipe wants layers to make up for those before them, or rounding to be learned;
other searches round each layer alone, when its codes are read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pfmc.hardware import LayerStatistics, Limits, QuantisedMatrix
from pfmc.passes.quantise import Quantise

if TYPE_CHECKING:
    from pfmc.distill.sequential import Convert

Feeds = Mapping[str, npt.NDArray[Any]]


@dataclass
class Shelf(Mapping[str, Callable[[], QuantisedMatrix]]):
    """Rounded matrices in a temporary folder, so that memory holds one at a time."""

    folder: tempfile.TemporaryDirectory[str] = field(
        default_factory=lambda: tempfile.TemporaryDirectory(prefix="pfmc-rounded-")
    )
    held: dict[str, QuantisedMatrix] = field(default_factory=dict)

    def put(self, layer: str, matrix: QuantisedMatrix) -> None:
        """Takes a matrix; a later one of the same layer replaces it."""
        index = list(self.held).index(layer) if layer in self.held else len(self.held)
        np.savez(self._path(index), codes=matrix.codes, scale=matrix.scale)
        none = np.zeros((0, 0))
        self.held[layer] = replace(
            matrix, codes=none.astype(np.int8), scale=none.astype(np.float32)
        )

    def _path(self, index: int) -> Path:
        return Path(self.folder.name) / f"{index}.npz"

    def __getitem__(self, layer: str) -> Callable[[], QuantisedMatrix]:
        held = self.held[layer]
        path = self._path(list(self.held).index(layer))

        def read(folder: object = self.folder) -> QuantisedMatrix:  # which lives as long as this
            with np.load(path) as arrays:
                return replace(held, codes=arrays["codes"], scale=arrays["scale"])

        return read

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


def solve(
    model: ir.Model,
    options: Quantise,
    limits: Limits,
    feeds: Iterable[Feeds],
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Mapping[str, LayerStatistics], Shelf]:
    """Rounds every fixed linear of a CANONICAL model on `feeds`.

    Args:
        model: at stage CANONICAL; it stays as it is.
        options: the quantise pass that will run.
        limits: of the target.
        feeds: calibration data, graph inputs by name.
        seed: of what is drawn.
        progress: takes a line a layer.

    Returns:
        the float model's statistics, and the matrices for `Context.matrices`.
    """
    from pfmc.distill.learned import Learning
    from pfmc.distill.sequential import Order
    from pfmc.distill.sequential import solve as run

    options.check_inputs(limits)
    shelf = Shelf()
    order = Order(
        lambda layer: options.plan_of(layer, limits),
        _converters(options, limits),
        Learning(iterations=options.iterations, seed=seed),
    )
    return run(model, feeds, order, shelf.put, progress), shelf


def _converters(options: Quantise, limits: Limits) -> Callable[[LayerStatistics], Convert | None]:
    from pfmc.distill.sequential import static_converter, token_converter

    top = float(2 ** (limits.input_bits - 1) - 1)
    if options.per_token(limits):
        token = token_converter(top)
        return lambda _: token

    def static(seen: LayerStatistics) -> Convert:
        reach = options.range_of(seen, top)
        return static_converter(top, reach / top if reach > 0 else 1.0)

    return static
