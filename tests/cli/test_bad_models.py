"""Model files that are no good: one clear message, exit code 2 or 3, and nothing written."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

Model = Any


def small(weight: np.ndarray | None = None) -> Model:
    """``y = relu(x @ fc.weight)`` with x [batch, 4] and y [batch, 3]."""
    rng = np.random.default_rng(0)
    held = rng.normal(size=(4, 3)).astype(np.float32) if weight is None else weight
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "fc.weight"], ["h"], name="fc"),
            helper.make_node("Relu", ["h"], ["y"], name="act"),
        ],
        "small",
        [helper.make_tensor_value_info("x", kind, ["batch", 4])],
        [helper.make_tensor_value_info("y", kind, ["batch", 3])],
        [onnx.numpy_helper.from_array(held, "fc.weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def external(model: Model, location: str, length: int = 48) -> None:
    """Says that the weight lies in another file."""
    (tensor,) = model.graph.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", 0), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


@pytest.fixture
def compiled(here: Callable[..., Any], tmp_path: Path) -> Callable[[Model | bytes], Any]:
    """Compiles a model that must be refused; nothing may be left behind."""

    def call(model: Model | bytes) -> Any:
        path = tmp_path / "model.onnx"
        path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
        before = sorted(tmp_path.rglob("*"))
        done = here("compile", path, "--target", "rom", "-o", tmp_path / "out.pfm")
        assert sorted(tmp_path.rglob("*")) == before
        return done

    return call


def test_the_sound_model_is_taken(here: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(small().SerializeToString())
    assert here("compile", path, "--target", "rom", "-o", tmp_path / "out.pfm").code == 0
    assert here("check", tmp_path / "out.pfm").code == 0


class _Bomb:
    """Unpickling this makes a file: nobody may do it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "text": (b"hello world\n" * 50, "model.onnx"),
    "random": (random.Random(0).randbytes(4096), "model.onnx"),
    "pickle": (pickle.dumps(_Bomb()), "pickle"),
    "zip": (b"PK\x03\x04" + bytes(200), "zip"),
    "gguf": (b"GGUF" + bytes(200), "GGUF"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_model_is_refused(name: str, compiled: Callable[..., Any]) -> None:
    content, phrase = FILES[name]
    done = compiled(content)
    done.refused(3)
    assert phrase.lower() in done.err.lower()
    assert not Path("unpickled").exists()


@pytest.mark.parametrize("share", [0.05, 0.4, 0.8, 0.99])
def test_a_truncated_model_is_refused(share: float, compiled: Callable[..., Any]) -> None:
    whole = small().SerializeToString()
    compiled(whole[: int(len(whole) * share)]).refused(3, "model.onnx")


@pytest.mark.parametrize("seed", range(60))
def test_flipped_bits_never_show_a_traceback(
    seed: int, here: Callable[..., Any], tmp_path: Path
) -> None:
    """Either the damage is harmless (a name, a weight) or it is refused."""
    rng, content = random.Random(seed), bytearray(small().SerializeToString())
    for _ in range(rng.randint(1, 4)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    done = here("compile", path, "--target", "rom", "-o", tmp_path / "out.pfm")
    if done.code:
        assert done.code in (3, 5), done.err
        done.refused(done.code)
        assert not (tmp_path / "out.pfm").exists()


def _cycle(model: Model) -> None:
    model.graph.node[0].input[0] = "y"


def _undefined(model: Model) -> None:
    model.graph.node[0].input[0] = "nowhere"


def _duplicate(model: Model) -> None:
    model.graph.node[1].output[0] = "h"


def _duplicate_weight(model: Model) -> None:
    model.graph.initializer.append(model.graph.initializer[0])


def _negative_dim(model: Model) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = -4


def _overflowing_dims(model: Model) -> None:
    del model.graph.initializer[0].dims[:]
    model.graph.initializer[0].dims.extend([1 << 40, 1 << 40])


def _wrong_size(model: Model) -> None:
    model.graph.initializer[0].dims[1] = 5


def _shapes(model: Model) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 7


def _no_output(model: Model) -> None:
    del model.graph.output[:]


def _future_opset(model: Model) -> None:
    model.opset_import[0].version = 999


GRAPHS: dict[str, tuple[Callable[[Model], None], tuple[str, ...]]] = {
    "cycle": (_cycle, ("circle", "act -> fc")),
    "undefined name": (_undefined, ("'nowhere'", "'fc'")),
    "duplicate name": (_duplicate, ("'h'", "twice", "'act'")),
    "duplicate weight": (_duplicate_weight, ("'fc.weight'",)),
    "negative dim": (_negative_dim, ("-4", "'x'")),
    "overflowing dims": (_overflowing_dims, ("'fc.weight'",)),
    "size unlike dims": (_wrong_size, ("'fc.weight'",)),
    "shape mismatch": (_shapes, ("fc",)),
    "no output": (_no_output, ("no outputs",)),
    "future opset": (_future_opset, ("Opset 999",)),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_broken_graph_is_refused(name: str, compiled: Callable[..., Any]) -> None:
    harm, phrases = GRAPHS[name]
    model = small()
    harm(model)
    compiled(model).refused(3, "model.onnx", *phrases)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_is_refused(bad: float, compiled: Callable[..., Any]) -> None:
    weight = np.ones((4, 3), np.float32)
    weight[2, 1] = bad
    compiled(small(weight)).refused(3, "fc.weight")


def test_all_unknown_operators_are_listed_with_their_counts(compiled: Callable[..., Any]) -> None:
    model = small()
    for i, (domain, op) in enumerate([("my.domain", "Foo")] * 3 + [("", "NoSuchOp")] * 2):
        node = onnx.helper.make_node(op, ["h"], [f"z{i}"], name=f"bad{i}", domain=domain)
        model.graph.node.append(node)
    model.opset_import.add(domain="my.domain", version=1)
    compiled(model).refused(3, "my.domain::Foo", "x 3", "'bad0'", "NoSuchOp", "x 2", "'bad3'")


EXTERNAL = {
    "missing": "gone.data",
    "absolute": "/etc/passwd",
    "outside": "../weights.data",
    "short": "short.data",
    "empty": "",
}


@pytest.mark.parametrize("name", EXTERNAL)
def test_external_data_out_of_reach_is_refused(
    name: str, compiled: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "short.data").write_bytes(bytes(40))
    model = small()
    external(model, EXTERNAL[name])
    compiled(model).refused(3, "'fc.weight'")


def test_a_link_out_of_the_folder_needs_trust(
    here: Callable[..., Any], compiled: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "blobs"
    folder.mkdir()
    (folder / "blob").write_bytes(np.ones((4, 3), np.float32).tobytes())
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.data").symlink_to(folder / "blob")
    model = small()
    external(model, "model.data")
    path = tmp_path / "snapshot" / "model.onnx"
    path.write_bytes(model.SerializeToString())
    words = ("compile", path, "--target", "rom", "-o", tmp_path / "out.pfm")
    here(*words).refused(3, "'fc.weight'", "--trust-root")
    assert here(*words, "--trust-root", tmp_path).code == 0


def test_a_missing_file_names_the_nearest(here: Callable[..., Any], tiny: Path) -> None:
    for verb in (("compile", "--target", "rom"), ("inspect",), ("passes", "rom", "--explain")):
        here(*verb, tiny.with_suffix(".onx")).refused(2, "No such file", f"did you mean {tiny}")


def test_a_folder_is_no_model(here: Callable[..., Any], tiny: Path) -> None:
    here("compile", tiny.parent, "--target", "rom").refused(2, "folder", str(tiny))


def test_the_real_command_line_refuses_alike(
    pfmc: Callable[..., Any], here: Callable[..., Any], tmp_path: Path
) -> None:
    """The same words through a process of their own: same code, same message."""
    _cycle(model := small())
    for name, content in (("cycle", model.SerializeToString()), ("pickle", FILES["pickle"][0])):
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(content)
        words = ("compile", path, "--target", "rom", "-o", tmp_path / "out.pfm")
        done = pfmc(*words)
        done.refused(3)
        assert done == here(*words)
    missing = pfmc("compile", tmp_path / "cycl.onnx", "--target", "rom")
    missing.refused(2, "did you mean", "cycle.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cycle.onnx", "pickle.onnx"]
