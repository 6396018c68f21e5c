"""The cost report of a read-only-weight die: closed forms, sums, scaling, validation rows."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from pfmc import formats, targets, technology
from pfmc.cost import CostReport, to_json
from pfmc.distill.shapes import probe_shapes
from pfmc.hardware import FabricOp, LayerSummary, Workload
from pfmc.ir import vocabulary
from pfmc.targets.fabric.work import fabric_ops
from pfmc.targets.rom import cost, validation
from pfmc.targets.rom.lower import work

TARGET = targets.get("rom")
ZOO = Path(__file__).resolve().parents[3] / "shared" / "zoo"


def layer(inputs: int, outputs: int, bits: int = 4, name: str = "l") -> LayerSummary:
    counts = work(inputs, outputs, formats.of("int", bits), 8, 256, 64)
    return LayerSummary(name, inputs, outputs, int(counts["tiles"]), counts, {})


def model_of(decoder: ir.Model) -> tuple[list[LayerSummary], list[FabricOp]]:
    layers = []
    for node in vocabulary.fixed_linears(decoder):
        rows, cols = (int(d) for d in node.inputs[1].const_value.shape.numpy())
        layers.append(layer(rows, cols, name=str(node.name)))
    return layers, fabric_ops(decoder, probe_shapes(decoder))


def report_of(decoder: ir.Model, kind: str = "decode", **options: int) -> CostReport:
    workload = Workload(kind, options.pop("context", 128), **options)
    return TARGET.cost(*model_of(decoder), technology.load("rom"), workload)


def test_layer_counts_by_hand() -> None:
    counts = layer(600, 100).counts
    assert counts["tiles"] == 3 * 2
    assert counts["lanes"] == 6 * 64
    assert counts["rom_bits"] == 600 * 128 * 4
    assert counts["joins"] == 2 * 100
    assert counts["cycles"] == 256 + 64


def test_terms_closed_form() -> None:
    tech = technology.load("rom")
    report = cost.report([layer(256, 64)], [], tech, Workload("decode", 1, users=1))
    energy = {t.name: t.value.typical for t in report.metrics["energy__token"].terms}
    macs, bits = 256 * 64, 256 * 64 * 4
    assert energy["rom.read"] == pytest.approx(bits / 8 * 0.08e-12)
    assert energy["rom.mac.w4a8"] == pytest.approx(macs * 0.051e-12 * 0.65)
    assert energy["rom.requantise"] == pytest.approx(64 * 4 * 0.143e-12)
    area = {t.name: t.value.to("um2")[1] for t in report.metrics["area__total"].terms}
    assert area["rom.array"] == pytest.approx(bits * 0.0069 / 0.31)
    assert area["rom.lanes.w4a8"] == pytest.approx(64 * 20.9 * 0.765 / 0.7)
    assert area["io"] == pytest.approx(0.05 * sum(v for k, v in area.items() if k != "io"))
    assert report["latency__token"].typical == pytest.approx((256 + 64 + 16) * 1e-9)


def test_every_sum_adds_up(decoder: ir.Model) -> None:
    report = report_of(decoder)
    for metric in report.metrics.values():
        for end in ("low", "typical", "high") if metric.terms else ():
            parts = sum(getattr(t.value, end) for t in metric.terms)
            assert getattr(metric.value, end) == pytest.approx(parts)
        assert metric.value.low <= metric.value.typical <= metric.value.high
    used = {n for m in report.metrics.values() for t in m.terms for n in t.value.constants}
    assert used <= set(report.sources)
    assert to_json(report)["schema_version"] == 1


def test_rates_belong_together(decoder: ir.Model) -> None:
    full, one = report_of(decoder), report_of(decoder, users=1)
    users = full["users__pipeline"].typical
    assert users > 1
    assert full["throughput__aggregate"].typical == pytest.approx(
        users * full["throughput__user"].typical
    )
    assert one["throughput__aggregate"].typical == pytest.approx(one["throughput__user"].typical)
    assert one["throughput__user"].typical == full["throughput__user"].typical
    assert one["energy__token"].typical > full["energy__token"].typical
    assert full["power__total"].typical == pytest.approx(
        full["energy__token"].typical * full["throughput__aggregate"].typical
    )
    assert one["memory__kv_user"].typical == 2 * 8 * 128 * 8


def test_encoder_reports_an_inference(decoder: ir.Model) -> None:
    report = report_of(decoder, "encode", context=64)
    assert report["energy__inference"].typical == pytest.approx(
        64 * report["energy__token"].typical
    )
    interval = 1 / report["throughput__aggregate"].typical
    assert report["latency__inference"].typical == pytest.approx(
        report["latency__token"].typical + 63 * interval
    )


@pytest.mark.parametrize("name", ["rom", "rom_n7", "rom_n28", "rom_sky130"])
def test_older_nodes_cost_more_area(decoder: ir.Model, name: str) -> None:
    tech = technology.load(name)
    report = TARGET.cost(*model_of(decoder), tech, Workload("decode", 128, users=1))
    newest = report_of(decoder, users=1)
    assert report["area__total"].typical >= newest["area__total"].typical
    assert report["dies"].typical == 1


def test_wider_weights_cost_more() -> None:
    tech = technology.load("rom")
    reports = [
        cost.report([layer(256, 64, bits)], [], tech, Workload("decode", 1, users=1))
        for bits in (2, 4, 8)
    ]
    for key in ("energy__token", "area__total", "memory__weights"):
        values = [r[key].typical for r in reports]
        assert values == sorted(values)
        assert values[0] < values[-1]


def test_validation_rows_are_shown_with_their_ratio() -> None:
    rows = {v.name: v for v in validation.rows()}
    assert rows["HNLPU yield of one chip"].ratio == pytest.approx(1, abs=0.01)
    assert rows["HNLPU dies a wafer"].ratio == pytest.approx(1, abs=0.01)
    assert rows["HNLPU good die"].ratio == pytest.approx(1, abs=0.01)
    assert rows["HNLPU weight-dependent share of the masks"].ours == pytest.approx(0.077, abs=1e-3)
    assert rows["HNLPU masks of one chip variant, middle"].ratio == pytest.approx(1, abs=0.01)
    for name in ("HC1 die area", "HC1 energy per token", "HC1 tokens per second, one user",
                 "HC1 power", "HNLPU array area, 16 chips"):  # fmt: skip
        assert 0.1 < rows[name].ratio < 10, (name, rows[name].ratio)


def test_public_shapes_have_their_parameters() -> None:
    llama = sum(i * o for _, i, o in validation.LLAMA_8B.linears()) + 4096 * 128256
    assert llama == pytest.approx(8.03e9, rel=0.001)
    oss = sum(i * o for _, i, o in validation.GPT_OSS_120B.linears()) + 2880 * 201088
    assert oss == pytest.approx(116.8e9, rel=0.002)


@pytest.mark.skipif(not ZOO.is_dir(), reason="needs the zoo beside the repository")
def test_public_shapes_have_the_fabric_of_a_real_graph() -> None:
    """The fabric written down from a public shape equals the one counted from such a model."""
    from pfmc import ingest
    from pfmc.passes import pipeline, recipe
    from pfmc.passes.base import Context

    plan = recipe.load("rom", ())
    loaded = ingest.load(ZOO / "llama__t_kv.onnx")
    context = Context(limits=TARGET.limits(technology.load("rom")), seed=0)
    model = pipeline.canonicalise(loaded.model, plan.passes, context, pipeline.Settings()).model
    shape = {str(n.name): n.inputs[1].const_value.shape for n in vocabulary.fixed_linears(model)}
    hidden = next(int(s[1]) for n, s in shape.items() if n.endswith("gate_proj"))
    tiny = validation.Decoder(2, 32, 4, 2, 8, hidden, 128)
    ops = fabric_ops(model, probe_shapes(model))
    counted = [op for op in ops if "Where" not in op.name]  # this file has a padding mask besides
    for kind in ("norm", "rotary", "attention", "elementwise", "embedding", "sampling"):
        ours, theirs = totals(tiny.fabric(), kind), totals(counted, kind)
        ours.pop("stored_values", None)
        theirs.pop("stored_values", None)
        assert ours == theirs, kind


def totals(ops: list[FabricOp], kind: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for op in ops:
        for key, count in op.work.items() if op.kind == kind else ():
            found[key] = found.get(key, 0.0) + count
    return found
