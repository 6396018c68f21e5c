"""The netlist module of an optical layer: kinds of parts and how many of each."""

from __future__ import annotations

from pfmc.hardware import LayerSummary
from pfmc.netlist import Cell, Module, Port
from pfmc.targets.optical import geometry, tiling
from pfmc.targets.optical.technology import detection
from pfmc.technology import Technology

_SUM_BITS = 32


def definition(layer: LayerSummary, technology: Technology) -> Module:
    """Ports ``x`` (an input code) and ``y`` (an accumulated output) and the counted parts.

    A port carries one number of the stream at a time, as in `pfmc.targets.fabric.assemble`.

    Cells: ``optical_dac``, ``optical_modulator`` (signed field amplitude), ``optical_splitter``
    (1:2 stages), ``optical_tile`` (written glass, one kind per shape), ``optical_receiver``
    (balanced homodyne pair), ``optical_adc``, ``optical_accumulator`` (partial sums, digital).
    """
    tiles = tiling.grid(layer.inputs, layer.outputs, technology)
    cells = [*_inputs(tiles, technology), *_tiles(tiles, technology), *_outputs(tiles, technology)]
    ports = (
        Port("x", "in", technology.integer("dac.bits")),
        Port("y", "out", _SUM_BITS),
    )
    return Module(layer.name, ports, cells=tuple(cells))


def _inputs(tiles: tiling.Grid, technology: Technology) -> list[Cell]:
    driven = tiling.modulators(tiles, technology)
    photons, _ = detection(technology)
    splitters = tiles.inputs * tiles.columns - driven
    cells = [
        Cell("optical_dac", driven, {"bits": technology.integer("dac.bits")}),
        Cell("optical_modulator", driven, {"photons_per_copy": photons.si}),
    ]
    return cells + ([Cell("optical_splitter", splitters)] if splitters else [])


def _tiles(tiles: tiling.Grid, technology: Technology) -> list[Cell]:
    return [
        Cell(
            "optical_tile", count,
            {"inputs": rows, "outputs": cols, "planes": geometry.planes(rows, cols, technology)},
        )
        for rows, cols, count in tiles.shapes()
    ]  # fmt: skip


def _outputs(tiles: tiling.Grid, technology: Technology) -> list[Cell]:
    receivers = tiles.rows * tiles.outputs
    return [
        Cell("optical_receiver", receivers),
        Cell("optical_adc", adcs(tiles, technology), {"bits": technology.integer("adc.bits")}),
        Cell("optical_accumulator", adcs(tiles, technology), {"bits": _SUM_BITS}),
    ]


def adcs(tiles: tiling.Grid, technology: Technology) -> int:
    """Analog-to-digital converters: each reads ``adc.share`` receivers in turn."""
    return -(-tiles.rows * tiles.outputs // technology.integer("adc.share"))
