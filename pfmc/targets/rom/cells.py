"""The netlist module of a read-only-weight layer: its ROM macros, lanes and requantisers."""

from __future__ import annotations

from pfmc import formats
from pfmc.hardware import LayerSummary
from pfmc.netlist import Cell, Module, Port
from pfmc.targets.rom.lower import MULTIPLIER_BITS
from pfmc.technology import Technology


def definition(layer: LayerSummary, technology: Technology) -> Module:
    """Ports carry one number of the stream: an input code in, a word out.

    The body depends on the layer's shape and widths alone, so layers of one shape share it.
    """
    c = {k: int(v) for k, v in layer.counts.items()}
    rows = technology.integer("array.tile_inputs")
    widths = {"weight_bits": c["weight_bits"], "input_bits": c["input_bits"]}
    cells = [
        Cell("rom_macro", c["tiles"], {"words": min(rows, layer.inputs),
                                       "word_bits": c["word_bits"]}),
        Cell("mac_lane", c["lanes"], {**widths, "accumulator_bits": c["accumulator_bits"]}),
        Cell("join_adder", c["join_adders"], {"bits": c["accumulator_bits"]}),
        Cell("requantiser", c["requantisers"], {"multiplier_bits": MULTIPLIER_BITS}),
    ]  # fmt: skip
    form = formats.NAMES[c["format"]]
    kind = "" if form == "int" else f"_{form}"
    return Module(
        f"rom_{layer.inputs}x{layer.outputs}_w{c['weight_bits']}{kind}",
        (
            Port("x", "in", c["input_bits"]),
            Port("y", "out", technology.integer("fabric.word_bits")),
        ),
        cells=tuple(cell for cell in cells if cell.count),
    )
