"""Published chips and designs beside what our formulas give for them; misses are shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from pfmc.cost import Validation
from pfmc.hardware import LayerSummary
from pfmc.quantity import Quantity, unit
from pfmc.targets.crossbar import adc, energy, size
from pfmc.technology import Technology


def rows(technology: Technology) -> tuple[Validation, ...]:
    """HERMES in both modes, ISAAC, PUMA and NeuRRAM."""
    return (
        *_hermes(technology, "hermes1", 1), *_hermes(technology, "hermes4", 4),
        *_isaac(technology), *_neurram(technology),
    )  # fmt: skip


def _row(
    technology: Technology, name: str, key: str, ours_si: float, note: str = ""
) -> Validation:
    q = technology.quantity(f"validation.{key}")
    ours = ours_si / q.unit.factor
    return Validation(name, q.value, ours, q.unit.text, q.source, q.grade, note)


def _design(value: float, text: str) -> Quantity:
    return Quantity("validation", (value,), value, value, unit(text), "validation", "design")


def _hermes(technology: Technology, mode: str, passes: int) -> Iterator[Validation]:
    """One full core read at our constants of this technology; no fabric in it."""
    n, cores = (technology.number(f"validation.hermes.{k}") for k in ("rows", "cores"))
    fraction = technology.number("validation.hermes.mean_fraction")
    t = replace(technology, constants={
        **technology.constants, "read.passes": _design(passes, "1"),
        "array.tile_rows": _design(n, "1"), "array.tile_columns": _design(n, "1"),
    })  # fmt: skip
    core = _core(int(n), t.number("device.g_max") * fraction)
    joules = sum(term.value.typical for term in energy.terms([core], t))
    seconds = energy.interval(t).typical
    note = "whole chip published; ours: converters, cells, front ends and buffers of a full core"
    yield _row(t, f"HERMES {passes}-phase, energy", f"{mode}.energy", joules / n**2, note)
    ops = 2 * n * n / seconds
    yield _row(t, f"HERMES {passes}-phase, rate of 64 cores", f"{mode}.rate", ops * cores,
               "dac.clock is derived from the 1-phase rate")  # fmt: skip
    if f"validation.{mode}.density" in t.constants:
        square = sum(term.value.typical for term in size.area([core], t))
        yield _row(t, "HERMES 1-phase, density", f"{mode}.density", ops / square,
                   "published over the whole chip, ours over the cores")  # fmt: skip


def _core(n: int, pair_siemens: float) -> LayerSummary:
    """A full tile of Gaussian weights and inputs of half the range on average."""
    counts = {
        "macs": n * n, "tiles": 1, "dac_samples": n, "adc_samples": n, "partial_sums": n,
        "row_tiles": 1, "conductances_total": 2 * n * n, "read_siemens": n * n * pair_siemens / 2,
    }  # fmt: skip
    means = {"mean_conductance_siemens": pair_siemens / 2}
    return LayerSummary("core", n, n, 1, {k: float(v) for k, v in counts.items()}, means)


def _isaac(technology: Technology) -> Iterator[Validation]:
    """128 x 128 cells of 2 bits, 8 a weight, 16 input bits one after the other, 32 nm."""
    t = technology
    v = {
        k.removeprefix("validation.isaac."): q.si for k, q in t.constants.items()
        if k.startswith("validation.isaac.")
    }  # fmt: skip
    e_pj, a_um2 = adc.survey(t, 8.0, v["adc_rate"], v["node"] * 1e9)
    readings, products = v["rows"] * v["cycles"], v["rows"] ** 2 / v["slices"]
    half_on = v["rows"] ** 2 * v["cell"] / 4 * v["voltage"] ** 2 * v["pulse"] * v["cycles"]
    numbers = v["rows"] * v["cycles"] * (1 + 1 / v["slices"])
    joules = (
        readings * (e_pj * 1e-12 + v["dac_energy"] + v["sum_energy"])
        + half_on + numbers * v["buffer_energy"]
    )  # fmt: skip
    note = "our formulas at ISAAC's constants; no router, no chip links, no sigmoid"
    yield _row(t, "ISAAC, energy of a 16-bit product", "isaac.energy", joules / products, note)
    yield _row(t, "ISAAC, 8-bit converter, energy", "isaac.adc_energy", e_pj * 1e-12)
    yield _row(t, "ISAAC, 8-bit converter, area", "isaac.adc_area", a_um2 * 1e-12,
               "the regression's area is pessimistic here")  # fmt: skip
    yield _row(t, "PUMA, energy of a 16-bit product", "puma.energy", joules / products,
               "ISAAC's constants: PUMA keeps its array; no core instructions, no network")


def _neurram(technology: Technology) -> Iterator[Validation]:
    t = technology
    bits, rate, node = (t.number(f"validation.neurram.{k}") for k in ("bits", "rate", "node"))
    e_pj, a_um2 = adc.survey(t, bits, rate, node * 1e9)
    note = "the regression at 130 nm; actions a conversion takes in the library are not known"
    yield _row(t, "NeuRRAM, conversion, energy", "neurram.conversion", e_pj * 1e-12, note)
    yield _row(t, "NeuRRAM, converter, area", "neurram.area", a_um2 * 1e-12, note)


def wire_loss(layers: Sequence[LayerSummary], technology: Technology) -> float:
    """Largest share of a column current lost in the wires of a full tile, by measured solves.

    The load n² R G (cells a side, wire resistance of a cell, mean conductance) decides; between
    the solved sizes the loss is interpolated, beyond the largest it is that of the largest.
    """
    conductance = max(
        (layer.diagnostics["mean_conductance_siemens"] for layer in layers), default=0.0
    )
    cells = technology.integer("array.tile_rows") * technology.integer("array.tile_columns")
    load = cells * technology.number("array.wire_resistance") * conductance
    loads, losses = (technology.quantity(f"wire.{k}").values for k in ("load", "loss"))
    return float(np.interp(load, loads, losses))
