"""The cost report of a model on crossbar tiles and their digital fabric."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from pfmc.cost import CostReport, Metric, Term, ratio, sources, total
from pfmc.errors import UsageError
from pfmc.hardware import FabricOp, LayerSummary, Workload
from pfmc.quantity import Estimate
from pfmc.targets import fabric
from pfmc.targets.crossbar import energy, size, validation
from pfmc.targets.fabric import FabricCost, money
from pfmc.technology import Technology

_NO_MASKS = "no mask depends on the weights: they are programmed after fabrication"


def report(
    layers: Sequence[LayerSummary], ops: Sequence[FabricOp],
    technology: Technology, workload: Workload,
) -> CostReport:  # fmt: skip
    """The cost report; every metric with low, typical and high, its terms and constants.

    Raises:
        UsageError: the model has no fixed linear.
    """
    if not layers:
        raise UsageError("the model has no fixed linear: there is nothing to programme")
    metrics = {m.key: m for m in _metrics(layers, ops, technology, workload)}
    return CostReport(
        "crossbar", technology.name, f"{workload.kind}, context {workload.context}", metrics,
        sources(metrics.values(), technology), validation.rows(technology),
        notes(layers, technology),
    )  # fmt: skip


def _metrics(
    layers: Sequence[LayerSummary], ops: Sequence[FabricOp],
    technology: Technology, workload: Workload,
) -> Iterator[Metric]:  # fmt: skip
    t = technology
    digital = fabric.cost(ops, t, workload)
    steps = fabric.linears_in_sequence(ops, len(layers))
    latency = total("latency__token", [*energy.latency_terms(layers, steps, t), *digital.latency])
    interval = energy.interval(t).at_least(digital.interval)
    filled = max(1, math.floor((latency.value / interval).typical))
    digital = fabric.cost(ops, t, replace(workload, users=workload.users or filled))
    analog = total("area__total", size.area(layers, t))
    logic = total("area__total", digital.area)
    spent = interval if workload.users is None else (
        interval.at_least(latency.value / float(workload.users)))  # fmt: skip
    static = fabric.static_energy(t, logic.value, spent)
    token = total("energy__token", [*energy.terms(layers, t), *digital.energy, *static])
    yield from (latency, token, total("area__total", [*analog.terms, *logic.terms]))
    yield from _rates(token.value, latency.value, interval, workload)
    macs = energy.used(layers, "macs")
    yield ratio("energy__mac", token.value / macs, f"energy__token / {macs:,.6g} products")
    yield from _matter(layers, analog.value, logic.value, digital, t)


def _rates(
    token: Estimate, latency: Estimate, interval: Estimate, workload: Workload
) -> Iterator[Metric]:
    rate = interval.inverse()
    yield ratio("throughput__aggregate", rate, "1 / max(time of a layer, slowest fabric unit)")
    yield ratio("users__pipeline", latency / interval, "latency__token / interval")
    yield ratio("power__total", token * rate, "energy__token * throughput__aggregate")
    if workload.kind == "encode":
        positions = float(workload.context)
        whole = latency + interval * (positions - 1.0)
        yield ratio("latency__inference", whole, "latency__token + (context - 1) * interval")
        yield ratio("energy__inference", token * positions, "energy__token * context")
        yield ratio("throughput__user", positions * whole.inverse(), "context / latency__inference")
    else:
        yield ratio("throughput__user", latency.inverse(), "1 / latency__token")


def _matter(
    layers: Sequence[LayerSummary], analog: Estimate, logic: Estimate,
    digital: FabricCost, technology: Technology,
) -> Iterator[Metric]:  # fmt: skip
    t = technology
    pairs = energy.count(layers, "conductances_total") / 2
    arrays, prices = size.dies(analog, t), [(size.unit_cost(analog, t), "arrays", "wafer")]
    chips = [Term("arrays", arrays, "ceil(area of the tiles / wafer.reticle_area)")]
    if logic.high:
        text = "ceil(area of the fabric / fabric.reticle_area)"
        chips.append(Term("fabric", money.dies(logic, t), text))
        prices.append((money.unit_cost(logic, t).value, "fabric", "fabric.wafer"))
    yield total("dies", chips)
    yield ratio("memory__weights", t["array.weight_bits"] * pairs,
                f"{pairs:,.6g} pairs * array.weight_bits")  # fmt: skip
    yield ratio("memory__kv_user", digital.kv_bits_user, "fabric: KV memory at the context")
    yield ratio("time__write", size.write_time(layers, arrays, t),
                "devices * device.write_time / (device.write_parallel * dies of arrays)")
    yield total("cost__unit", [
        Term(name, value, f"dies * {wafer} price and test / (dies a wafer * Murphy yield)")
        for value, name, wafer in prices
    ])  # fmt: skip
    yield ratio("cost__nre", Estimate.exact(0.0, "USD"), _NO_MASKS)


def notes(layers: Sequence[LayerSummary], technology: Technology) -> tuple[str, ...]:
    """What the report does not cover."""
    t = technology
    side = f"{t.integer('array.tile_rows')} x {t.integer('array.tile_columns')}"
    lost = validation.wire_loss(layers, t)
    devices = energy.count(layers, "conductances_total") * t.number("device.per_conductance")
    return (
        f"Wire resistance (IR drop) is not simulated: on a full {side} tile of the densest layer "
        f"the worst column would lose about {lost:.1%} of its current (interpolated from exact "
        "nodal solves, see wire.loss).",
        f"The arrays stand on dies of {t.number('adc.node') * 1e9:g} nm, the digital fabric on "
        "dies of its own node beside them; the link between them is counted as fabric.hop.",
        "The converter regression is an envelope of the best published converters; a chip of the "
        "HERMES class needs more, see the validation rows.",
        "A layer's tiles are its own: small layers do not share tiles, and unused rows and columns "
        "are counted in area but not in energy.",
        f"Programming takes about {devices * t.number('device.write_energy'):.3g} J once; "
        "refreshing drifted devices, spare columns and stuck devices are not counted.",
        "Leakage and clock are counted for the fabric; the arrays' front ends draw power only "
        "while they read.",
    )
