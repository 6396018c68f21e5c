"""The parts of a crossbar layer and how many of each: netlist module and area alike."""

from __future__ import annotations

from typing import Final

from pfmc.hardware import LayerSummary
from pfmc.netlist import Cell, Module, Port
from pfmc.targets.crossbar.technology import setting
from pfmc.technology import Technology

SUM_BITS: Final = 32
"""Width of an accumulated output."""


def parts(layer: LayerSummary, technology: Technology) -> dict[str, int]:
    """Physical parts of the layer's tiles, unused rows and columns included.

    ``crossbar_tile`` (tile_rows x tile_columns differential pairs), ``crossbar_dac`` (one a row),
    ``crossbar_frontend`` (regulator and integrator, one a column), ``crossbar_adc`` (one per
    ``adc.share`` columns), ``crossbar_shift_add`` (joins passes or bits, one a converter) and
    ``crossbar_accumulator`` (scales a tile's outputs and adds them up, one a converter).
    """
    tiles = layer.tiles
    rows, columns = technology.integer("array.tile_rows"), technology.integer("array.tile_columns")
    converters = -(-columns // technology.integer("adc.share")) * tiles
    return {
        "crossbar_tile": tiles,
        "crossbar_dac": tiles * rows,
        "crossbar_frontend": tiles * columns,
        "crossbar_adc": converters,
        "crossbar_shift_add": converters,
        "crossbar_accumulator": converters,
    }


def definition(layer: LayerSummary, technology: Technology) -> Module:
    """Ports ``x`` (an input code) and ``y`` (an accumulated output), and the counted cells.

    A port carries one number of the stream at a time, as in `pfmc.targets.fabric.assemble`.
    """
    bits, samples = technology.integer("dac.bits"), technology.integer("adc.bits")
    parameters: dict[str, dict[str, str | int | float]] = {
        "crossbar_tile": {
            "rows": technology.integer("array.tile_rows"),
            "columns": technology.integer("array.tile_columns"),
        },
        "crossbar_dac": {"bits": bits, "scheme": setting(technology, "dac.scheme")},
        "crossbar_frontend": {"passes": technology.integer("read.passes")},
        "crossbar_adc": {"bits": samples, "share": technology.integer("adc.share")},
        "crossbar_shift_add": {"bits": 2 * samples},
        "crossbar_accumulator": {"bits": SUM_BITS},
    }
    ports = (
        Port("x", "in", bits),
        Port("y", "out", SUM_BITS),
    )
    cells = (Cell(k, n, parameters[k]) for k, n in parts(layer, technology).items())
    return Module(layer.name, ports, cells=tuple(cells))
