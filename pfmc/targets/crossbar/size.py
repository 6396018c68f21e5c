"""Area, dies, programming time and money of a model on crossbar tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from pfmc.cost import Term
from pfmc.hardware import LayerSummary
from pfmc.quantity import Estimate
from pfmc.targets.crossbar import adc, cells, energy
from pfmc.targets.fabric import money
from pfmc.technology import Technology


def area(layers: Sequence[LayerSummary], technology: Technology) -> Iterator[Term]:
    """Area of all tiles and their periphery, unused rows and columns included; no fabric."""
    t = technology
    parts: dict[str, int] = {}
    for layer in layers:
        for kind, n in cells.parts(layer, t).items():
            parts[kind] = parts.get(kind, 0) + n
    pairs = float(t.integer("array.tile_rows") * t.integer("array.tile_columns"))
    buffered = float(
        parts["crossbar_dac"] * t.integer("dac.bits")
        + 2 * parts["crossbar_frontend"] * t.integer("adc.bits")
    )
    for name, kind, each, text in (
        ("cells", "crossbar_tile", t["array.cell_area"] * pairs, f"{pairs:g} * array.cell_area"),
        ("dac", "crossbar_dac", t["dac.area"], "dac.area"),
        ("frontend", "crossbar_frontend", t["frontend.area"], "frontend.area"),
        ("adc", "crossbar_adc", adc.converter(t).area, "area of a converter"),
        ("sum", "crossbar_shift_add", t["sum.area"], "sum.area"),
    ):
        yield Term(name, each * float(parts[kind]), f"{parts[kind]:,} * {text}")
    yield Term("buffer", t["buffer.area"] * buffered, f"{buffered:,.6g} bits * buffer.area")


def dies(area_m2: Estimate, technology: Technology) -> Estimate:
    """Dies at the reticle limit that hold the tiles."""
    reticle = technology["wafer.reticle_area"]
    each = (math.ceil(a / reticle.typical) for a in (area_m2.low, area_m2.typical, area_m2.high))
    low, typical, high = (float(max(1, n)) for n in each)
    return Estimate(low, typical, high, constants=area_m2.constants | reticle.constants)


def unit_cost(area_m2: Estimate, technology: Technology) -> Estimate:
    """Money for the dies of the tiles, packaged and tested: wafers over dies a wafer and yield."""
    t, count = technology, dies(area_m2, technology)
    wafer = t["wafer.price"] + t["wafer.package_test"]
    defects, diameter = t["wafer.defect_density"], t["wafer.diameter"]
    low, typical, high = (
        n * money.good_die(a / n, w, d, diameter.typical)
        for n, a, w, d in zip(
            *((e.low, e.typical, e.high) for e in (count, area_m2, wafer, defects)), strict=True
        )
    )
    used = wafer.constants | defects.constants | diameter.constants | area_m2.constants
    return Estimate(low, typical, high, wafer.dims, used)


def write_time(layers: Sequence[LayerSummary], dies_: Estimate, technology: Technology) -> Estimate:
    """Time to programme all devices, dies side by side."""
    t = technology
    devices = t["device.per_conductance"] * energy.count(layers, "conductances_total")
    return devices * t["device.write_time"] / (t["device.write_parallel"] * dies_)
