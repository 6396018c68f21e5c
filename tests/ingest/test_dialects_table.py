"""Every operator of com.microsoft is lowered or refused with a reason, and the page says so."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfmc.errors import InputError
from pfmc.ingest import load
from pfmc.ingest.dialects import LOWERINGS, REASONS, STANDARD

from .onenode import make, onnx

ROOT = Path(__file__).resolve().parents[2]
LOWERED = {name for domain, name in LOWERINGS if domain}
OF_OLD_RUNTIMES = {"SimplifiedLayerNormalization"}  # its home is the standard domain


def _schemas() -> set[str]:
    state: Any = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state")
    return {s.name for s in state.get_all_operator_schema() if s.domain == "com.microsoft"}


def test_the_list_is_that_of_onnx_runtime() -> None:
    assert not LOWERED & set(REASONS)
    assert (LOWERED | set(REASONS)) - OF_OLD_RUNTIMES == _schemas()


def test_the_page_tells_every_operator() -> None:
    page = (ROOT / "docs" / "dialects.md").read_text()
    for name in (*LOWERED, *REASONS, *(name for _, name in STANDARD)):
        assert f"`{name}`" in page, name
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import dialect_table
    finally:
        sys.path.pop(0)
    assert page == dialect_table.page()


@pytest.mark.parametrize("op", sorted(REASONS))
def test_a_refusal_names_operator_node_and_reason(op: str, tmp_path: Path) -> None:
    node = make.make_node(op, ["x"], ["y"], name="/l/op", domain="com.microsoft")
    values = [make.make_tensor_value_info(n, 1, [2]) for n in "xy"]
    graph = make.make_graph([node], "g", values[:1], values[1:])
    imports = [make.make_opsetid("", 21), make.make_opsetid("com.microsoft", 1)]
    path = tmp_path / "model.onnx"
    path.write_bytes(
        make.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()
    )
    with pytest.raises(InputError) as caught:
        load(path)
    assert f"com.microsoft::{op} ({REASONS[op]})" in str(caught.value)
    assert "/l/op" in str(caught.value)


def test_numbers_spelled_in_text_and_identities(tmp_path: Path) -> None:
    """Dimensions as text, chains of Identity, a Constant as a weight, a transposed weight."""
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 1, (3, 4)).astype(np.float32)
    nodes = [
        make.make_node("Constant", [], ["w"], value=onnx.numpy_helper.from_array(weight)),
        make.make_node("Identity", ["w"], ["w1"]),
        make.make_node("Identity", ["w1"], ["w2"]),
        make.make_node("Transpose", ["w2"], ["w3"], perm=[1, 0]),
        make.make_node("MatMul", ["x", "w3"], ["y"], name="/fc/MatMul"),
    ]
    x, y = (make.make_tensor_value_info(n, 1, s) for n, s in (("x", ["2", "4"]), ("y", None)))
    model = make.make_model(
        make.make_graph(nodes, "g", [x], [y]), opset_imports=[make.make_opsetid("", 18)],
        ir_version=8,
    )  # fmt: skip
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    from pfmc.ir import vocabulary
    from pfmc.passes import pipeline, recipe

    canonical = pipeline.canonicalise(load(path).model, recipe.load("stream", ()).passes).model
    assert [n.op_type for n in canonical.graph] == ["FixedLinear"]
    (fixed,) = vocabulary.fixed_linears(canonical)
    assert fixed.inputs[1] is not None and fixed.inputs[1].const_value is not None
    np.testing.assert_array_equal(fixed.inputs[1].const_value.numpy(), weight.T)
    assert list(canonical.graph.inputs[0].shape or ()) == [2, 4]
