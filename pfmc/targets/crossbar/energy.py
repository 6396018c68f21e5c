"""Energy and time of a position on crossbar tiles, term by term.

A reading takes `cycles`: the passes that part signs (``read.passes``), times the bits of an input
where they are applied one after the other. All signs' passes together move the charge of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from pfmc.cost import Term
from pfmc.hardware import LayerSummary
from pfmc.quantity import Estimate
from pfmc.targets.crossbar import adc
from pfmc.targets.crossbar.technology import setting
from pfmc.technology import Technology


def count(layers: Sequence[LayerSummary], key: str) -> float:
    """Sum of ``counts[key]`` over the layers."""
    return sum(layer.counts[key] for layer in layers)


def used(layers: Sequence[LayerSummary], key: str) -> float:
    """Sum of ``counts[key]`` of a token: experts count with their share of the tokens."""
    return sum(layer.per_token(key) for layer in layers)


def serial(technology: Technology) -> bool:
    """Whether input bits are applied one after the other."""
    return setting(technology, "dac.scheme") == "bit_serial"


def cycles(technology: Technology) -> float:
    """Array readings, and so conversions of every column, per position."""
    bits = technology.integer("dac.bits") - 1 if serial(technology) else 1
    return float(technology.integer("read.passes") * bits)


def pulse(technology: Technology) -> Estimate:
    """Seconds of the longest pulse: one clock per code, or per bit."""
    steps = 1 if serial(technology) else 2 ** (technology.integer("dac.bits") - 1) - 1
    return technology["dac.clock"].inverse() * float(steps)


def cycle_time(technology: Technology) -> Estimate:
    """Seconds of one reading: pulse and settling, or the shared converters if they are slower."""
    converting = technology["adc.share"] / technology["adc.rate"]
    return (pulse(technology) + technology["read.settle"]).at_least(converting)


def interval(technology: Technology) -> Estimate:
    """Seconds between two positions through the same tiles."""
    return cycle_time(technology) * cycles(technology)


def terms(layers: Sequence[LayerSummary], technology: Technology) -> Iterator[Term]:
    """Energy of one position, without the fabric."""
    t, n = technology, cycles(technology)
    rows, columns = used(layers, "dac_samples"), used(layers, "adc_samples")
    converter = adc.converter(t)
    yield _cells(layers, t)
    yield Term("dac", t["dac.energy"] * (rows * n), f"{rows:,.6g} rows * {n:g} * dac.energy")
    yield Term(
        "frontend", t["frontend.power"] * cycle_time(t) * (columns * n),
        f"{columns:,.6g} columns * {n:g} * cycle time * frontend.power",
    )  # fmt: skip
    yield Term(
        "adc", converter.energy * (columns * n),
        f"{columns:,.6g} columns * {n:g} * {converter.formula}",
    )  # fmt: skip
    yield Term("sum", t["sum.energy"] * (columns * n), f"{columns:,.6g} * {n:g} * sum.energy")
    yield from _digital(rows, used(layers, "partial_sums"), t)


def _cells(layers: Sequence[LayerSummary], technology: Technology) -> Term:
    """V² times charge time times the conductances that the layer really holds."""
    t = technology
    square = t["read.voltage"].power(2) * pulse(t)
    spread = t["device.g_max"] * (1.0 / t["device.g_max"].typical)
    if serial(t):
        bits = (t.integer("dac.bits") - 1) / 2.0
        siemens = sum(
            layer.per_token("conductances_total") * layer.diagnostics["mean_conductance_siemens"]
            for layer in layers
        ) * bits  # fmt: skip
        text = f"half of the bits * {siemens / bits:.4g} S of all devices"
    else:
        siemens = used(layers, "read_siemens")
        text = f"{siemens:.4g} S of all devices weighted by their mean input"
    unit = Estimate.exact(siemens, "S")
    ones = Estimate(spread.low, spread.typical, spread.high, constants=spread.constants)
    return Term("cells", square * unit * ones, f"{text} * read.voltage² * pulse")


def _digital(rows: float, sums: float, technology: Technology) -> Iterator[Term]:
    t = technology
    bits = rows * t.integer("dac.bits") + sums * t.integer("adc.bits")
    yield Term("buffer", t["buffer.energy"] * (2 * bits),
               f"{bits:,.6g} bits written and read * buffer.energy")  # fmt: skip
    yield Term("wire", t["fabric.energy_wire"] * t["fabric.hop"] * bits,
               f"{bits:,.6g} bits * fabric.energy_wire * fabric.hop")  # fmt: skip
    yield Term("partial_sums", (t["fabric.energy_mul"] + t["fabric.energy_add"]) * sums,
               f"{sums:,.6g} partial sums * (fabric.energy_mul + fabric.energy_add)")  # fmt: skip


def latency_terms(
    layers: Sequence[LayerSummary], steps: int, technology: Technology
) -> Iterator[Term]:
    """Time of a position through `steps` layers in series; a layer's tiles work in parallel."""
    t, n, text = technology, float(steps), f"{steps} linears in sequence"
    yield Term("reading", interval(t) * n, f"{text} * {cycles(t):g} readings * cycle time")
    yield Term("conversion", t["adc.share"] / t["adc.rate"] * n, f"{text} * adc.share / adc.rate")
    depths = [1 + math.ceil(math.log2(layer.counts["row_tiles"])) for layer in layers]
    mean = sum(depths) / len(depths)
    yield Term("partial_sums", t["fabric.clock"].inverse() * (mean * n),
               f"{text} * {mean:.4g} stages (scale and adder tree) / fabric.clock")  # fmt: skip
