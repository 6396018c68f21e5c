"""The benchmarks' own arithmetic: goals, tables, and a small generated model that compiles."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks.bench_large import floor
from benchmarks.figure import Figure, table, to_json
from benchmarks.synthetic import Shape, generate
from pfmc.compile import compile_model
from pfmc.rounding import unpack_int4
from pfmc.store import layer_records

TINY = Shape(layers=2, hidden=64, heads=4, ffn=96, vocabulary=128)


def test_goals_are_met_or_not() -> None:
    assert Figure("a", 1.0, "x").met is None
    assert Figure("a", 1.0, "x", 1.0).met is True
    assert Figure("a", 1.1, "x", 1.0).met is False
    assert Figure("a", 1.1, "x", 1.0, at_least=True).met is True
    assert Figure("a", float("nan"), "x", 1.0).met is False


def test_table_and_json_hold_every_figure() -> None:
    figures = [Figure("a", 1.5, "x", 1.0, beside="b 2.0 ms"), Figure("c", 3, "MB")]
    lines = table(figures).splitlines()
    assert len(lines) == 3
    assert "NO" in lines[1]
    assert "<= 1" in lines[1]
    held = json.loads(to_json(figures))["figures"]
    assert [(f["what"], f["met"]) for f in held] == [("a", False), ("c", None)]


def test_the_floor_rounds_plainly(tmp_path: Path) -> None:
    generate(tmp_path, TINY)
    floor(tmp_path, TINY)
    data = np.fromfile(tmp_path / "model.data", np.float16, 128 * 64).reshape(128, 64)
    held = (tmp_path / "floor.bin").read_bytes()
    scale = np.frombuffer(held, np.float32, 64)
    codes = unpack_int4(np.frombuffer(held, np.uint8, 128 * 32, 256), (128, 64))
    np.testing.assert_array_equal(scale, np.abs(data.astype(np.float32)).max(axis=0) / 7)
    np.testing.assert_array_equal(codes, np.rint(data.astype(np.float32) / scale))


def test_the_generated_model_compiles_to_every_fixed_linear(tmp_path: Path) -> None:
    model = generate(tmp_path, TINY)
    made = compile_model(model, tmp_path / "out.pfm", target="rom", recipe="stream")
    frequencies = TINY.head_dim // 2
    assert made.report["model"]["parameters"] == TINY.parameters + frequencies
    names = {r.name for r in layer_records(tmp_path / "out.pfm")}
    wanted = {n.removesuffix(".weight") for n, s in TINY.weights() if len(s) == 2}
    assert names == wanted - {"model.embed_tokens"}
