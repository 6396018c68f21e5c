"""`widen` against ONNX Runtime: a float16 file and its float32 graph agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from benchmarks.synthetic import Shape, generate
from pfmc import ingest
from pfmc.ir import vocabulary
from pfmc.passes import pipeline, recipe
from pfmc.passes.base import Context
from pfmc.passes.widen import Widen


def session(model: bytes | str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return ort.InferenceSession(model, options)


def test_a_half_precision_model_is_widened(tmp_path: Path) -> None:
    source = generate(tmp_path, Shape(layers=2, hidden=64, heads=4, ffn=96, vocabulary=128))
    result = Widen().apply(ingest.load(source).model, Context())
    halves = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
    values = [v for n in result.model.graph for v in (*n.inputs, *n.outputs) if v is not None]
    assert result.changed > 20
    assert not [v.name for v in values if v.dtype in halves]
    vocabulary.install(result.model)
    wide = tmp_path / "wide.onnx"
    ir.save(result.model, wide)
    feeds = {"input_ids": np.arange(10)[None] % 128}
    ours = session(str(wide)).run(None, feeds)[0]
    theirs = session(str(source)).run(None, feeds)[0].astype(np.float32)
    assert ours.dtype == np.float32
    assert np.abs(ours - theirs).max() < 0.02 * np.abs(theirs).max()


def test_weights_keep_their_numbers_and_stay_lazy(tmp_path: Path) -> None:
    source = generate(tmp_path, Shape(layers=1, hidden=64, heads=4, ffn=96, vocabulary=128))
    before = {
        k: v.const_value.numpy()
        for k, v in ingest.load(source).model.graph.initializers.items()
        if v.const_value is not None and v.dtype is ir.DataType.FLOAT16 and v.const_value.size > 1
    }
    model = Widen().apply(ingest.load(source).model, Context()).model
    for name, held in before.items():
        tensor = model.graph.initializers[name].const_value
        assert isinstance(tensor, ir.LazyTensor)
        np.testing.assert_array_equal(tensor.numpy(), held.astype(np.float32))


def test_the_lowest_half_number_stays_the_lowest_so_the_model_gets_kv_memory(
    tmp_path: Path,
) -> None:
    source = generate(tmp_path, Shape(layers=2, hidden=64, heads=4, ffn=96, vocabulary=128))
    model = ingest.load(source).model
    assert -65504 in {
        float(v.const_value.numpy().reshape(-1)[0])
        for v in model.graph.initializers.values()
        if v.const_value is not None and v.const_value.size == 1
    }
    done = pipeline.canonicalise(model, recipe.load("stream").passes, Context()).model
    attentions = [n for n in done.graph if vocabulary.is_op(n, "Attention")]
    assert [n.attributes.get_int("is_causal", 0) for n in attentions] == [1, 1]
    assert sum(str(v.name).startswith("past") for v in done.graph.inputs) == 4
