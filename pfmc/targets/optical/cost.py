"""The cost report of a model on optical tiles and their electronic fabric."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from pfmc.cost import CostReport, Metric, Term, ratio, sources, total
from pfmc.errors import UsageError
from pfmc.hardware import FabricOp, LayerSummary, Workload
from pfmc.quantity import Estimate
from pfmc.targets import fabric
from pfmc.targets.fabric import FabricCost, money
from pfmc.targets.optical import energy, geometry, size, tiling, validation
from pfmc.targets.optical.technology import writer
from pfmc.technology import Technology

CLOCKED: Final = ("partial_sums",)
"""Area terms beside the fabric's that draw clock and leakage power as digital logic does; the rest
of a converter's power is in its energy per sample."""


def report(
    layers: Sequence[LayerSummary], ops: Sequence[FabricOp],
    technology: Technology, workload: Workload,
) -> CostReport:  # fmt: skip
    """The cost report; every metric with low, typical and high, its terms and constants.

    Raises:
        UsageError: the model has no fixed linear.
    """
    if not layers:
        raise UsageError("the model has no fixed linear: there is nothing to write into glass")
    metrics = {m.key: m for m in _metrics(layers, ops, technology, workload)}
    products = energy.used(layers, "macs")
    optics = sum((t.value for t in energy.terms(layers, technology)), start=Estimate(0.0, 0.0, 0.0))
    rows = validation.rows(technology, metrics["energy__mac"].value, optics * (1.0 / products))
    return CostReport(
        "optical", technology.name, _workload(workload), metrics,
        sources(metrics.values(), technology), rows, validation.notes(layers, technology),
    )  # fmt: skip


def _workload(workload: Workload) -> str:
    users = "filling the pipeline" if workload.users is None else str(workload.users)
    return f"{workload.kind}, context {workload.context}, users {users}"


@dataclass(frozen=True)
class Timing:
    """How positions flow: seconds through everything, between two of them, and as served.

    `served` is longer than `interval` where fewer users are served than the pipeline holds.
    """

    latency: Metric
    interval: Estimate
    served: Estimate


def flow(
    layers: Sequence[LayerSummary], ops: Sequence[FabricOp],
    technology: Technology, workload: Workload,
) -> Timing:  # fmt: skip
    """Latency of a position and the interval of the slowest stage."""
    digital = fabric.cost(ops, technology, workload)
    latency = total("latency__token", [*latency_terms(layers, ops, technology), *digital.latency])
    interval = symbol_time(technology).at_least(digital.interval)
    if workload.users is None:
        return Timing(latency, interval, interval)
    return Timing(latency, interval, interval.at_least(latency.value / float(workload.users)))


def _metrics(
    layers: Sequence[LayerSummary], ops: Sequence[FabricOp],
    technology: Technology, workload: Workload,
) -> Iterator[Metric]:  # fmt: skip
    time = flow(layers, ops, technology, workload)
    filled = max(1, math.floor((time.latency.value / time.interval).typical))
    digital = fabric.cost(ops, technology, replace(workload, users=workload.users or filled))
    parts = [*size.electronics(layers, technology), *digital.area]
    area = total("area__total", parts)
    clocked = total("area__total", [p for p in parts if p.name in CLOCKED or "fabric." in p.name])
    static = fabric.static_energy(technology, clocked.value, time.served)
    token = total("energy__token", [*energy.terms(layers, technology), *digital.energy, *static])
    yield from (time.latency, area, token)
    yield from _rates(token.value, time, workload)
    products = energy.used(layers, "macs")
    yield ratio("energy__mac", token.value / products, f"energy__token / {products:,.6g} products")
    yield from _matter(layers, area.value, digital, technology)


def symbol_time(technology: Technology) -> Estimate:
    """Seconds between two vectors of one layer: each converter reads its receivers in turn."""
    return technology["adc.share"] / technology["adc.rate"]


