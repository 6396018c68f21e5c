"""Einsum, Resize and others by plainer operators: the same numbers by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from pfmc.ingest.load import load
from pfmc.ir import provenance
from pfmc.passes.plain_operators import PlainOperators

SPELT = {"Einsum", "Resize", "GroupNormalization", "SplitToSequence", "SequenceAt"}
LENGTHS = dict(zip("abcdhijknw", (2, 3, 4, 5, 2, 2, 3, 3, 4, 4), strict=True))


def _model(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[Any]],
    rank: int = 4,
    opset: int = 21,
    **fixed: Any,
) -> onnx.ModelProto:
    sides = [f"side{i}" for i in range(rank)]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, sides)],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in fixed.items()],
    )
    imports = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def _same(lab: Any, proto: onnx.ModelProto, shapes: dict[str, list[int]]) -> ir.Model:
    rng = np.random.default_rng(3)
    feeds = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    wanted = lab.run(ir.from_proto(proto), feeds)["y"]
    model = ir.from_proto(proto)
    provenance.stamp(model)
    declined = lab.apply(model, (PlainOperators(),))
    assert not declined
    assert not SPELT & set(lab.counts(model))
    found = lab.run(model, feeds)["y"]
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    return model


EQUATIONS = [
    "bhwc,hkc->bhwk", "i,j->ij", "bind,bjnd->bnij", "bnij,bjnd->bind", "ab,bc->ac", "ab,b->a",
    "ab,ab->", "ab,cd->acbd", "abcd,abcd->a", "abc->cab", "abc->b", "ab,bc,cd->ad", "ji,kj",
    "bind,jnd->bnij", "ab,ac,ad->bcd", "...ab,...bc->...ac", "abc,dbc->ad",
]  # fmt: skip


@pytest.mark.parametrize("equation", EQUATIONS)
def test_einsum(lab: Any, equation: str) -> None:
    terms = equation.partition("->")[0].replace("...", "hk").split(",")
    shapes = {f"x{i}": [LENGTHS[c] for c in term] for i, term in enumerate(terms)}
    node = helper.make_node("Einsum", list(shapes), ["y"], equation=equation)
    rank = len(equation.partition("->")[2].replace("...", "hk")) if ">" in equation else 2
    _same(lab, _model([node], shapes, rank), shapes)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]),
    how=st.sampled_from([
        {"mode": "nearest", "nearest_mode": "floor"},
        {"mode": "nearest", "nearest_mode": "round_prefer_ceil"},
        {"mode": "linear"}, {"mode": "linear", "antialias": 1}, {"mode": "cubic"},
        {"mode": "cubic", "antialias": 1, "cubic_coeff_a": -0.5},
        {"mode": "cubic", "exclude_outside": 1},
    ]),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    by_scale=st.booleans(),
)  # fmt: skip
def test_resize(
    lab: Any, kind: str, how: dict[str, Any], size: tuple[int, int], by_scale: bool
) -> None:
    options = {**how, "coordinate_transformation_mode": kind}
    shape = [2, 3, 7, 6]
    if how["mode"] == "nearest":  # whole scales: else a point may lie half-way but for rounding
        size = (7 * (1 + size[0] % 4), 6 * (1 + size[1] % 4))
    if by_scale:
        fixed: dict[str, Any] = {"to": np.asarray([1, 1, size[0] / 7, size[1] / 6], np.float32)}
        inputs = ["x", "", "to"]
        if min(np.floor(np.asarray(shape, np.float32) * fixed["to"])) < 1:
            return
    else:
        fixed, inputs = {"to": np.asarray([2, 3, *size], np.int64)}, ["x", "", "", "to"]
    node = helper.make_node("Resize", inputs, ["y"], **options)
    _same(lab, _model([node], {"x": shape}, **fixed), {"x": shape})


def test_resize_to_an_unknown_size_is_declined(lab: Any) -> None:
    node = helper.make_node("Resize", ["x", "", "to"], ["y"], mode="linear")
    scale = np.asarray([1, 1, 2, 2], np.float32)
    model = ir.from_proto(_model([node], {"x": [1, 3, "h", "w"]}, to=scale))
    provenance.stamp(model)
    (declined,) = lab.apply(model, (PlainOperators(),))
    assert "unknown size" in declined.reason


@pytest.mark.parametrize(
    ("scale", "why"), [(1e7, "too many points"), (0.0, "no points"), (-1.0, "no points")]
)
@pytest.mark.parametrize("kind", ["half_pixel_symmetric", "half_pixel"])
def test_resize_by_a_strange_scale_is_declined(lab: Any, scale: float, why: str, kind: str) -> None:
    options = {"mode": "cubic", "antialias": 1, "coordinate_transformation_mode": kind}
    node = helper.make_node("Resize", ["x", "", "to"], ["y"], **options)
    model = ir.from_proto(_model([node], {"x": [1, 3, 8, 8]}, to=np.float32([1, 1, scale, 1])))
    provenance.stamp(model)
    (declined,) = lab.apply(model, (PlainOperators(),))
    assert why in declined.reason


def test_resize_by_a_matrix_of_scales_is_declined(lab: Any) -> None:
    """Found by the fuzzer."""
    node = helper.make_node("Resize", ["x", "", "to"], ["y"], mode="linear")
    model = ir.from_proto(_model([node], {"x": [1, 3, 8, 8]}, to=np.ones((4, 1), np.float32)))
    provenance.stamp(model)
    (declined,) = lab.apply(model, (PlainOperators(),))
    assert "scale" in declined.reason


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_normalization(lab: Any, groups: int) -> None:
    node = helper.make_node("GroupNormalization", ["x", "s", "b"], ["y"], num_groups=groups)
    ends = {n: np.linspace(-1, 2, 6).astype(np.float32) for n in "sb"}
    shape = [2, 6, 5, 4]
    _same(lab, _model([node], {"x": shape}, **ends), {"x": shape})


def test_a_softmax_of_opset_12_is_one_along_the_last_axis(lab: Any, tmp_path: Path) -> None:
    """torch writes ``Softmax(axis=3)``, which then means all axes from the fourth on."""
    node = helper.make_node("Softmax", ["x"], ["y"], axis=3)
    proto = _model([node], {"x": ["b", 4, "s", "s"]}, opset=12)
    proto.ir_version = 7
    onnx.save(proto, tmp_path / "x.onnx")
    model = load(tmp_path / "x.onnx").model
    lab.apply(model, (PlainOperators(),))
    assert lab.counts(model) == {"Softmax": 1}


@pytest.mark.parametrize("sizes", [np.asarray(3), np.asarray([1, 4, 3])])
def test_a_sequence_of_parts_is_a_split(lab: Any, sizes: np.ndarray) -> None:
    nodes = [
        helper.make_node("SplitToSequence", ["x", "sizes"], ["parts"], axis=-1),
        helper.make_node("SequenceAt", ["parts", "one"], ["middle"]),
        helper.make_node("SequenceAt", ["parts", "last"], ["end"]),
        helper.make_node("Concat", ["end", "middle"], ["y"], axis=-1),
    ]
    proto = _model(nodes, {"x": [2, 8]}, 2, sizes=sizes, one=np.asarray(1), last=np.asarray(2))
    model = _same(lab, proto, {"x": [2, 8]})
    assert lab.counts(model) == {"Split": 1, "Concat": 1}


def _declined(lab: Any, proto: onnx.ModelProto) -> str:
    model = ir.from_proto(proto)
    provenance.stamp(model)
    (declined,) = lab.apply(model, (PlainOperators(),))
    return str(declined.reason)


@pytest.mark.parametrize(
    ("fixed", "options", "reason"),
    [
        ({"to": np.asarray([1, 3, 0, 4])}, {}, "no points"),
        ({"to": np.asarray([4, 4])}, {}, "one for each axis"),
        ({"to": np.asarray([1, 3, 8, 8])}, {"mode": "sharp"}, "not known"),
        ({"to": np.asarray([1, 3, 8, 8])}, {"nearest_mode": "up"}, "not known"),
    ],
)
def test_a_resize_that_says_nothing_sensible_is_declined(
    fixed: dict[str, Any], options: dict[str, Any], reason: str, lab: Any
) -> None:
    node = helper.make_node("Resize", ["x", "", "", "to"], ["y"], **options)
    assert reason in _declined(lab, _model([node], {"x": [1, 3, 4, 4]}, **fixed))


def test_an_einsum_of_labels_that_no_operand_has_is_declined(lab: Any) -> None:
    node = helper.make_node("Einsum", ["x"], ["y"], equation="ij->ik")
    assert "no operand has" in _declined(lab, _model([node], {"x": [3, 3]}, rank=2))


@pytest.mark.parametrize("place", [2, -3])
def test_a_part_that_a_sequence_does_not_have_is_declined(place: int, lab: Any) -> None:
    nodes = [
        helper.make_node("SplitToSequence", ["x", "size"], ["parts"], axis=1),
        helper.make_node("SequenceAt", ["parts", "place"], ["y"]),
    ]
    fixed = {"size": np.asarray(2), "place": np.asarray(place)}
    assert "does not have" in _declined(lab, _model(nodes, {"x": [2, 4]}, rank=2, **fixed))
