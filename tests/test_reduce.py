"""Reduce: seeded faults in a Llama, random graphs, what a check may be, and when it refuses."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pfmc.errors import InputError, UsageError
from pfmc.reduce import Command, Reduction, reduce_model

onnx = pytest.importorskip("onnx")
make = onnx.helper
F32, I64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64

Check = Callable[[Path], bool]


def nodes(path: Path) -> list[Any]:
    return list(onnx.load(path).graph.node)


def session(path: Path) -> Any:
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def valid(path: Path) -> None:
    onnx.checker.check_model(str(path), full_check=True)
    session(path)


def has_ints(op: str, attribute: str, value: list[int]) -> Check:
    """Fails where an operation `op` with this attribute stands."""

    def fails(path: Path) -> bool:
        return any(
            a.name == attribute and list(a.ints) == value
            for n in nodes(path) if n.op_type == op for a in n.attribute
        )  # fmt: skip

    return fails


def has_all(*ops: str) -> Check:
    return lambda path: set(ops) <= {n.op_type for n in nodes(path)}


def feeds(first: str, second: str) -> Check:
    """Fails where `first` directly feeds `second`."""

    def fails(path: Path) -> bool:
        made = {o for n in nodes(path) if n.op_type == first for o in n.output}
        return any(made & set(n.input) for n in nodes(path) if n.op_type == second)

    return fails


def weight_of_64(path: Path) -> bool:
    """Fails where a MatMul has a constant of 64 rows."""
    graph = onnx.load(path).graph
    rows = {t.name: t.dims[0] for t in graph.initializer if len(t.dims) == 2}
    return any(rows.get(n.input[1]) == 64 for n in graph.node if n.op_type == "MatMul")


FAULTS: list[tuple[Check, int]] = [
    (has_ints("Transpose", "perm", [0, 1, 3, 2]), 1),
    (has_ints("Transpose", "perm", [0, 2, 1]), 1),
    (has_all("Softmax", "LessOrEqual", "Sigmoid"), 3),
    (feeds("Softmax", "MatMul"), 2),
    (feeds("Concat", "Mul"), 2),
    (weight_of_64, 1),
]


@pytest.mark.parametrize(("fails", "left"), FAULTS)
def test_a_seeded_fault_is_all_that_is_left(
    fails: Check, left: int, tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small.onnx"
    done = reduce_model(tiny, fails, out)
    assert fails(out)
    valid(out)
    assert done.nodes == (len(nodes(tiny)), left)
    assert done.nodes[0] >= 120
    assert len(nodes(out)) == left
    assert done.finished
    assert done.checks < 120
    assert out.stat().st_size < (20_000 if fails is weight_of_64 else 1200)


def test_it_is_deterministic(tiny: Path, tmp_path: Path) -> None:
    a, b = (reduce_model(tiny, has_all("Softmax", "Neg"), tmp_path / n) for n in "ab")
    assert (a.sha256, a.checks) == (b.sha256, b.checks)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_weights_become_inputs_and_sizes_small(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.onnx"
    reduce_model(tiny, has_all("MatMul"), out)
    graph = onnx.load(out).graph
    assert not [t.name for t in graph.initializer if np.prod(t.dims) > 64]
    assert not graph.doc_string
    assert not any(n.metadata_props for n in graph.node)


# -- random graphs ---------------------------------------------------------------------------------

MARK = "LeakyRelu"


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Any, list[float], bool]:
    """A random graph on [2, 3] tensors with 1 to 3 marked nodes; whether they must be joined."""
    count = draw(st.integers(3, 16))
    marks = draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=3))
    made, body = ["x", "w"], []
    for i in range(count):
        a, b = (draw(st.sampled_from(made)) for _ in "ab")
        if i in marks:
            body.append(make.make_node(MARK, [a], [f"v{i}"], name=f"n{i}", alpha=(i + 1) / 64))
        else:
            op = draw(st.sampled_from(["Relu", "Neg", "Add", "Mul", "Dead", "Reshape", "Sum"]))
            body += _random(op, a, b, i)
        made.append(f"v{i}")
    outs = draw(st.sets(st.sampled_from(made[2:]), min_size=1, max_size=3)) | {made[-1]}
    graph = make.make_graph(
        body, "g", [make.make_tensor_value_info("x", F32, [2, 3])],
        [make.make_tensor_value_info(o, F32, [2, 3]) for o in sorted(outs)],
        [onnx.numpy_helper.from_array(np.ones((2, 3), np.float32), "w")],
    )  # fmt: skip
    opsets = [make.make_opsetid("", 20)]
    model = make.make_model(graph, opset_imports=opsets, ir_version=10)
    return model, [(i + 1) / 64 for i in sorted(marks)], draw(st.booleans())


def _random(op: str, a: str, b: str, i: int) -> list[Any]:
    if op == "Reshape":
        return [
            make.make_node("Shape", [a], [f"s{i}"], name=f"s{i}"),
            make.make_node("Reshape", [b, f"s{i}"], [f"v{i}"], name=f"n{i}"),
        ]
    if op == "Sum":
        return [make.make_node("Sum", [a, b, a], [f"v{i}"], name=f"n{i}")]
    if op == "Dead":
        return [
            make.make_node("Exp", [a], [f"dead{i}"], name=f"d{i}"),
            make.make_node("Abs", [b], [f"v{i}"], name=f"n{i}"),
        ]
    return [make.make_node(op, [a] if op in ("Relu", "Neg") else [a, b], [f"v{i}"], name=f"n{i}")]


def marked(wanted: list[float], joined: bool) -> Check:
    """Fails where all marks stand and, if `joined`, the first of two leads to the second."""

    def fails(path: Path) -> bool:
        found = {
            round(n.attribute[0].f * 64) / 64: n
            for n in nodes(path)
            if n.op_type == MARK and n.attribute
        }
        if not set(wanted) <= set(found):
            return False
        return not joined or len(wanted) < 2 or _leads(nodes(path), *(found[w] for w in wanted[:2]))

    return fails


def _leads(body: list[Any], start: Any, goal: Any) -> bool:
    reached = set(start.output)
    for n in body:
        if reached & set(n.input):
            reached |= set(n.output)
    return bool(reached & set(goal.output)) and start.name != goal.name


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=graphs())
def test_random_graphs(case: tuple[Any, list[float], bool], tmp_path: Path) -> None:
    model, wanted, joined = case
    path, out = tmp_path / "model.onnx", tmp_path / "small.onnx"
    path.write_bytes(model.SerializeToString())
    valid(path)
    fails = marked(wanted, joined)
    if not fails(path):
        joined, fails = False, marked(wanted, False)
    done = reduce_model(path, fails, out)
    assert fails(out)
    valid(out)
    assert done.nodes[1] == len(wanted)


# -- what is kept and what is made constant --------------------------------------------------------


def shaped() -> Any:
    """``Reshape(x, Concat(Gather(Shape(x), 1), [2]))``, x[2, 6]."""
    body = [
        make.make_node("Shape", ["x"], ["s"]),
        make.make_node("Gather", ["s", "one"], ["n"]),
        make.make_node("Concat", ["n", "two"], ["t"], axis=0),
        make.make_node("Reshape", ["x", "t"], ["y"], name="r"),
    ]
    held = [("one", [1]), ("two", [2])]
    graph = make.make_graph(
        body, "g", [make.make_tensor_value_info("x", F32, ["batch", 6])],
        [make.make_tensor_value_info("y", F32, ["n", 2])],
        [onnx.numpy_helper.from_array(np.array(v, np.int64), n) for n, v in held],
    )  # fmt: skip
    return make.make_model(graph, opset_imports=[make.make_opsetid("", 20)], ir_version=10)


def test_computed_integers_become_recorded_constants(tmp_path: Path) -> None:
    path, out = tmp_path / "model.onnx", tmp_path / "small.onnx"
    path.write_bytes(shaped().SerializeToString())

    def fails(candidate: Path) -> bool:
        known = onnx.shape_inference.infer_shapes(onnx.load(candidate), data_prop=True)
        dims = known.graph.output[0].type.tensor_type.shape.dim
        kept = any(n.op_type == "Reshape" for n in known.graph.node)
        return kept and [d.dim_value for d in dims] == [6, 2]

    assert reduce_model(path, fails, out).nodes == (4, 1)
    (tensor,) = onnx.load(out).graph.initializer
    assert onnx.numpy_helper.to_array(tensor).tolist() == [6, 2]
    valid(out)


def test_values_of_unknown_rank_are_cut_where_a_run_showed_their_shape(tmp_path: Path) -> None:
    """How many numbers Compress lets through, and so the rank of the Reshape, is known to a run."""
    body = [
        make.make_node("Compress", ["sizes", "which"], ["shape"], axis=0),
        make.make_node("Reshape", ["x", "shape"], ["a"]),
        make.make_node("Relu", ["a"], ["b"]),
        make.make_node("Reshape", ["b", "flat"], ["y"]),
    ]
    held = {"sizes": [4, 1, 9], "which": [True, True, False], "flat": [-1]}
    graph = make.make_graph(
        body, "g", [make.make_tensor_value_info("x", F32, [2, 2])],
        [make.make_tensor_value_info("y", F32, ["n"])],
        [onnx.numpy_helper.from_array(np.array(v), n) for n, v in held.items()],
    )  # fmt: skip
    path, out = tmp_path / "model.onnx", tmp_path / "small.onnx"
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    valid(path)
    assert reduce_model(path, has_all("Relu"), out).nodes == (4, 1)
    assert len(onnx.load(out).graph.input[0].type.tensor_type.shape.dim) == 2
    valid(out)


def test_control_flow_keeps_what_its_branches_take(tmp_path: Path) -> None:
    branch = make.make_graph(
        [make.make_node("Add", ["h", "x"], ["q"])], "b", [],
        [make.make_tensor_value_info("q", F32, [2])],
    )  # fmt: skip
    body = [
        make.make_node("Relu", ["x"], ["h"]),
        make.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch),
        make.make_node("Neg", ["y"], ["z"]),
    ]
    graph = make.make_graph(
        body, "g",
        [make.make_tensor_value_info("x", F32, [2]),
         make.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])],
        [make.make_tensor_value_info("z", F32, [2])],
    )  # fmt: skip
    path, out = tmp_path / "model.onnx", tmp_path / "small.onnx"
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    assert reduce_model(path, has_all("If"), out).nodes == (3, 1)
    assert sorted(i.name for i in onnx.load(out).graph.input) == ["c", "h", "x"]
    valid(out)


def test_an_invalid_model_is_reduced_too(tmp_path: Path) -> None:
    model = shaped()
    model.graph.node.append(make.make_node("Add", ["x", "p2"], ["p1"], name="first"))
    model.graph.node.append(make.make_node("Relu", ["p1"], ["p2"], name="second"))
    path, out = tmp_path / "model.onnx", tmp_path / "small.onnx"
    path.write_bytes(model.SerializeToString())

    def in_a_circle(candidate: Path) -> bool:
        from pfmc.ingest import load

        try:
            load(candidate)
        except InputError as error:
            return "circle" in str(error)
        return False

    assert reduce_model(path, in_a_circle, out).nodes[1] <= 3
    assert in_a_circle(out)


def test_unused_functions_and_texts_go(tmp_path: Path) -> None:
    model = shaped()
    opsets = [make.make_opsetid("", 20)]
    body = [make.make_node("Relu", ["a"], ["b"])]
    for name in ("used", "unused"):
        model.functions.append(make.make_function("local", name, ["a"], ["b"], body, opsets))
    model.opset_import.append(make.make_opsetid("local", 1))
    model.graph.node.append(make.make_node("used", ["x"], ["u"], domain="local"))
    model.graph.output.append(make.make_tensor_value_info("u", F32, ["batch", 6]))
    model.doc_string = "long" * 1000
    path, out = tmp_path / "model.onnx", tmp_path / "small.onnx"
    path.write_bytes(model.SerializeToString())
    reduce_model(path, has_all("used"), out)
    small = onnx.load(out)
    assert [f.name for f in small.functions] == ["used"]
    assert not small.doc_string
    assert len(small.graph.node) == 1


# -- commands, limits, refusals --------------------------------------------------------------------


def script(tmp_path: Path, text: str) -> str:
    path = tmp_path / "check.py"
    path.write_text(f"import sys\n{text}\n")
    return f"{sys.executable} {path}"


def small_model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(shaped().SerializeToString())
    return path


def test_the_path_comes_last_or_for_braces() -> None:
    assert Command("check --fast").words(Path("m.onnx")) == ["check", "--fast", "m.onnx"]
    assert Command("a '{}' -o={}.x b").words(Path("m n")) == ["a", "m n", "-o=m n.x", "b"]


@pytest.mark.parametrize(
    ("code", "more", "expected"),
    [(0, {}, False), (3, {}, True), (3, {"exit_code": 3}, True), (4, {"exit_code": 3}, False),
     (1, {"match": "no .*good"}, True), (1, {"match": "splendid"}, False)],
)  # fmt: skip
def test_what_counts_as_failing(
    code: int, more: dict[str, Any], expected: bool, tmp_path: Path
) -> None:
    check = Command(script(tmp_path, f"print('no so good'); sys.exit({code})"), **more)
    assert check(tmp_path) is expected
    assert f"exit code {code}" in check.last


def test_a_check_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    child = (
        "import subprocess; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    start = time.monotonic()
    check = Command(script(tmp_path, child), timeout_s=0.5)
    assert not check(tmp_path)
    assert time.monotonic() - start < 10
    assert "ran out of time" in check.last


def test_a_check_that_hangs_fails_if_that_is_asked(tmp_path: Path) -> None:
    check = Command(script(tmp_path, "import time; time.sleep(60)"), 0.2, timeout_fails=True)
    assert check(tmp_path)


def test_an_interrupt_keeps_the_best_so_far(tiny: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "small.onnx", tmp_path / "smaller.onnx"
    asked: list[Path] = []

    def interrupted(path: Path) -> bool:
        asked.append(path)
        if len(asked) == 8:
            raise KeyboardInterrupt
        return has_all("Softmax")(path)

    done = reduce_model(tiny, interrupted, out)
    assert (done.interrupted, done.finished) == (True, False)
    assert 1 < done.nodes[1] < done.nodes[0]
    assert has_all("Softmax")(out)
    assert reduce_model(out, has_all("Softmax"), again).nodes == (done.nodes[1], 1)


def two_products(tmp_path: Path) -> Path:
    """``Softmax((x @ w) @ w)`` with w [256, 256] outside the file, and a needless attribute."""
    w = onnx.numpy_helper.from_array(np.full((256, 256), 3, np.float32), "w")
    body = [
        make.make_node("MatMul", ["x", "w"], ["a"]),
        make.make_node("MatMul", ["a", "w"], ["b"]),
        make.make_node("Softmax", ["b"], ["y"], axis=1),
    ]
    value = make.make_tensor_value_info
    graph = make.make_graph(
        body, "g", [value("x", F32, [2, 256])], [value("y", F32, [2, 256])], [w]
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 20)], ir_version=10)
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.data", size_threshold=0)
    return path


def test_data_outside_the_file_shrinks_too(tmp_path: Path) -> None:
    out = tmp_path / "small.onnx"

    def fails(path: Path) -> bool:
        model = onnx.load(path)
        held = {t.name for t in model.graph.initializer if len(t.dims) == 2}
        return any(n.op_type == "MatMul" and n.input[1] in held for n in model.graph.node)

    reduce_model(two_products(tmp_path), fails, out)
    (tensor,) = onnx.load(out, load_external_data=False).graph.initializer
    assert list(tensor.dims) == [1, 1]
    assert not (tmp_path / "small.onnx.data").exists()
    valid(out)


def test_numbers_become_zeros_and_attributes_go(tmp_path: Path) -> None:
    out = tmp_path / "small.onnx"

    def fails(path: Path) -> bool:
        model = onnx.load(path)
        large = [t for t in model.graph.initializer if t.dims[0] == 256]
        return bool(large) and {"MatMul", "Softmax"} <= {n.op_type for n in model.graph.node}

    reduce_model(two_products(tmp_path), fails, out)
    graph = onnx.load(out).graph
    assert not onnx.numpy_helper.to_array(graph.initializer[0]).any()
    assert not any(n.attribute for n in graph.node)
    valid(out)


@pytest.mark.parametrize("text", ["", "'", "no-such-program-anywhere"])
def test_checks_that_cannot_be_run(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        Command(text)(tmp_path)


def test_no_regular_expression() -> None:
    with pytest.raises(UsageError, match="regular expression"):
        Command("true", match="(")


def test_refusals(tmp_path: Path) -> None:
    path = small_model(tmp_path)
    with pytest.raises(UsageError, match="does not fail"):
        reduce_model(path, lambda _: False, tmp_path / "out.onnx")
    with pytest.raises(UsageError, match="replace the model"):
        reduce_model(path, lambda _: True, path)
    with pytest.raises(UsageError, match="no such folder"):
        reduce_model(path, lambda _: True, tmp_path / "none" / "out.onnx")
    with pytest.raises(InputError, match="fails no more"):
        reduce_model(path, lambda p: p == path, tmp_path / "out.onnx")
    with pytest.raises(UsageError):
        reduce_model(tmp_path / "missing.onnx", lambda _: True, tmp_path / "out.onnx")
    (tmp_path / "junk.onnx").write_bytes(b"GGUF1234")
    with pytest.raises(InputError, match="GGUF"):
        reduce_model(tmp_path / "junk.onnx", lambda _: True, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_the_total_time_keeps_the_best_so_far(tiny: Path, tmp_path: Path) -> None:
    def slow(path: Path) -> bool:
        time.sleep(0.05)
        return has_all("Softmax")(path)

    done: Reduction = reduce_model(tiny, slow, tmp_path / "small.onnx", total_s=0.3)
    assert not done.finished
    assert 1 <= done.nodes[1] < done.nodes[0]
    assert has_all("Softmax")(tmp_path / "small.onnx")


def test_large_external_data_stays_beside(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pfmc.ingest import shrink

    monkeypatch.setattr(shrink, "EMBED_BYTES", 0)
    out = tmp_path / "small.onnx"
    subject = shrink.open_subject(tiny)
    shrink.write(subject.proto, out, subject.external)
    assert (tmp_path / "small.onnx.data").stat().st_size > 64 * 64 * 2
    assert weight_of_64(out)
    valid(out)
