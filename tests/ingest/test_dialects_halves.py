"""float16 and bfloat16 transformers: loaded, canonical, compiled, against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pfmc.compile import compile_model
from pfmc.ingest import load
from pfmc.ir import check, vocabulary
from pfmc.ir.vocabulary import Stage
from pfmc.passes import pipeline, recipe

from .conftest import make_session, run_model
from .onenode import IDS, onnx, transformer

HALF, BRAIN = 10, 16
BOUND = 2e-2
"""A dozen roundings to 11 bits of numbers up to 8: ``12 * 8 * 2**-12``."""


def _halved(folder: Path, kind: int, keep: bool) -> Path:
    """The transformer in half precision; with `keep` its output is float32 behind a Cast."""
    model = transformer(kind)
    if keep:
        make = onnx.helper
        model.graph.output[0].type.tensor_type.elem_type = 1
        model.graph.node[-1].output[0] = "narrow"
        model.graph.node.append(make.make_node("Cast", ["narrow"], ["logits"], to=1, name="/cast"))
    path = folder / "half.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def _expected(path: Path, kind: int) -> np.ndarray:
    """ONNX Runtime on the file; its CPU provider knows no bfloat16, there on the same numbers."""
    if kind == HALF:
        return np.asarray(make_session(path).run(None, IDS)[0], np.float32)
    model = transformer(1)
    for tensor in model.graph.initializer:
        if tensor.data_type == 1:
            array = onnx.numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float32), tensor.name))
    return np.asarray(make_session(model.SerializeToString()).run(None, IDS)[0])


def _casts(model: Any) -> list[Any]:
    """Casts but those of a graph output, which change nothing and keep its name."""
    casts = [n for n in model.graph if n.op_type == "Cast"]
    return [n for n in casts if not n.outputs[0].is_graph_output()]


@pytest.mark.parametrize("keep", [False, True], ids=["all", "float output"])
@pytest.mark.parametrize("kind", [HALF, BRAIN], ids=["float16", "bfloat16"])
def test_half_precision_end_to_end(kind: int, keep: bool, tmp_path: Path) -> None:
    """The canonical graph is float32 throughout and within the roundings of the file's."""
    path = _halved(tmp_path, kind, keep)
    want = _expected(path, kind)
    model = pipeline.canonicalise(load(path).model, recipe.load("stream", ()).passes).model
    assert check.illegal(model, Stage.CANONICAL) == []
    assert len(vocabulary.fixed_linears(model)) == 7
    assert _casts(model) == []
    got = run_model(model, IDS)[0]
    assert got.dtype == np.float32
    bound = BOUND if kind == HALF else 1e-5  # bfloat16: the same numbers, the same arithmetic
    np.testing.assert_allclose(got, want, rtol=0, atol=bound)


@pytest.mark.parametrize("kind", [HALF, BRAIN], ids=["float16", "bfloat16"])
def test_half_precision_compiles(kind: int, tmp_path: Path) -> None:
    done = compile_model(_halved(tmp_path, kind, True), tmp_path / "x.pfm", target="rom",
                         recipe="stream")  # fmt: skip
    assert done.path is not None


def test_a_converted_file_that_keeps_its_inputs(tmp_path: Path) -> None:
    """float16.py of ONNX Runtime with keep_io_types: Casts at both ends."""
    tools: Any = pytest.importorskip("onnxruntime.transformers.float16")
    half = tools.convert_float_to_float16(transformer(1), keep_io_types=True)
    path = tmp_path / "half.onnx"
    path.write_bytes(half.SerializeToString())
    want = make_session(path).run(None, IDS)[0]
    model = pipeline.canonicalise(load(path).model, recipe.load("stream", ()).passes).model
    assert _casts(model) == []
    np.testing.assert_allclose(run_model(model, IDS)[0], want, rtol=0, atol=BOUND)
