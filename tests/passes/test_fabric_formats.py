"""The fabric's widths in the graph: what is stored as integers is integers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from benchmarks.synthetic import Shape, generate
from pfmc import ingest
from pfmc.hardware import Limits
from pfmc.ir import vocabulary
from pfmc.passes import pipeline, recipe
from pfmc.passes.base import Context
from pfmc.passes.fabric_formats import FabricFormats
from pfmc.passes.quantise import Quantise

LIMITS = Limits((2, 8), 8, 0, 256, 64, False, fabric_bits=8)


def quantised(folder: Path, limits: Limits) -> ir.Model:
    source = generate(folder, Shape(layers=2, hidden=64, heads=4, ffn=96, vocabulary=128))
    plan = recipe.load("stream")
    context = Context(limits=limits)
    model = pipeline.canonicalise(ingest.load(source).model, plan.passes, context).model
    return pipeline.run(model, [Quantise.of(plan), FabricFormats()], context).model


def saved(model: ir.Model, folder: Path, observe: list[ir.Value]) -> ort.InferenceSession:
    for value in observe:
        value.type = ir.TensorType(ir.DataType.FLOAT)
        value.shape = value.shape or ir.Shape([None] * 4)
        model.graph.outputs.append(value)
    path = folder / "observed.onnx"
    ir.save(model, path)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return ort.InferenceSession(str(path), options)


def test_attention_reads_integers_with_a_scale_for_each_position_and_head(tmp_path: Path) -> None:
    model = quantised(tmp_path, LIMITS)
    attentions = [n for n in model.graph if vocabulary.is_op(n, "Attention")]
    assert len(attentions) == 2
    operands = [v for v in attentions[0].inputs[:3] if v is not None]
    gathers = [n for n in model.graph if vocabulary.is_op(n, "Gather")]
    embedded = next(u.node for n in gathers for u in n.outputs[0].uses()
                    if vocabulary.is_op(u.node, vocabulary.QUANTISE_TOKEN, "pfmc"))  # fmt: skip
    watched = [*operands, embedded.outputs[0]]
    names = [str(v.name) for v in watched]
    feeds = {"input_ids": np.arange(7)[None] % 128}
    memory = {str(v.name) for v in model.graph.inputs} - feeds.keys()
    feeds |= {name: np.zeros((1, 4, 0, 16), np.float32) for name in memory}
    found = saved(model, tmp_path, watched).run(names, feeds)
    for value in found:
        peak = np.abs(value).max(axis=-1, keepdims=True)
        codes = value / (np.where(peak > 0, peak, 1) / 127)
        assert np.abs(codes - np.round(codes)).max() < 1e-3
        assert np.abs(codes).max() == pytest.approx(127)


def test_no_width_no_change(tmp_path: Path) -> None:
    plain = quantised(tmp_path, replace(LIMITS, fabric_bits=0))
    attention = next(n for n in plain.graph if vocabulary.is_op(n, "Attention"))
    makers = {n.op_type for v in attention.inputs[:3] if v is not None and (n := v.producer())}
    assert vocabulary.QUANTISE_TOKEN not in makers


def test_a_side_path_holds_integers_and_shares_the_input_of_its_linear(tmp_path: Path) -> None:
    source = generate(tmp_path, Shape(layers=1, hidden=64, heads=4, ffn=96, vocabulary=128))
    plan = recipe.load("stream")
    context = Context(limits=LIMITS)
    model = pipeline.canonicalise(ingest.load(source).model, plan.passes, context).model
    linear = vocabulary.fixed_linears(model)[0]
    rng = np.random.default_rng(0)
    factors = []
    for name, shape in (("down", (64, 3)), ("up", (3, 64))):
        array = rng.normal(size=shape).astype(np.float32)
        held = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        model.graph.register_initializer(held)
        factors.append(held)
    side = ir.Node("pfmc", "SidePath", [linear.inputs[0], linear.outputs[0], *factors], name="s")
    side.outputs[0].name = "adapted"
    side.metadata_props[vocabulary.KEY_SOURCE] = "n0"
    model.graph.insert_after(linear, side)
    real = [v.const_value.numpy() for v in factors if v.const_value is not None]
    model = pipeline.run(model, [Quantise.of(plan), FabricFormats()], context).model
    x = next(n for n in vocabulary.fixed_linears(model) if n.name == linear.name).inputs[0]
    assert side.inputs[0] is x, "one converter for both"
    for value, before in zip(side.inputs[2:], real, strict=True):
        assert value is not None
        assert value.const_value is not None
        scale = np.abs(before).max(axis=0) / 127
        codes = value.const_value.numpy() / scale
        np.testing.assert_allclose(codes, np.round(before / scale), atol=1e-3)
