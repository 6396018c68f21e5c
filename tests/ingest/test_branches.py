"""Merged decoders: the branch with memory stands alone and equals ONNX Runtime's of the whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pfmc.errors import InputError
from pfmc.ingest import load
from pfmc.ingest.branches import SWITCH
from pfmc.oracle import Oracle

FLOAT = TensorProto.FLOAT


def merged(condition: str = SWITCH) -> onnx.ModelProto:
    """One `If` whose branches read the same weight; ``present`` is the memory and x, summed."""
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.normal(size=(4, 3)).astype(np.float32), "w")
    extra = numpy_helper.from_array(np.float32([0.5]), "half")
    with_memory = helper.make_graph(
        [
            helper.make_node("Add", ["x", "past"], ["sum"]),
            helper.make_node("Mul", ["sum", "half"], ["scaled"]),
            helper.make_node("MatMul", ["scaled", "w"], ["y"], name="/lm_head/MatMul"),
        ],
        "with_past",
        [],
        [helper.make_tensor_value_info("y", FLOAT, None),
         helper.make_tensor_value_info("sum", FLOAT, None)],
        [extra],
    )  # fmt: skip
    without = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["y0"]),
            helper.make_node("Identity", ["x"], ["s0"]),
        ],
        "no_past",
        [],
        [helper.make_tensor_value_info(n, FLOAT, None) for n in ("y0", "s0")],
    )
    node = helper.make_node("If", [condition], ["logits", "present"], name="optimum::if",
                            then_branch=with_memory, else_branch=without)  # fmt: skip
    graph = helper.make_graph(
        [node], "merged",
        [helper.make_tensor_value_info("x", FLOAT, ["b", 4]),
         helper.make_tensor_value_info("past", FLOAT, ["b", 4]),
         helper.make_tensor_value_info(condition, TensorProto.BOOL, [1])],
        [helper.make_tensor_value_info("logits", FLOAT, ["b", 3]),
         helper.make_tensor_value_info("present", FLOAT, ["b", 4])],
        [weight],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_the_branch_with_memory_is_taken(
    save: Callable[[Any], Path], run_loaded: Callable[..., list[np.ndarray]]
) -> None:
    path = save(merged())
    loaded = load(path)
    assert loaded.merged
    assert [v.name for v in loaded.model.graph.inputs] == ["x", "past"]
    assert {n.op_type for n in loaded.model.graph} <= {"Add", "Mul", "MatMul", "Identity"}
    rng = np.random.default_rng(1)
    feeds = {k: rng.normal(size=(2, 4)).astype(np.float32) for k in ("x", "past")}
    with Oracle(path) as oracle:
        truth = oracle.run(feeds)
    ours = run_loaded(loaded.model, feeds)
    for value, mine in zip(loaded.model.graph.outputs, ours, strict=True):
        np.testing.assert_allclose(mine, truth[str(value.name)], rtol=1e-6)


def test_an_output_that_nobody_reads_stays_in_the_branch(
    save: Callable[[Any], Path], run_loaded: Callable[..., list[np.ndarray]]
) -> None:
    """Its name was once taken away, from those who read it in the branch as well."""
    model = merged()
    model.graph.node[0].output[1] = ""
    del model.graph.output[1]
    branch = next(a.g for a in model.graph.node[0].attribute if a.name == "then_branch")
    branch.node[1].CopyFrom(helper.make_node("Clip", ["x", "", "sum"], ["scaled"]))
    branch.node[0].CopyFrom(helper.make_node("ReduceMin", ["x"], ["sum"], keepdims=0))
    feeds = {k: np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4) for k in ("x", "past")}
    (found,) = run_loaded(load(save(model)).model, feeds)
    weight = numpy_helper.to_array(model.graph.initializer[0])
    np.testing.assert_allclose(found, np.full((2, 4), -1, np.float32) @ weight, rtol=1e-6)


def test_names_in_a_branch_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(merged().SerializeToString().replace(b"scaled", b"sc\xff\xfeed"))
    with pytest.raises(InputError, match="control flow"):
        load(path)


def test_other_control_flow_is_refused(save: Callable[[Any], Path]) -> None:
    with pytest.raises(InputError, match="control flow"):
        load(save(merged(condition="some_switch")))
    model = merged()
    del model.graph.node[0].output[1]
    del model.graph.output[1]
    with pytest.raises(InputError, match="control flow"):
        load(save(model))


def test_a_plain_model_is_not_merged(linear: Any, save: Callable[[Any], Path]) -> None:
    assert not load(save(linear)).merged
