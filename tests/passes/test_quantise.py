"""Quantising: ONNX Runtime agrees with the codes, ranges and widths are those asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from pfmc import ingest
from pfmc.distill import calibrate
from pfmc.errors import InfeasibleError, InputError, UsageError
from pfmc.hardware import LayerStatistics, Limits
from pfmc.ir import check, provenance, vocabulary
from pfmc.ir.vocabulary import DOMAIN, Stage
from pfmc.oracle import Oracle
from pfmc.passes import pipeline, recipe
from pfmc.passes.base import Context
from pfmc.passes.quantise import (
    LayerFormat,
    LazyCodes,
    Quantise,
    linear_records,
    matrix_of,
    quantised_linears,
)

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
LIMITS = Limits((2, 8), 8, 0, 10, 16, False)


def two_layers(inputs: int = 24, weight: np.ndarray | None = None) -> ir.Model:
    """Two fixed linears that share x, added."""
    rng = np.random.default_rng(0)
    kind = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=ir.Shape(["n", inputs]), type=kind)
    constants, nodes = [], []
    for i, name in enumerate(("model.q_proj", "lm_head")):
        w = rng.standard_normal((inputs, 6)).astype(np.float32)
        if weight is not None and i == 1:
            w = weight
        arrays = {f"{name}.weight": w, f"{name}.bias": rng.standard_normal(6).astype(np.float32)}
        values = [
            ir.Value(name=n, shape=ir.Shape(a.shape), type=kind, const_value=ir.tensor(a, name=n))
            for n, a in arrays.items()
        ]
        node = ir.node("FixedLinear", [x, *values], domain=DOMAIN, name=name)
        node.outputs[0].name = f"{name}:y"
        node.metadata_props[vocabulary.KEY_VALUE] = f"value{i}"
        constants += values
        nodes.append(node)
    nodes.append(ir.node("Add", [n.outputs[0] for n in nodes]))
    nodes[-1].outputs[0].name, nodes[-1].outputs[0].type = "y", kind
    graph = ir.Graph(
        [x], nodes[-1].outputs, nodes=nodes, initializers=constants, opset_imports={"": 24},
        name="g",
    )  # fmt: skip
    model = ir.Model(graph, ir_version=11)
    provenance.stamp(model)
    vocabulary.install(model)
    return model


def seen(peak: float = 3.0, inputs: int = 24) -> LayerStatistics:
    ramp = {i / 100: peak * i / 100 for i in range(1, 101)}
    one = np.ones(6, np.float32)
    return LayerStatistics(peak, ramp, np.ones(inputs), one, one, 10)


STATISTICS = {"model.q_proj": seen(), "lm_head": seen()}


def quantised(options: Quantise, model: ir.Model | None = None) -> ir.Model:
    context = Context(limits=LIMITS, statistics=STATISTICS)
    return pipeline.run(model or two_layers(), [options], context).model


def reference(model: ir.Model, x: np.ndarray) -> np.ndarray:
    """By the definition, in numpy: quantise x, multiply by codes times scales, add."""
    total = np.zeros((len(x), 6))
    for linear in linear_records(model):
        top = 2 ** (linear.input_bits - 1) - 1
        step = linear.input_scale
        scale = np.float32(step) if step else np.abs(x).max(-1, keepdims=True) / np.float32(top)
        codes = np.clip(np.rint(x / scale), -top, top)
        assert linear.bias is not None
        total += (codes * scale).astype(np.float64) @ linear.matrix.weights() + linear.bias
    return total


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("granularity", ["channel", "tile"])
@pytest.mark.parametrize("inputs", ["static", "token"])
def test_onnx_runtime_agrees_with_the_codes(
    tmp_path: Path, bits: int, granularity: str, inputs: str
) -> None:
    model = quantised(Quantise(bits, granularity, inputs=inputs))  # type: ignore[arg-type]
    check.require_stage(model, Stage.QUANTISED)
    ir.save(model, tmp_path / "q.onnx")
    x = np.random.default_rng(1).standard_normal((5, 24)).astype(np.float32)
    with Oracle(tmp_path / "q.onnx") as oracle:
        y = oracle.run({"x": x})["y"]
    np.testing.assert_allclose(y, reference(model, x), rtol=0, atol=1e-5)
    again = ir.load(tmp_path / "q.onnx")
    np.testing.assert_allclose(reference(again, x), reference(model, x), rtol=0, atol=1e-6)
    for one, other in zip(quantised_linears(model), quantised_linears(again), strict=True):
        np.testing.assert_array_equal(matrix_of(one).codes, matrix_of(other).codes)


def test_the_converter_is_shared_and_provenance_kept() -> None:
    model = quantised(Quantise())
    nodes = list(model.graph)
    assert [n.op_type for n in nodes] == ["Quantise", "QuantisedLinear", "QuantisedLinear", "Add"]
    assert provenance.sources(nodes[0]) == ("n0", "n1")
    assert [n.name for n in nodes[1:3]] == ["model.q_proj", "lm_head"]
    assert nodes[2].metadata_props[vocabulary.KEY_VALUE] == "value1"
    assert "lm_head.weight" not in model.graph.initializers
    records = list(linear_records(model, STATISTICS))
    assert [r.weight for r in records] == ["model.q_proj.weight", "lm_head.weight"]
    assert records[0].input_scale == pytest.approx(3 / 127)
    assert records[0].sources == ("n0",)
    assert records[0].statistics is STATISTICS["model.q_proj"]


def test_one_layer_is_held_and_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from pfmc.passes import lazy_codes

    calls: list[int] = []
    real = lazy_codes.round_layer

    def counted(*given: object, **more: object) -> object:
        calls.append(1)
        return real(*given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(lazy_codes, "round_layer", counted)
    model = quantised(Quantise())
    assert not calls
    tensors = [v.const_value for n in quantised_linears(model) for v in n.inputs[1:3] if v]
    for tensor in tensors:
        assert tensor is not None
        tensor.numpy()
    assert len(calls) == 2
    assert isinstance(tensors[0], LazyCodes)
    list(linear_records(model))
    assert tensors[0].source.slot.held is None


def test_formats_by_layer_and_target() -> None:
    rules = (LayerFormat("lm_*", weight_bits=8), LayerFormat("*q_proj", granularity="tile"))
    model = quantised(Quantise(3, layers=rules))
    q, head = linear_records(model)
    assert (q.matrix.bits, q.matrix.group, q.matrix.scale.shape) == (3, 10, (3, 6))
    assert (head.matrix.bits, head.matrix.group, head.matrix.scale.shape) == (8, 24, (1, 6))
    widest = quantised(Quantise("target"))
    assert {r.matrix.bits for r in linear_records(widest)} == {8}


def test_what_a_target_cannot_do_is_refused_with_the_nearest() -> None:
    narrow = dataclasses.replace(LIMITS, weight_bits=(2, 4))
    with pytest.raises(InfeasibleError, match="2 to 4 bits") as caught:
        pipeline.run(two_layers(), [Quantise(8)], Context(limits=narrow, statistics=STATISTICS))
    assert "weight_bits=4" in caught.value.mend
    fixed = dataclasses.replace(LIMITS, static_inputs=True)
    with pytest.raises(InfeasibleError, match="fixed ranges"):
        pipeline.run(two_layers(), [Quantise(inputs="token")], Context(limits=fixed))
    with pytest.raises(UsageError, match="calibration statistics"):
        pipeline.run(two_layers(), [Quantise()], Context(limits=LIMITS))


def test_a_percentile_among_zeros_is_no_range() -> None:
    """Of inputs behind a ReLU most are zero: a range of nothing would clip all the others away."""
    x = np.maximum(np.random.default_rng(0).standard_normal((4000, 24)) - 2.0, 0.0)
    sums = calibrate.InputSums.of(x.astype(np.float32))
    sparse = dataclasses.replace(seen(), input_peak=sums.peak, input_quantiles=sums.quantiles())
    for percentile, low, high in ((90, sums.peak, sums.peak), (99.9, 0.5, 0.9 * sums.peak)):
        options = Quantise(input_range="percentile", percentile=percentile)
        assert low <= options.range_of(sparse, 127.0) <= high


def test_a_weight_that_is_no_number_is_named() -> None:
    weight = np.zeros((24, 6), np.float32)
    weight[11, 4] = np.nan
    model = quantised(Quantise(), two_layers(weight=weight))
    with pytest.raises(InputError) as caught:
        list(linear_records(model))
    assert "'lm_head.weight'" in caught.value.where
    assert "[11, 4]" in caught.value.where


def test_clip_search_betters_plain_rounding_on_a_trained_model() -> None:
    """stories260K at 4 bits a channel: geometric mean over layers of relative weight error."""
    path = SHARED / "data" / "stories260K" / "model.onnx"
    if not path.is_file():
        pytest.skip("stories260K is absent")
    plan = recipe.load("rom")
    base = pipeline.canonicalise(ingest.load(path).model, plan.passes).model
    weights = {
        str(n.name): np.asarray(n.inputs[1].const_value.numpy())  # type: ignore[union-attr]
        for n in vocabulary.fixed_linears(base)
    }
    errors = {}
    for search in ("plain", "clip"):
        options = Quantise(4, search=search, inputs="token")  # type: ignore[arg-type]
        model = pipeline.run(base.clone(), [options], Context(limits=LIMITS)).model
        errors[search] = [
            float(((r.matrix.weights() - weights[r.name]) ** 2).mean() / weights[r.name].var())
            for r in linear_records(model)
        ]
    assert len(errors["clip"]) == 36
    assert all(c <= p for c, p in zip(errors["clip"], errors["plain"], strict=True))
    gain = np.exp(np.mean(np.log(errors["clip"])) - np.mean(np.log(errors["plain"])))
    assert gain < 0.87  # 0.8525 measured


@pytest.mark.parametrize("name", ["bert__t_dyn", "llama__t_dyn", "gpt2__t_dyn", "vit__t_dyn"])
def test_zoo_models_run_in_onnx_runtime(tmp_path: Path, name: str) -> None:
    """The same graph with the dequantised weights as FixedLinear gives the same numbers."""
    path = SHARED / "zoo" / f"{name}.onnx"
    if not path.is_file():
        pytest.skip("the zoo is absent")
    plan = recipe.load("crossbar", ["calibration.sequences=2", "calibration.length=16"])
    base = pipeline.canonicalise(ingest.load(path).model, plan.passes).model
    statistics = calibrate.statistics_of(base, plan.calibration)
    context = Context(limits=dataclasses.replace(LIMITS, tile_inputs=24), statistics=statistics)
    model = pipeline.run(base, [Quantise.of(plan)], context).model
    feeds = calibrate.probe_batches(model, None, count=2, length=12)[0]
    ir.save(model, tmp_path / "q.onnx")
    for node in quantised_linears(model):
        weight = ir.Value(name=f"{node.name}:w", const_value=ir.tensor(matrix_of(node).weights()))
        model.graph.register_initializer(weight)
        ideal = ir.node("FixedLinear", [node.inputs[0], weight, node.inputs[3]], domain=DOMAIN)
        model.graph.insert_before(node, ideal)
        node.outputs[0].replace_all_uses_with(ideal.outputs[0], replace_graph_outputs=True)
        ideal.outputs[0].name, node.outputs[0].name = node.outputs[0].name, f"{node.name}:gone"
        ideal.outputs[0].type = node.outputs[0].type
        model.graph.remove(node, safe=True)
    vocabulary.install(model)
    ir.save(model, tmp_path / "f.onnx")
    with Oracle(tmp_path / "q.onnx") as one, Oracle(tmp_path / "f.onnx") as other:
        left, right = one.run(feeds), other.run(feeds)
    for key, array in left.items():
        np.testing.assert_allclose(array, right[key], rtol=0, atol=1e-5)
