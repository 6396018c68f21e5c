"""What fuzzing once broke stays mended, and a few hundred fresh damages break nothing.

`fuzz` is the driver for an hour by hand; a finding of it goes into ``corpus/``.
"""

from __future__ import annotations

import itertools
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from pfmc import ingest
from pfmc.errors import InputError
from pfmc.passes import pipeline, recipe

from . import fuzz, fuzz_seeds

F32, I64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
CORPUS = sorted(fuzz_seeds.CORPUS.glob("*.onnx"))


@pytest.mark.parametrize("seed", fuzz_seeds.small()[:8], ids=range(8))
def test_seeds_are_not_findings(seed: bytes, tmp_path: Path) -> None:
    path = fuzz.place(tmp_path)
    path.write_bytes(seed)
    fuzz.probe(path)


@pytest.mark.parametrize("case", CORPUS, ids=lambda p: p.stem)
def test_what_was_found_is_mended(case: Path, tmp_path: Path) -> None:
    path = fuzz.place(tmp_path)
    path.write_bytes(case.read_bytes())
    fuzz.probe(path)


def test_the_corpus_is_small() -> None:
    assert sum(p.stat().st_size for p in fuzz_seeds.CORPUS.iterdir()) < 200_000


@pytest.mark.parametrize("seed", range(4))
def test_fresh_damages_break_nothing(seed: int, tmp_path: Path) -> None:
    path = fuzz.place(tmp_path)
    for data in itertools.islice(fuzz.cases(seed), 100):
        path.write_bytes(data)
        fuzz.probe(path)


# -- the messages --------------------------------------------------------------------------------


def _const(name: str, *numbers: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(numbers, np.int64), name)


def _model(nodes: list[Any], held: list[Any], opset: int = 20) -> Any:
    ends = [[helper.make_tensor_value_info(n, F32, d)] for n, d in (("x", ["n", 8]), ("y", None))]
    graph = helper.make_graph(nodes, "g", *ends, held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def _refused(save: Callable[[Any], Path], model: Any) -> str:
    with pytest.raises(InputError) as caught:
        loaded = ingest.load(save(model))
        pipeline.canonicalise(loaded.model, recipe.load("stream").passes)
    return str(caught.value)


def test_a_vector_too_long_for_a_shape(save: Callable[[Any], Path]) -> None:
    """onnx's inference would take ten gigabytes to write its 2**27 elements out."""
    nodes = [
        helper.make_node("Tile", ["one", "often"], ["long"]),
        helper.make_node("Gather", ["long", "zero"], ["first"]),
        helper.make_node("Cast", ["first"], ["real"], to=F32),
        helper.make_node("Add", ["x", "real"], ["y"]),
    ]
    held = [_const("one", 1), _const("often", 2**27), _const("zero", 0)]
    path = save(_model(nodes, held))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = pipeline.canonicalise(ingest.load(path).model, recipe.load("stream").passes).model
    assert [v.name for v in model.graph.outputs] == ["y"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


@pytest.mark.parametrize(
    ("op", "inputs"),
    [("ConstantOfShape", ["big"]), ("Expand", ["c", "big"]), ("Tile", ["c", "big"]),
     ("Pad", ["c", "pads"])],
)  # fmt: skip
def test_constants_that_grow(op: str, inputs: list[str], save: Callable[[Any], Path]) -> None:
    nodes = [
        helper.make_node("Mul", ["half", "half"], ["big"]),
        helper.make_node("Concat", ["nought", "big"], ["pads"], axis=0),
        helper.make_node(op, inputs, ["huge"]),
        helper.make_node("ReduceSum", ["huge"], ["sum"], keepdims=0),
        helper.make_node("Add", ["x", "sum"], ["y"]),
    ]
    held = [_const("half", 2**20), _const("nought", 0),
            numpy_helper.from_array(np.ones(1, np.float32), "c")]  # fmt: skip
    assert _refused(save, _model(nodes, held))


def test_a_call_leaves_out_an_output_but_no_needed_input(save: Callable[[Any], Path]) -> None:
    body = [
        helper.make_node("Add", ["a", "b"], ["s"]),
        helper.make_node("Sub", ["a", "b"], ["d"]),
    ]
    imports = [helper.make_opsetid("", 20)]
    function = helper.make_function("local", "Both", ["a", "b"], ["s", "d"], body, imports)

    def calling(*inputs: str) -> Any:
        model = _model([helper.make_node("Both", list(inputs), ["y", ""], domain="local")], [])
        model.functions.append(function)
        model.opset_import.append(helper.make_opsetid("local", 1))
        return model

    assert [n.op_type for n in ingest.load(save(calling("x", "x"))).model.graph] == ["Add"]
    assert "does not fit its operator" in _refused(save, calling("x"))
    assert "3 inputs are given to a function of 2" in _refused(save, calling("x", "x", "x"))


def test_axes_given_twice(save: Callable[[Any], Path]) -> None:
    nodes = [
        helper.make_node("Concat", ["one", "one"], ["axes"], axis=0),
        helper.make_node("Unsqueeze", ["x", "axes"], ["y"]),
    ]
    assert _refused(save, _model(nodes, [_const("one", 1)]))
