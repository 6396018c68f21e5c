"""Every operator's meaning against onnx's own node test cases, on numpy and on torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from pfmc.distill.tensors import TORCH
from pfmc.errors import InputError
from pfmc.ir import meaning

REFUSED = re.compile(  # an InputError is the right answer
    "FLOAT8|FLOAT4|FLOAT6|_e4m3fn|_e5m2|e8m0|float4e2m1|INT2|INT4|training"
)
OUT_OF_SCOPE = re.compile(  # element types and corners that no transformer export holds
    "castlike_.*(FLOAT8|FLOAT4|FLOAT6|INT2|INT4)|empty_set"
)
NUMPY_ONLY = re.compile("uint16|uint32|uint64|_string|scatter.*_(mul|max|min|multiply)|wrap_pad")


def compared(case: Any, arrays: meaning.Arrays) -> None:
    """Runs one case and asserts values, shapes and, on numpy, types."""
    model = ir.from_proto(case.model)
    node, graph = model.graph[0], case.model.graph
    for given, expected in case.data_sets:
        feeds = {v.name: _array(x) for v, x in zip(graph.input, given, strict=False)}
        inputs = [None if v is None or not v.name else feeds[v.name] for v in node.inputs]
        if arrays is not meaning.NUMPY:
            host = meaning.HOST_INPUTS.get(node.op_type, frozenset())
            inputs = [
                x if x is None or i in host else arrays.asarray(x) for i, x in enumerate(inputs)
            ]
        with np.errstate(all="ignore"):
            results = meaning.make(node, arrays)(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        got = {v.name: r for v, r in zip(node.outputs, results, strict=False)}
        half = any(x.dtype.name in ("float16", "bfloat16") for x in feeds.values())
        for value, want in zip(graph.output, (_array(x) for x in expected), strict=True):
            _same(got[value.name], want, 1e-2 if half else 1e-4, arrays)


def _same(got: Any, want: np.ndarray, tolerance: float, arrays: meaning.Arrays) -> None:
    if arrays is meaning.NUMPY:
        got = np.asarray(got)
        assert got.dtype == want.dtype
    elif not isinstance(got, (np.ndarray, np.generic)):
        got = got.float().numpy() if got.dtype.is_floating_point else got.numpy()
    assert got.shape == want.shape
    wide = [np.asarray(x).astype(np.float64) for x in (got, want)]
    np.testing.assert_allclose(*wide, rtol=tolerance, atol=tolerance)


def _array(x: Any) -> np.ndarray:
    return onnx.numpy_helper.to_array(x) if isinstance(x, onnx.TensorProto) else np.asarray(x)


def single_node_cases() -> Iterator[Any]:
    from onnx.backend.test.case.node import collect_testcases

    for case in collect_testcases(None):
        nodes = case.model.graph.node
        known = len(nodes) == 1 and (nodes[0].domain, nodes[0].op_type) in meaning.OPS
        if known and not OUT_OF_SCOPE.search(case.name):
            yield case


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx_node_cases() -> None:
    done: Counter[str] = Counter()
    wrong: list[str] = []
    for case in single_node_cases():
        for arrays in (meaning.NUMPY, TORCH):
            if arrays is TORCH and NUMPY_ONLY.search(case.name):
                continue
            try:
                compared(case, arrays)
                done[arrays.name] += 1
            except InputError as error:
                if not REFUSED.search(case.name):
                    wrong.append(f"{arrays.name} {case.name}: {error.what}")
            except Exception as error:
                text = str(error).strip().replace("\n", " ")[:160]
                wrong.append(f"{arrays.name} {case.name}: {type(error).__name__} {text}")
    assert not wrong, "\n".join(wrong)
    assert done["numpy"] >= 780
    assert done["torch"] >= 680
