"""``pfmc reduce`` from the command line: with a script, with pfmc itself, and its errors."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
make = onnx.helper


@pytest.fixture
def softmax_check(tmp_path: Path) -> str:
    """A command that fails where a Softmax stands."""
    path = tmp_path / "check.py"
    path.write_text(
        "import sys\n"
        "sys.exit(b'Softmax' in open(sys.argv[1], 'rb').read())\n"  # only its nodes bear the word
    )
    return f"{sys.executable} {path}"


def test_with_a_script(
    tiny: Path, tmp_path: Path, softmax_check: str, here: Callable[..., Any]
) -> None:
    out = tmp_path / "small.onnx"
    done = here("reduce", tiny, "--check", softmax_check, "-o", out)
    assert (done.code, done.err) == (0, "")
    assert [n.op_type for n in onnx.load(out).graph.node] == ["Softmax"]
    assert hashlib.sha256(out.read_bytes()).hexdigest() in done.out
    assert f"nodes:   {len(onnx.load(tiny).graph.node)} -> 1" in done.out


def test_json(tmp_path: Path, here: Callable[..., Any]) -> None:
    path = dice(tmp_path)
    body = here("reduce", path, "--check", "false", "-o", tmp_path / "s.onnx", "--json").json()
    assert body["schema_version"] == 1
    assert body["nodes"] == [2, 1]
    assert body["finished"] is True
    assert set(body) == {
        "schema_version", "path", "sha256", "nodes", "bytes", "checks", "finished", "interrupted",
    }  # fmt: skip


def dice(tmp_path: Path) -> Path:
    """A model that ingest refuses for one node of two."""
    body = [
        make.make_node("MatMul", ["x", "w"], ["a"], name="fc"),
        make.make_node("Bernoulli", ["a"], ["y"], name="odd"),
    ]
    value = make.make_tensor_value_info
    graph = make.make_graph(
        body, "g", [value("x", 1, ["batch", 4])], [value("y", 1, ["batch", 3])],
        [onnx.numpy_helper.from_array(np.ones((4, 3), np.float32), "w")],
    )  # fmt: skip
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 20)], ir_version=10)
    path = tmp_path / "odd.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.slow
def test_with_pfmc_itself(
    tmp_path: Path, here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).resolve().parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), *sys.path[1:]]))
    check = f"{sys.executable} -m pfmc inspect {{}}"  # quicker than compile, refused by the same
    out = tmp_path / "small.onnx"
    done = here(
        "reduce", dice(tmp_path), "--check", check, "--exit-code", 3, "--match", "Bernoulli",
        "-o", out,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert [n.op_type for n in onnx.load(out).graph.node] == ["Bernoulli"]


def test_errors(tmp_path: Path, softmax_check: str, here: Callable[..., Any]) -> None:
    path = dice(tmp_path)
    here("reduce", path, "--check", softmax_check).refused(2, "does not fail", "exit code 0")
    here("reduce", path).refused(2, "check")
    here("reduce", path, "--check", "no-such-program").refused(2, "cannot run the check")
    here("reduce", path, "--check", "false", "--timeout", 0).refused(2)
    here("reduce", path, "--check", "false", "-o", path).refused(2, "replace the model")
    here("reduce", tmp_path / "no.onnx", "--check", "false").refused(2, "No such file")
    here("reduce", path, "--check", "false", "--match", "(").refused(2, "regular expression")


def test_lint_from_the_command_line(tmp_path: Path, here: Callable[..., Any]) -> None:
    path = dice(tmp_path)
    done = here("inspect", "--lint", path)
    assert (done.code, done.err) == (3, "")
    assert "PFM103 error   Bernoulli (draws random numbers) x 1\n    where: node 'odd'" in done.out
    as_json = here("inspect", "--lint", path, "--json")
    body = json.loads(as_json.out)
    assert (as_json.code, body["schema_version"], body["counts"]["error"]) == (3, 1, 1)
    here("inspect", "--lint", path, "--dot").refused(2, "choose one")
    here("inspect", path, "--recipe", "rom").refused(2, "--lint")
    here("inspect", "--lint", path, "--recipe", "nobodys").refused(2)
    here("inspect", "--lint", tmp_path / "no.onnx").refused(2, "No such file")
