"""Hostile and odd models all the way: deep nesting, bombs of elements, names, empty weights.

What each row of the tables of hostile inputs is held by says docs/hostile.md; it is checked here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfmc.compile import compile_model
from pfmc.errors import InfeasibleError, InputError
from pfmc.ingest import load
from pfmc.ingest.limits import bounded
from pfmc.ir import text, vocabulary
from pfmc.passes import pipeline, recipe

onnx = pytest.importorskip("onnx")
make = onnx.helper
F32, I64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("rom", "crossbar", "optical")


def model(
    weight: np.ndarray, names: tuple[str, str, str] = ("fc", "act", "w"), more: tuple[Any, ...] = ()
) -> Any:
    """``Relu(x[batch, in] @ w)`` with the names of its nodes and of its weight."""
    first, second, held = names
    body = [
        make.make_node("MatMul", ["x", held], ["h"], name=first),
        make.make_node("Relu", ["h"], ["y"], name=second),
    ]
    value = make.make_tensor_value_info
    graph = make.make_graph(
        [*body, *more], "g", [value("x", F32, ["batch", weight.shape[0]])],
        [value("y", F32, ["batch", weight.shape[1]])], [onnx.numpy_helper.from_array(weight, held)],
    )  # fmt: skip
    return make.make_model(graph, opset_imports=[make.make_opsetid("", 20)], ir_version=10)


def saved(tmp_path: Path, proto: Any) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def canonical(path: Path) -> Any:
    return pipeline.canonicalise(load(path).model, recipe.load("stream", ()).passes).model


WEIGHT = np.random.default_rng(0).normal(0, 1, (6, 4)).astype(np.float32)


# -- bombs -----------------------------------------------------------------------------------------


def nested(depth: int) -> Any:
    """``If`` within ``If``, so many deep."""
    value = make.make_tensor_value_info("q", F32, None)
    body = make.make_graph([make.make_node("Relu", ["x"], ["q"])], "b", [], [value])
    for _ in range(depth):
        choice = make.make_node("If", ["c"], ["q"], then_branch=body, else_branch=body)
        body = make.make_graph([choice], "b", [], [value])
    return body.node[0]


@pytest.mark.parametrize("depth", [1, 6, 10])
def test_nested_control_flow_is_refused(depth: int, tmp_path: Path) -> None:
    proto = model(WEIGHT)
    proto.graph.node.append(nested(depth))
    proto.graph.input.append(make.make_tensor_value_info("c", onnx.TensorProto.BOOL, []))
    with pytest.raises(InputError, match=r"If \(control flow\) x 1"):
        load(saved(tmp_path, proto))


@pytest.mark.parametrize("depth", [20, 60, 5000])
def test_deep_nesting_is_refused_without_recursion(depth: int, tmp_path: Path) -> None:
    """A chain of messages in messages; protobuf itself stops at a hundred."""
    inner = b""
    for _ in range(depth):  # graph -> node -> attribute -> graph, each a field with a length
        for tag in (b"\x32", b"\x2a", b"\x0a"):
            inner = tag + _varint(len(inner)) + inner
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x0a\x42\x02\x10\x14\x3a" + _varint(len(inner)) + inner)
    with pytest.raises(InputError):
        load(path)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


HUGE = {
    "ConstantOfShape": (["size"], {"size": [1 << 34]}),
    "Expand": (["one", "size"], {"one": [1], "size": [1 << 35]}),
    "Range": (["zero", "end", "step"], {"zero": 0, "end": 1 << 36, "step": 1}),
    "Tile": (["one", "size"], {"one": [1], "size": [1 << 34]}),
}


@pytest.mark.parametrize("op", HUGE)
def test_a_bomb_of_elements_is_not_made(op: str, tmp_path: Path) -> None:
    """Gigabytes that one node asks for: canonicalised or refused, but never written out."""
    inputs, held = HUGE[op]
    bomb = [
        make.make_node(op, inputs, ["bomb"], name="bomb"),
        make.make_node("ReduceMax", ["bomb"], ["top"], keepdims=0, name="top"),
        make.make_node("Cast", ["top"], ["z"], to=F32, name="cast"),
    ]
    proto = model(WEIGHT, more=tuple(bomb))
    proto.graph.output.append(make.make_tensor_value_info("z", F32, None))
    for name, number in held.items():
        array = np.array(number, np.int64)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    path = saved(tmp_path, proto)
    canonical(saved(tmp_path, model(WEIGHT)))  # imports and caches are not counted
    path = saved(tmp_path, proto)
    try:
        with bounded(1 << 30):
            found = canonical(path)
    except InputError:
        return
    held = [v.const_value for v in found.graph.initializers.values()]
    assert all(t is None or t.size < 1 << 20 for t in held)


# -- names -----------------------------------------------------------------------------------------

NAMES = [
    "x; $system(\"touch pwned\")", "../../../etc/passwd", "/abs", "a\nb\tc", "</script><b>", "..",
    "CON", "n" * 400, "ünï çødé 模型", "`include \"x\"", ".subckt x", "%s%n", "a b",
]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_names_do_no_harm_in_what_is_written(target: str, tmp_path: Path) -> None:
    """Each name in turn for a node and a weight: files stay inside, with plain names."""
    inside = tmp_path / "inside"
    inside.mkdir()
    body, weights = [], []
    for i, name in enumerate(NAMES):
        before = "x" if i == 0 else f"v{i - 1}"
        body.append(make.make_node("MatMul", [before, f"{name} w"], [f"v{i}"], name=name))
        weights.append(onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), f"{name} w"))
    value = make.make_tensor_value_info
    graph = make.make_graph(
        body, "g", [value("x", F32, ["batch", 4])], [value(body[-1].output[0], F32, ["batch", 4])],
        weights,
    )  # fmt: skip
    proto = make.make_model(graph, opset_imports=[make.make_opsetid("", 20)], ir_version=10)
    out = inside / "out.pfm"
    recipe_of = {"recipe": "stream"} if target == "rom" else {}  # the quickest
    compile_model(saved(tmp_path, proto), out, target=target, **recipe_of)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["inside", "model.onnx"]
    assert [p.name for p in inside.iterdir()] == ["out.pfm"]
    written = [p.relative_to(out).as_posix() for p in out.rglob("*")]
    assert all(re.fullmatch(r"[\w./%+~=-]{1,250}", p, re.ASCII) for p in written), written
    for page in [p for p in out.rglob("*") if p.suffix in (".html", ".sv", ".v", ".cir", ".sp")]:
        body_text = page.read_text(encoding="utf-8")
        assert "$system" not in body_text
        assert "</script><b>" not in body_text


# -- weights of nothing ----------------------------------------------------------------------------

ODD = {
    "zeros": np.zeros((6, 4), np.float32), "constant": np.full((6, 4), 0.5, np.float32),
    "one element": np.ones((1, 1), np.float32), "one row": WEIGHT[:1], "one column": WEIGHT[:, :1],
    "no rows": np.zeros((0, 4), np.float32), "no columns": np.zeros((6, 0), np.float32),
    "denormal": np.full((6, 4), 1e-42, np.float32), "huge": np.full((6, 4), 3e38, np.float32),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_degenerate_weights_have_a_defined_result(kind: str, tmp_path: Path) -> None:
    """They compile to rom, or are refused with a reason; nothing else."""
    path, out = saved(tmp_path, model(ODD[kind])), tmp_path / "out.pfm"
    try:
        done = compile_model(path, out, target="rom", recipe="stream")
    except (InputError, InfeasibleError):
        assert not out.exists()
        return
    energy = done.report["cost"]["metrics"]["energy__token"]["typical"]
    assert np.isfinite(energy)
    assert energy >= 0


# -- what must not matter --------------------------------------------------------------------------


def test_the_order_of_weights_and_the_names_of_nodes_do_not_matter(tiny: Path) -> None:
    """The canonical graph is the same but for the names that were changed."""
    plain = canonical(tiny)
    proto = onnx.load(tiny)
    held = list(proto.graph.initializer)[::-1]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(held)
    for index, node in enumerate(proto.graph.node):
        node.name = f"renamed{index}"
    other = tiny.with_name("other.onnx")
    onnx.save(proto, other)
    changed = canonical(other)
    assert text.histogram(changed) == text.histogram(plain)
    assert _products(changed) == _products(plain)


def _products(found: Any) -> list[tuple[str, bytes]]:
    return [
        (str(n.metadata_props[vocabulary.KEY_VALUE]), n.inputs[1].const_value.numpy().tobytes())
        for n in vocabulary.fixed_linears(found)
    ]


def test_the_page_of_hostile_inputs_names_tests_that_exist() -> None:
    page = (ROOT / "docs" / "hostile.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page)
    assert len(named) > 40
    sources: dict[str, str] = {}
    read: Callable[[str], str] = lambda f: (ROOT / f).read_text(encoding="utf-8")  # noqa: E731
    for file, function in named:
        sources.setdefault(file, read(file))
        assert not function or f"def {function}(" in sources[file], (file, function)
