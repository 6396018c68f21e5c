"""Crossbar cost, converters, cells and refusals against closed forms and published rows."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from pfmc import technology
from pfmc.cost import METRICS, CostReport, to_json
from pfmc.errors import InfeasibleError, PfmcError, UsageError
from pfmc.hardware import FabricOp, FixedLinear, LayerSummary, QuantisedMatrix, Workload
from pfmc.quantity import Quantity, unit
from pfmc.targets import get
from pfmc.targets.crossbar import CrossbarTarget, adc, energy, validation
from pfmc.technology import Technology

TARGET = CrossbarTarget()
TECHNOLOGIES = [
    "crossbar", "crossbar_pcm", "crossbar_pcm_joshi", "crossbar_reram", "crossbar_reram_crosssim",
]  # fmt: skip


def changed(key: str, value: float, name: str = "crossbar") -> Technology:
    loaded = technology.load(name)
    old = loaded.constants[key] if key in loaded.constants else loaded.constants["dac.energy"]
    new = Quantity(key, (value,), value, value, old.unit, "test", "design")
    return replace(loaded, constants={**loaded.constants, key: new})


def layer(inputs: int, outputs: int, t: Technology, name: str = "a") -> LayerSummary:
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (inputs, outputs)).astype(np.int8)
    matrix = QuantisedMatrix(codes, 8, np.full((1, outputs), 0.01, np.float32), inputs)
    return TARGET.lower_linear(FixedLinear(name, matrix, None, 8, 0.02), t).summary()


def report(kind: str = "decode", name: str = "crossbar", users: int | None = None) -> CostReport:
    t = technology.load(name)
    layers = [layer(300, 520, t, "a"), layer(520, 300, t, "b")]
    norm = FabricOp("norm", "norm", "", (), {"muls": 600.0, "adds": 300.0, "moved_values": 300.0})
    return TARGET.cost(layers, [norm], t, Workload(kind, 64, users))


@pytest.mark.parametrize(
    ("node", "bits", "rate", "energy_pj", "area_um2"),
    [(32, 8, 1e8, 1.71, 3939), (32, 8, 1.2e9, 1.85, 6313), (14, 8, 1.2e9, 0.39, 1745),
     (7, 8, 1.2e9, 0.11, 594), (32, 12, 1.2e9, 150, None)],
)  # fmt: skip
def test_the_survey_regression_is_hwcomponents(
    node: float, bits: float, rate: float, energy_pj: float, area_um2: float | None
) -> None:
    """Values of hwcomponents-adc 1.0.21, as the research notes checked them."""
    got = adc.survey(technology.load("crossbar"), bits, rate, node)
    assert got[0] == pytest.approx(energy_pj, abs=0.006 if energy_pj < 10 else 0.5)
    if area_um2:
        assert got[1] == pytest.approx(area_um2, abs=0.6)


def test_a_converter_record_overrides_the_regression() -> None:
    t = changed("adc.energy", 3.0)
    assert adc.converter(t).energy.typical == pytest.approx(3e-12)
    TARGET.check(t)
    assert "adc.energy" in adc.converter(t).energy.constants


@pytest.mark.parametrize("name", TECHNOLOGIES)
def test_every_shipped_technology_is_accepted_and_costed(name: str) -> None:
    t = technology.load(name)
    TARGET.check(t)
    result = report(name=name)
    assert set(result.metrics) <= set(METRICS)
    for metric in result.metrics.values():
        assert metric.value.low <= metric.value.typical <= metric.value.high
        metric.value.to(metric.unit)
    assert to_json(result)["target"] == "crossbar"
    used = {n for m in result.metrics.values() for n in m.value.constants}
    assert used == set(result.sources)


def test_terms_add_up_and_name_the_fabric() -> None:
    result = report()
    for key in ("energy__token", "latency__token", "area__total", "cost__unit", "dies"):
        metric = result.metrics[key]
        for end in ("low", "typical", "high"):
            parts = sum(getattr(term.value, end) for term in metric.terms)
            assert parts == pytest.approx(getattr(metric.value, end), rel=1e-12), (key, end)
    names = {term.name for term in result.metrics["energy__token"].terms}
    assert {"cells", "dac", "adc", "frontend", "buffer", "partial_sums"} <= names
    assert any(n.startswith("fabric.norm") for n in names)
    assert any(n.startswith("static.") for n in names)


def test_energy_terms_in_closed_form() -> None:
    """300 x 520 and 520 x 300 on 256 x 256: 2 x 3 and 3 x 2 tiles, 4 readings."""
    terms = {t.name: t.value.typical for t in report().metrics["energy__token"].terms}
    rows, columns = 300 * 3 + 520 * 2, 520 * 2 + 300 * 3
    assert terms["dac"] == pytest.approx(rows * 4 * 0.3e-12)
    assert terms["sum"] == pytest.approx(columns * 4 * 0.021e-12)
    assert terms["frontend"] == pytest.approx(columns * 4 * 132e-9 * 0.1e-3)
    assert terms["buffer"] == pytest.approx(2 * 8 * (rows + columns) * 0.04e-12)
    assert terms["adc"] == pytest.approx(columns * 4 * 0.36220e-12, rel=1e-4)
    t = technology.load("crossbar")
    siemens = sum(
        layer(a, b, t).counts["read_siemens"] for a, b in ((300, 520), (520, 300))
    )  # fmt: skip
    assert terms["cells"] == pytest.approx(siemens * 0.2**2 * 127e-9)


def test_latency_and_throughput() -> None:
    result = report()
    terms = {t.name: t.value.typical for t in result.metrics["latency__token"].terms}
    assert terms["reading"] == pytest.approx(2 * 4 * 132e-9)
    assert terms["conversion"] == pytest.approx(2 * 100e-9)
    assert terms["partial_sums"] == pytest.approx(2 * (2 + 3) / 2 * 1e-9)
    assert result["throughput__aggregate"].typical == pytest.approx(1 / (4 * 132e-9))
    assert result["throughput__user"].typical == pytest.approx(
        1 / result["latency__token"].typical
    )
    shared = replace(technology.load("crossbar"))
    shared = replace(changed("adc.share", 8))
    assert energy.cycle_time(shared).typical == pytest.approx(800e-9)


def test_encoders_stream_their_positions() -> None:
    result = report("encode")
    token, step = result["latency__token"].typical, 4 * 132e-9
    assert result["latency__inference"].typical == pytest.approx(token + 63 * step)
    assert result["energy__inference"].typical == pytest.approx(
        64 * result["energy__token"].typical
    )


def test_bit_serial_inputs_convert_once_per_bit() -> None:
    t = technology.load("crossbar")
    t = replace(t, settings={**t.settings, "dac.scheme": "bit_serial"})
    TARGET.check(t)
    assert energy.cycles(t) == 4 * 7
    assert energy.pulse(t).typical == pytest.approx(1e-9)
    one = layer(256, 256, t)
    terms = {x.name: x.value.typical for x in energy.terms([one], t)}
    assert terms["sum"] == pytest.approx(256 * 28 * 0.021e-12)
    siemens = 2 * 256**2 * one.diagnostics["mean_conductance_siemens"] * 3.5
    assert terms["cells"] == pytest.approx(siemens * 0.04 * 1e-9)


def test_writing_time_is_devices_over_parallel_writers() -> None:
    result = report()
    devices = 2 * 2 * (2 * 300 * 520)
    assert result["time__write"].typical == pytest.approx(devices * 20e-6 / 256)
    assert result["cost__nre"].high == 0


def test_validation_rows_show_their_ratio() -> None:
    rows = {r.name: r for r in validation.rows(technology.load("crossbar"))}
    assert len(rows) == 11
    for word in ("HERMES 1-phase", "HERMES 4-phase", "ISAAC", "PUMA", "NeuRRAM"):
        assert any(word in name for name in rows), word
    assert rows["HERMES 4-phase, rate of 64 cores"].ratio == pytest.approx(1, abs=0.03)
    assert rows["HERMES 1-phase, rate of 64 cores"].ratio == pytest.approx(1, abs=0.03)
    assert rows["ISAAC, 8-bit converter, energy"].ratio == pytest.approx(1.85 / 1.667, rel=0.01)
    assert rows["ISAAC, 8-bit converter, area"].ratio == pytest.approx(6313 / 1200, rel=0.01)
    assert 0.5 < rows["ISAAC, energy of a 16-bit product"].ratio < 2
    assert all(np.isfinite(r.ratio) for r in rows.values())


def test_wire_loss_is_the_measured_one_at_the_measured_load() -> None:
    t = changed("array.wire_resistance", 1.0)
    for side, lost in ((64, 0.045), (128, 0.156), (256, 0.42)):
        sized = {
            k: Quantity(k, (side,), side, side, unit("1"), "test", "design")
            for k in ("array.tile_rows", "array.tile_columns")
        }
        tile = LayerSummary("a", side, side, 1, {}, {"mean_conductance_siemens": 12.625e-6})
        at = replace(t, constants={**t.constants, **sized})
        assert validation.wire_loss([tile], at) == pytest.approx(lost, abs=0.003)
    assert any("IR drop" in n for n in report().notes)


def test_definition_counts_parts() -> None:
    t = technology.load("crossbar")
    module = TARGET.definition(layer(300, 520, t, "model.layers.0.up"), t)
    assert module.name == "model.layers.0.up"
    assert {c.kind: c.count for c in module.cells} == {
        "crossbar_tile": 6, "crossbar_dac": 6 * 256, "crossbar_frontend": 6 * 256,
        "crossbar_adc": 6 * 256, "crossbar_shift_add": 6 * 256, "crossbar_accumulator": 6 * 256,
    }  # fmt: skip
    assert [(p.name, p.width) for p in module.ports] == [("x", 8), ("y", 32)]


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("adc.bits", 0, "at least 1"), ("adc.bits", 1, "2 to 24 bits"),
        ("dac.bits", 20, "2 to 16 bits"), ("device.g_min", 30.0, "g_min below g_max"),
        ("device.g_max", 0.0, "more than 0"), ("array.tile_rows", 0, "at least 1"),
        ("array.tile_columns", -4, "at least 1"), ("read.voltage", 0.0, "more than 0"),
        ("dac.clock", 0.0, "more than 0"), ("adc.rate", -1.0, "more than 0"),
        ("device.g_min", -1.0, "0 or more"), ("array.weight_bits", 9, "2 to 8 bits"),
    ],
)  # fmt: skip
def test_impossible_hardware_is_refused_with_the_mend(key: str, value: float, text: str) -> None:
    with pytest.raises(InfeasibleError, match=text) as caught:
        TARGET.check(changed(key, value))
    assert caught.value.mend
    assert key in str(caught.value)


def test_incomplete_technologies_are_refused() -> None:
    t = technology.load("crossbar")
    without = {k: v for k, v in t.constants.items() if k != "dac.energy"}
    cases: list[tuple[Technology, str]] = [
        (replace(t, constants=without), "dac.energy is missing"),
        (changed("adc.bit", 8), "did you mean 'adc.bits'"),
        (replace(t, settings={"dac.scheme": "serial"}), "is no choice"),
        (replace(t, settings={"dac.schem": "pulse_width"}), "unknown setting"),
        (changed("array.tile_rows", 2.5), "not a whole number"),
    ]
    for wrong, text in cases:
        with pytest.raises(UsageError, match=text):
            TARGET.check(wrong)
    with pytest.raises(PfmcError, match="no fixed linear"):
        TARGET.cost([], [], t, Workload("decode", 8))


def test_limits_and_registry() -> None:
    t = technology.load("crossbar")
    limits = get("crossbar").limits(t)
    assert (limits.weight_bits, limits.input_bits, limits.output_bits) == ((2, 8), 8, 8)
    assert (limits.tile_inputs, limits.tile_outputs, limits.static_inputs) == (256, 256, True)


def test_cost_and_lowering_do_not_load_torch() -> None:
    code = (
        "import sys; from pfmc.targets import get; get('crossbar'); import pfmc.noise; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
