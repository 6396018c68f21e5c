"""What a model in read-only-weight silicon costs: energy, time, area and money."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from pfmc.cost import CostReport, Metric, Term, Validation, ratio, sources, total
from pfmc.hardware import FabricOp, LayerSummary, Workload
from pfmc.quantity import Estimate
from pfmc.targets.fabric import FabricCost, linears_in_sequence, money, static_energy
from pfmc.targets.fabric.cost import cost as fabric_cost
from pfmc.technology import Technology

Count = Callable[[Iterable[LayerSummary], str], float]

NOTES = (
    "Operations of one block that could run side by side are timed one after the other, "
    "except fixed linears that share a requantised input.",
    "Every unit has its own hardware; the clock runs in idle units too.",
    "Wires inside a layer are as long as the layer is wide; traffic between dies is not priced.",
)


@dataclass(frozen=True)
class Timing:
    """How tokens flow: seconds through the whole pipeline, between two tokens, and how many fit."""

    latency: Metric
    interval: Estimate
    users: Estimate
    served: Estimate


def report(
    layers: Sequence[LayerSummary],
    fabric: Sequence[FabricOp],
    technology: Technology,
    workload: Workload,
    validation: tuple[Validation, ...] = (),
) -> CostReport:
    """The cost report; KV memory is laid out for the users served (the pipeline's, if not said)."""
    timing = flow(layers, fabric, technology, workload)
    users = workload.users or max(1, math.floor(timing.users.typical))
    parts = fabric_cost(fabric, technology, replace(workload, users=users))
    area = total("area__total", [*array_area(layers, technology), *parts.area])
    area = _with_io(area, technology)
    energy = total("energy__token", [
        *_energy(layers, technology), *parts.energy,
        *static_energy(technology, area.value, timing.served),
    ])  # fmt: skip
    metrics = [
        energy, area, *_per_inference(energy, timing, workload), *_rates(timing, workload),
        *_derived(layers, parts, energy, timing), *_money(area, technology),
    ]  # fmt: skip
    return CostReport(
        "rom", technology.name, f"{workload.kind}, context {workload.context}, users {users}",
        {m.key: m for m in metrics}, sources(metrics, technology), validation, NOTES,
    )  # fmt: skip


def flow(
    layers: Sequence[LayerSummary], fabric: Sequence[FabricOp], technology: Technology,
    workload: Workload,
) -> Timing:  # fmt: skip
    """Latency of a token, interval of the slowest stage, users in flight."""
    parts = fabric_cost(fabric, technology, workload)
    period = technology["fabric.clock"].inverse()
    depth = technology.number("fabric.depth")
    cycles = [layer.counts["cycles"] + depth for layer in layers]
    steps = linears_in_sequence(fabric, len(layers))
    path = sum(cycles) * steps / max(len(layers), 1)
    term = Term(
        "rom.layers", period * path,
        f"{steps} of {len(layers)} fixed linears in sequence * mean "
        f"{sum(cycles) / max(len(layers), 1):,.6g} cycles / fabric.clock",
    )  # fmt: skip
    latency = total("latency__token", [term, *parts.latency])
    interval = parts.interval.at_least(period * max(cycles, default=0.0))
    users = latency.value / interval
    if workload.users is None:
        return Timing(latency, interval, users, interval)
    served = latency.value / float(workload.users)
    return Timing(latency, interval, users, interval.at_least(served))


def _sum(layers: Iterable[LayerSummary], key: str) -> float:
    return sum(layer.counts[key] for layer in layers)


def _used(layers: Iterable[LayerSummary], key: str) -> float:
    """Of a token: experts count with their share of the tokens."""
    return sum(layer.per_token(key) for layer in layers)


def lane_share(layer: LayerSummary, floor: Estimate) -> Estimate:
    """A lane's energy or area relative to 8 by 8 bits: a fixed part, and a part by width."""
    width = layer.counts["weight_bits"] * layer.counts["input_bits"] / 64.0
    return floor + (floor * -1.0 + 1.0) * width


def _by_width(
    layers: Sequence[LayerSummary], key: str, floor: Estimate, count: Count
) -> Iterable[tuple[str, Estimate]]:
    """Lanes there are or products of a token by (weight, input) width, times `lane_share`."""
    groups: dict[tuple[float, float], list[LayerSummary]] = {}
    for layer in layers:
        width = (layer.counts["weight_bits"], layer.counts["input_bits"])
        groups.setdefault(width, []).append(layer)
    for (weight, x), members in sorted(groups.items()):
        yield f"w{weight:g}a{x:g}", lane_share(members[0], floor) * count(members, key)


def _energy(layers: Sequence[LayerSummary], technology: Technology) -> Iterable[Term]:
    bits = _used(layers, "stored_bits")
    yield Term(
        "rom.read", technology["fabric.energy_rom"] * bits, f"{bits:,.6g} bits * fabric.energy_rom"
    )
    floor = technology["array.lane_energy_floor"]
    for name, products in _by_width(layers, "macs", floor, _used):
        yield Term(
            f"rom.mac.{name}", technology["fabric.energy_mac8"] * products,
            f"products of {name} * fabric.energy_mac8 * (floor + (1 - floor) * width)",
        )  # fmt: skip
    joins, outputs = _used(layers, "joins"), _used(layers, "requantised")
    yield Term(
        "rom.join", technology["fabric.energy_add"] * joins,
        f"{joins:,.6g} sums of tiles * fabric.energy_add",
    )  # fmt: skip
    yield Term(
        "rom.requantise", technology["fabric.energy_mul"] * (4.0 * outputs),
        f"{outputs:,.6g} outputs * 4 * fabric.energy_mul (32 x 32 bits)",
    )  # fmt: skip
    yield from _rescaling(layers, technology)
    moved = sum(_bit_metres(layer, technology) * layer.activity for layer in layers)
    metres = Estimate.exact(moved, "m")
    yield Term(
        "rom.wires", technology["fabric.energy_wire"] * metres,
        f"{moved:,.4g} bit metres * fabric.energy_wire",
    )  # fmt: skip


def _rescaling(layers: Sequence[LayerSummary], technology: Technology) -> Iterable[Term]:
    """Sums of scale groups on their way to the output's: a multiplication or shift, and a sum."""
    sums = _used(layers, "rescales")
    if not sums:
        return
    factors = sum(x.per_token("rescales") * x.counts["rescale_multipliers"] for x in layers)
    yield Term(
        "rom.rescale", technology["fabric.energy_add"] * sums
        + technology["fabric.energy_mul"] * factors,
        f"{sums:,.6g} sums of scale groups * fabric.energy_add + {factors:,.6g} * "
        "fabric.energy_mul (4 of 16 x 16 bits for a free scale, 1/2 for e4m3, 0 for a power of 2)",
    )  # fmt: skip


def _bit_metres(layer: LayerSummary, technology: Technology) -> float:
    """Inputs cross the layer to every column of tiles; partial sums cross it to their join."""
    area = sum(t.value.typical for t in array_area([layer], technology))
    c = layer.counts
    outgoing = (c["joins"] + c["requantised"]) * c["accumulator_bits"]
    return (c["input_values"] * c["input_bits"] + outgoing) * math.sqrt(area)


def array_area(layers: Sequence[LayerSummary], technology: Technology) -> Iterable[Term]:
    """Area of ROM macros, lanes, joins and requantisers, term by term."""
    bits = _sum(layers, "rom_bits")
    yield Term(
        "rom.array", technology["fabric.rom_cell"] / technology["array.bank_efficiency"] * bits,
        f"{bits:,.6g} bits, padding included * fabric.rom_cell / array.bank_efficiency",
    )  # fmt: skip
    placed = technology["fabric.utilisation"].inverse()
    for name, lanes in _by_width(
        layers, "lanes", technology["array.lane_area_floor"], _sum
    ):
        yield Term(
            f"rom.lanes.{name}", technology["fabric.area_mac8"] * lanes * placed,
            f"lanes of {name} * fabric.area_mac8 * (floor + (1 - floor) * width) "
            "/ fabric.utilisation",
        )  # fmt: skip
    adders, requantisers = _sum(layers, "join_adders"), _sum(layers, "requantisers")
    yield Term(
        "rom.join", technology["fabric.area_add"] * adders * placed,
        f"{adders:,.6g} * fabric.area_add / fabric.utilisation",
    )  # fmt: skip
    yield Term(
        "rom.requantise", technology["fabric.area_mul"] * (4.0 * requantisers) * placed,
        f"{requantisers:,.6g} * 4 * fabric.area_mul / fabric.utilisation",
    )  # fmt: skip


def _with_io(area: Metric, technology: Technology) -> Metric:
    io = area.value * technology["array.io_fraction"]
    return total("area__total", [*area.terms, Term("io", io, "area * array.io_fraction")])


def _per_inference(energy: Metric, timing: Timing, workload: Workload) -> list[Metric]:
    if workload.kind != "encode":
        return [timing.latency]
    length = float(workload.context)
    last = timing.interval * (length - 1.0)
    return [
        timing.latency,
        ratio("energy__inference", energy.value * length, "energy__token * context"),
        ratio(
            "latency__inference", timing.latency.value + last,
            "latency__token + (context - 1) * interval of the slowest stage",
        ),
    ]  # fmt: skip


def _rates(timing: Timing, workload: Workload) -> list[Metric]:
    if workload.kind == "encode":
        length = float(workload.context)
        whole = timing.latency.value + timing.interval * (length - 1.0)
        user, text = whole.inverse() * length, "context / latency__inference"
    else:
        user, text = timing.latency.value.inverse(), "1 / latency__token"
    return [
        ratio("throughput__user", user, text),
        ratio("throughput__aggregate", timing.served.inverse(),
              "1 / interval, or users / latency__token where fewer users are served"),
        ratio("users__pipeline", timing.users, "latency__token / interval of the slowest stage"),
    ]  # fmt: skip


def _derived(
    layers: Sequence[LayerSummary], parts: FabricCost, energy: Metric, timing: Timing
) -> list[Metric]:
    macs = _used(layers, "macs")
    stored = Estimate.exact(_sum(layers, "stored_bits"))
    metrics = [
        ratio("power__total", energy.value / timing.served, "energy__token / time per token"),
        ratio("memory__weights", stored + parts.stored_bits, "fixed linears + tables, bits"),
        ratio("memory__kv_user", parts.kv_bits_user, "numbers held * fabric.kv_bits"),
    ]
    if macs:
        metrics.append(ratio("energy__mac", energy.value / macs, f"energy__token / {macs:,.6g}"))
    return metrics


def _money(area: Metric, technology: Technology) -> list[Metric]:
    count = money.dies(area.value, technology)
    return [
        ratio("dies", count, "area__total / fabric.reticle_area, rounded up"),
        money.unit_cost(area.value, technology), money.masks(technology),
    ]  # fmt: skip