def latency_terms(
    layers: Sequence[LayerSummary], ops: Sequence[FabricOp], technology: Technology
) -> Iterator[Term]:
    """Time of one position through the optical layers on the longest path.

    The mean layer times the number of fixed linears in sequence.
    """
    t, steps = technology, float(fabric.linears_in_sequence(ops, len(layers)))
    text = f"{steps:g} linears in sequence"
    yield Term("converters", (t["dac.latency"] + t["adc.latency"]) * steps,
               f"{text} * (dac.latency + adc.latency)")  # fmt: skip
    yield Term("symbol", symbol_time(t) * steps, f"{text} * adc.share / adc.rate")
    flight = t["optics.index"] / t["physics.light"] * steps
    depth = _mean([_depth(layer, t) for layer in layers])
    yield Term("flight.glass", flight * depth, f"{text} * mean depth * optics.index / c")
    yield Term("flight.path", t["coupling.path"] / t["physics.light"] * steps,
               f"{text} * coupling.path / c")  # fmt: skip
    grids = [tiling.grid(layer.inputs, layer.outputs, t) for layer in layers]
    stages = sum(math.ceil(math.log2(g.rows)) for g in grids) / len(grids)
    yield Term("partial_sums", t["fabric.clock"].inverse() * (stages * steps),
               f"{text} * {stages:.4g} adder stages / fabric.clock")  # fmt: skip


def _depth(layer: LayerSummary, technology: Technology) -> Estimate:
    grid = tiling.grid(layer.inputs, layer.outputs, technology)
    rows, cols, _ = next(grid.shapes())
    return geometry.tile(rows, cols, technology).depth_m


def _mean(values: Sequence[Estimate]) -> Estimate:
    return sum(values, start=Estimate(0.0, 0.0, 0.0)) * (1.0 / len(values))


def _rates(token: Estimate, time: Timing, workload: Workload) -> Iterator[Metric]:
    latency = time.latency.value
    yield ratio(
        "throughput__aggregate", time.served.inverse(),
        "1 / max(adc.share / adc.rate, slowest fabric unit), or users / latency__token if less",
    )  # fmt: skip
    yield ratio("users__pipeline", latency / time.interval, "latency__token / interval")
    yield ratio("power__total", token / time.served, "energy__token * throughput__aggregate")
    if workload.kind == "encode":
        positions = float(workload.context)
        whole = latency + time.interval * (positions - 1.0)
        yield ratio("latency__inference", whole, "latency__token + (context - 1) * interval")
        yield ratio("energy__inference", token * positions, "energy__token * context")
        yield ratio("throughput__user", positions * whole.inverse(), "context / latency__inference")
    else:
        yield ratio("throughput__user", latency.inverse(), "1 / latency__token")


def _matter(
    layers: Sequence[LayerSummary], area: Estimate, digital: FabricCost, technology: Technology
) -> Iterator[Metric]:
    tiles, t = size.shapes(layers, technology), technology
    pixels = size.over_tiles(tiles, t, lambda g: g.pixels)
    footprint = size.over_tiles(tiles, t, lambda g: g.area_m2)
    volume = size.over_tiles(tiles, t, lambda g: g.volume_m3)
    yield total("volume__optics", [Term("tiles", volume, "sum over tiles of side² * depth")])
    deepest = max((geometry.tile(*s, t).depth_m for s in tiles), key=lambda d: d.typical)
    yield ratio("depth__optics", deepest, "(planes + 1) * gap of the largest tile")
    phases = Term("pixels", pixels * t["plane.phase_bits"], "phase pixels * plane.phase_bits")
    tables = Term("fabric.tables", digital.stored_bits, "numbers stored in the fabric")
    yield total("memory__weights", [phases, tables])
    yield ratio("memory__kv_user", digital.kv_bits_user, "fabric: KV memory at the context")
    chosen = writer(t)
    yield ratio("time__write", size.writing_time(tiles, t, chosen), f"all tiles with {chosen}")
    yield total("dies", [
        Term("glass", size.blocks(footprint, t), "ceil(footprint of all tiles / volume.side²)"),
        Term("electronics", money.dies(area, t), "ceil(area__total / fabric.reticle_area)"),
    ])  # fmt: skip
    yield total("cost__unit", size.unit_cost(tiles, t, area))
    yield ratio("cost__nre", Estimate.exact(0.0, "USD"),
                "no mask depends on the weights: they are written, not printed")  # fmt: skip
