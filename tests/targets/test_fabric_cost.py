"""Cost of the fabric: closed forms on one attention and one norm, terms that add up, scaling."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from pfmc import technology
from pfmc.cost import total
from pfmc.distill.shapes import probe_shapes
from pfmc.errors import UsageError
from pfmc.hardware import FabricOp, Workload
from pfmc.quantity import Estimate
from pfmc.targets.fabric import FABRIC_KEYS, cost, linears_in_sequence, static_energy
from pfmc.targets.fabric.cost import cycles
from pfmc.targets.fabric.work import fabric_ops

NODES = ("fabric_n5", "fabric_n7", "fabric_n28", "fabric_sky130")
ATTENTION = FabricOp("a", "attention", "", (), {
    "macs8_per_context": 64, "macs16_per_context": 64, "exps_per_context": 4, "heads": 4,
    "kv_read_values_per_context": 32, "kv_write_values": 32, "kv_held_values_per_context": 32,
})  # fmt: skip
NORM = FabricOp("n", "norm", "", (), {"muls": 3 * 100, "adds": 100, "stored_values": 100})


@pytest.mark.parametrize("name", NODES)
def test_shelf_states_every_constant(name: str) -> None:
    technology.load(name).require(FABRIC_KEYS)


def test_energy_closed_form() -> None:
    tech = technology.load("fabric_n7")
    parts = cost([ATTENTION, NORM], tech, Workload("decode", 100))
    energy = {t.name: t.value.typical for t in parts.energy}
    assert energy["fabric.attention.macs8"] == pytest.approx(6400 * 0.10e-12)
    assert energy["fabric.attention.macs16"] == pytest.approx(6400 * 0.17e-12)
    assert energy["fabric.attention.exps"] == pytest.approx(400 * 0.47e-12)
    assert energy["fabric.attention.kv_read_values"] == pytest.approx(3200 * 2.6e-12)
    assert energy["fabric.attention.kv_write_values"] == pytest.approx(32 * 2.6e-12)
    assert energy["fabric.norm.muls"] == pytest.approx(300 * 0.28e-12)
    metric = total("energy__token", parts.energy)
    assert metric.value.typical == pytest.approx(sum(energy.values()))
    assert "fabric.energy_mac8" in metric.value.constants


def test_time_closed_form() -> None:
    tech = technology.load("fabric_n7")
    parts = cost([ATTENTION, NORM], tech, Workload("decode", 100))
    assert cycles(ATTENTION, tech, 100) == 100 + 16
    assert cycles(NORM, tech, 100) == 5 + 16
    assert parts.cycles == 137
    assert parts.stages == 2
    assert sum(t.value.typical for t in parts.latency) == pytest.approx(137e-9)
    assert parts.interval.typical == pytest.approx(116e-9)


def test_area_closed_form() -> None:
    tech = technology.load("fabric_n7")
    parts = cost([ATTENTION, NORM], tech, Workload("decode", 100, users=3))
    area = {t.name: t.value.to("um2")[1] for t in parts.area}
    lanes = 64 * 38 + 64 * 57 + 4 * 148
    assert area["fabric.attention"] == pytest.approx((lanes + 4 * 100 + 4 * 89) / 0.7)
    assert area["fabric.norm"] == pytest.approx((64 * 89 + 64 * 18.7) / 0.7)
    assert area["fabric.tables"] == pytest.approx(100 * 8 * 0.009 / 0.52)
    assert parts.kv_bits_user.typical == 32 * 100 * 8
    assert area["fabric.kv_memory"] == pytest.approx(3 * 32 * 100 * 8 * 0.027 / 0.65)


def test_static_energy_is_area_times_time() -> None:
    tech = technology.load("fabric_n7")
    clock, leak = static_energy(tech, Estimate.exact(100, "mm2"), Estimate.exact(1, "us"))
    assert clock.value.to("J")[1] == pytest.approx(100 * 85e-12 * 1000)
    assert leak.value.to("J")[1] == pytest.approx(100 * 0.06 * 1e-6)


def test_more_context_costs_more(decoder: ir.Model) -> None:
    tech = technology.load("fabric_n5")
    ops = fabric_ops(decoder, probe_shapes(decoder))
    short, long = (cost(ops, tech, Workload("decode", n)) for n in (100, 200))
    assert long.kv_bits_user.typical == 2 * short.kv_bits_user.typical == 2 * 2 * 8 * 100 * 8
    assert long.cycles == short.cycles + 2 * 100
    reads = [
        next(t.value.typical for t in c.energy if t.name == "fabric.attention.kv_read_values")
        for c in (short, long)
    ]
    assert reads[1] == pytest.approx(2 * reads[0])


def test_linears_that_share_an_input_run_side_by_side(decoder: ir.Model) -> None:
    ops = fabric_ops(decoder, probe_shapes(decoder))
    assert linears_in_sequence(ops, 15) == 2 * 4 + 1
    assert linears_in_sequence([], 15) == 15


def test_empty_fabric_costs_nothing() -> None:
    parts = cost([], technology.load("fabric_n7"), Workload("decode", 10))
    assert parts.energy == ()
    assert parts.interval.typical == parts.cycles == 0


def test_incomplete_technology_is_refused() -> None:
    with pytest.raises(UsageError, match=r"fabric\.clock is missing"):
        technology.load("gpu").require(FABRIC_KEYS)


def test_side_path_closed_form() -> None:
    """Rank 4 beside 1000 to 500: two products, every number read once from SRAM, held once."""
    side = FabricOp("s", "side_path", "", (), {
        "macs8": 4000, "macs16": 2000, "adds": 500, "adapter_read_values": 6000,
        "adapter_held_values": 6000,
    })  # fmt: skip
    tech = technology.load("fabric_n7")
    parts = cost([side, NORM], tech, Workload("decode", 100, users=3))
    energy = {t.name: t.value.typical for t in parts.energy}
    assert energy["fabric.side_path.macs8"] == pytest.approx(4000 * 0.10e-12)
    assert energy["fabric.side_path.macs16"] == pytest.approx(2000 * 0.17e-12)
    assert energy["fabric.side_path.adapter_read_values"] == pytest.approx(6000 * 2.6e-12)
    area = {t.name: t.value.typical for t in parts.area}
    assert area["fabric.adapters"] == pytest.approx(6000 * 8 * 0.027e-12 / 0.65), "users share it"
    assert cycles(side, tech, 100) == 1 + 16, "4096 products a cycle"
    assert not any("adapters" in t.name for t in cost([NORM], tech, Workload("decode", 1)).area)
