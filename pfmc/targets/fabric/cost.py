"""What the dynamic operations of a model cost: energy, time, area and KV memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from pfmc.cost import Term
from pfmc.hardware import FabricOp, Workload
from pfmc.quantity import Estimate
from pfmc.targets.fabric.keys import BESIDE, PER_CONTEXT, at
from pfmc.technology import Technology

_ZERO = Estimate(0.0, 0.0, 0.0)

OPERATIONS: Final = {
    "macs8": "mac8", "macs16": "mac16", "exps": "exp", "adds": "add", "muls": "mul",
    "table_reads": "table", "roots": "root", "control_ops": "control",
}  # fmt: skip
"""Work key -> the unit that does it (``fabric.energy_<unit>``, ``fabric.area_<unit>``)."""

MOVES: Final = {
    "kv_read_values": ("fabric.energy_sram", "fabric.kv_bits"),
    "kv_write_values": ("fabric.energy_sram", "fabric.kv_bits"),
    "adapter_read_values": ("fabric.energy_sram", "fabric.kv_bits"),
    "embedding_values": ("fabric.energy_rom", "fabric.embedding_bits"),
    "moved_values": ("fabric.energy_wire", "fabric.word_bits"),
}
"""Work key -> energy constant per bit (per bit and length for wires) and bits of one number."""

UNTIMED: Final = frozenset({"wiring", "table", "control"})
"""Kinds that add no time: they run beside the data path, or are only wires."""


@dataclass(frozen=True)
class FabricCost:
    """Cost of the fabric under one workload.

    Attributes:
        energy: J per token (per position of an encoder), one term per kind and work key.
        latency: s per token with every operation in sequence, one term per kind.
        area: m², one term per kind, plus stored numbers (ROM) and KV memory (SRAM).
        kv_bits_user: KV memory of one user at the workload's context; exact.
        stored_bits: fixed numbers kept in the fabric (embedding tables, norm weights); exact.
        interval: s between two tokens that one unit after the other can take in: the slowest unit.
        stages: operations in sequence that take time: the fabric's part of the pipeline.
        cycles: cycles of one token through all of them.
    """

    energy: tuple[Term, ...]
    latency: tuple[Term, ...]
    area: tuple[Term, ...]
    kv_bits_user: Estimate
    stored_bits: Estimate
    interval: Estimate
    stages: int
    cycles: float


def cost(ops: Sequence[FabricOp], technology: Technology, workload: Workload) -> FabricCost:
    """The cost of `ops` for one token at `workload.context`.

    Every operation is a unit of its own: ``fabric.vector_lanes`` numbers a cycle, or for attention
    ``fabric.attention_positions`` positions of all heads a cycle, after ``fabric.depth`` cycles.
    KV memory is laid out for `workload.users` (1 if None). Leakage and clock depend on the whole
    die: see `static_energy`.
    """
    context = float(workload.context)
    period = technology["fabric.clock"].inverse()
    timed = [
        (op, cycles(op, technology, context)) for op in ops
        if op.kind not in UNTIMED and not op.work.get(BESIDE)
    ]  # fmt: skip
    slowest = max((c for _, c in timed), default=0.0)
    kv_values = sum(at(op, "kv_held_values", context) for op in ops)
    kv_bits = technology["fabric.kv_bits"] * kv_values
    stored = sum(op.work.get("stored_values", 0.0) for op in ops)
    held = sum(op.work.get("adapter_held_values", 0.0) for op in ops)
    return FabricCost(
        energy=tuple(_energy(ops, technology, context)),
        latency=tuple(_latency(timed, period)),
        area=(
            *_area(ops, technology), *_memories(technology, stored, kv_bits, workload),
            *_adapters(technology, held),
        ),
        kv_bits_user=kv_bits,
        stored_bits=technology["fabric.embedding_bits"] * stored,
        interval=period * slowest,
        stages=len(timed),
        cycles=sum(c for _, c in timed),
    )


def cycles(op: FabricOp, technology: Technology, context: float) -> float:
    """Clock cycles of one operation for one position at `context` positions."""
    depth = technology.number("fabric.depth")
    if op.kind == "attention":
        positions = at(op, "exps", context) / op.work["heads"]
        return math.ceil(positions / technology.number("fabric.attention_positions")) + depth
    lanes = technology.number(_lanes_key(op))
    most = max((at(op, key, context) for key in (*OPERATIONS, "embedding_values")), default=0.0)
    return math.ceil(most / lanes) + depth


def _lanes_key(op: FabricOp) -> str:
    wide = op.kind in ("product", "side_path")
    return "fabric.product_lanes" if wide else "fabric.vector_lanes"


def _energy(ops: Sequence[FabricOp], technology: Technology, context: float) -> Iterable[Term]:
    for kind in sorted({op.kind for op in ops}):
        for key in (*OPERATIONS, *MOVES):
            count = sum(at(op, key, context) for op in ops if op.kind == kind)
            if count:
                each, formula = _price(key, technology)
                text = f"{count:,.6g} {key} at context {context:g} * {formula}"
                yield Term(f"fabric.{kind}.{key}", each * count, text)


def _price(key: str, technology: Technology) -> tuple[Estimate, str]:
    if key in OPERATIONS:
        name = f"fabric.energy_{OPERATIONS[key]}"
        return technology[name], name
    energy, bits = MOVES[key]
    each, formula = technology[energy] * technology[bits], f"{energy} * {bits}"
    if key == "moved_values":
        return each * technology["fabric.hop"], f"{formula} * fabric.hop"
    return each, formula


def _latency(timed: Sequence[tuple[FabricOp, float]], period: Estimate) -> Iterable[Term]:
    for kind in sorted({op.kind for op, _ in timed}):
        mine = [c for op, c in timed if op.kind == kind]
        text = f"{sum(mine):,.6g} cycles of {len(mine)} units / fabric.clock"
        yield Term(f"fabric.{kind}", period * sum(mine), text)


def lanes(op: FabricOp, technology: Technology) -> dict[str, float]:
    """How many arithmetic units of each sort the unit of `op` holds."""
    if op.kind in UNTIMED:
        return {}
    per_position = {k: op.work.get(k, 0.0) or op.work.get(k + PER_CONTEXT, 0.0)
                    for k in OPERATIONS}  # fmt: skip
    if op.kind == "attention":
        side = technology.number("fabric.attention_positions")
        heads = op.work["heads"]
        exps = per_position["exps"] or 1.0
        many = {k: heads * n / exps * side for k, n in per_position.items()}
        return many | {"roots": heads, "muls": heads}
    most = technology.number(_lanes_key(op))
    return {k: min(most, n) for k, n in per_position.items()}


def _area(ops: Sequence[FabricOp], technology: Technology) -> Iterable[Term]:
    for kind in sorted({op.kind for op in ops}):
        counts: dict[str, float] = {}
        for op in ops:
            for key, n in lanes(op, technology).items() if op.kind == kind else ():
                counts[key] = counts.get(key, 0.0) + n
        parts = [(k, n) for k, n in counts.items() if n and OPERATIONS[k] != "control"]
        if parts:
            cells = sum(
                (technology[f"fabric.area_{OPERATIONS[k]}"] * n for k, n in parts), start=_ZERO
            )
            text = " + ".join(f"{n:,.6g} * fabric.area_{OPERATIONS[k]}" for k, n in parts)
            yield Term(
                f"fabric.{kind}", cells / technology["fabric.utilisation"],
                f"({text}) / fabric.utilisation",
            )  # fmt: skip


def _memories(
    technology: Technology, stored: float, kv_bits: Estimate, workload: Workload
) -> Iterable[Term]:
    users = float(workload.users or 1)
    rom = technology["fabric.embedding_bits"] * stored
    yield Term(
        "fabric.tables", rom * technology["fabric.rom_cell"] / technology["fabric.rom_efficiency"],
        f"{stored:,.6g} stored numbers * fabric.embedding_bits * fabric.rom_cell "
        "/ fabric.rom_efficiency",
    )  # fmt: skip
    sram = kv_bits * users
    yield Term(
        "fabric.kv_memory",
        sram * technology["fabric.sram_cell"] / technology["fabric.sram_efficiency"],
        f"{users:g} users * {kv_bits.typical:,.6g} bits * fabric.sram_cell "
        "/ fabric.sram_efficiency",
    )  # fmt: skip


def _adapters(technology: Technology, held: float) -> Iterable[Term]:
    """Writable memory of adapters, of `held` numbers, which all users share; none without any."""
    if held:
        bits = technology["fabric.kv_bits"] * held
        yield Term(
            "fabric.adapters",
            bits * technology["fabric.sram_cell"] / technology["fabric.sram_efficiency"],
            f"{held:,.6g} adapter numbers * fabric.kv_bits * fabric.sram_cell "
            "/ fabric.sram_efficiency",
        )  # fmt: skip


def static_energy(technology: Technology, area: Estimate, interval: Estimate) -> tuple[Term, ...]:
    """Clock and leakage energy of `area` (m²) during the time `interval` (s) one token takes."""
    ticks = interval * technology["fabric.clock"]
    return (
        Term(
            "static.clock", area * technology["fabric.energy_clock"] * ticks,
            f"area * {ticks.typical:,.6g} cycles * fabric.energy_clock",
        ),
        Term(
            "static.leakage", area * technology["fabric.leakage"] * interval,
            f"area * {interval.typical:.4g} s * fabric.leakage",
        ),
    )  # fmt: skip


def linears_in_sequence(ops: Sequence[FabricOp], layers: int) -> int:
    """Fixed linears on the longest path: those that share a requantised input run side by side.

    So do the experts of one stack, each of which has hardware of its own.

    Counts the requantisers that feed fixed linears; `layers` (all in sequence) where the model
    has none.
    """
    steps = sum(1 for op in ops if op.kind == "requantise" and op.work.get("linears"))
    return min(steps, layers) if steps else layers
