"""The pipeline: checks, counts, dumps, stops, explains, and a crash that can be seen again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

import pfmc.passes
from pfmc.errors import InputError, InternalError, UsageError
from pfmc.ir import provenance
from pfmc.passes import instruments, pipeline
from pfmc.passes.base import Context, Declined, Pass, PassResult
from pfmc.passes.fold import Fold
from pfmc.passes.linears import Linears
from pfmc.passes.pipeline import Settings


@dataclass(frozen=True)
class Clumsy(Pass):
    """Fails in one of several ways."""

    name: ClassVar[str] = "clumsy"
    how: str = "raise"

    def apply(self, model: ir.Model, context: Context) -> PassResult:
        if self.how == "raise":
            raise ZeroDivisionError("by nought")
        if self.how == "refuse":
            raise InputError("not this model")
        if self.how == "dangle":
            model.graph.outputs[0] = ir.Value(name="nowhere")
        if self.how == "forget":
            next(iter(model.graph)).metadata_props.clear()
        return PassResult(model, 0, (Declined(self.name, "here", "too hard"),), {"tries": 1})


@pytest.fixture(autouse=True)
def _register(monkeypatch: pytest.MonkeyPatch) -> None:
    found = pfmc.passes.get
    monkeypatch.setattr(pfmc.passes, "get", lambda n: Clumsy if n == "clumsy" else found(n))


def mlp() -> ir.Model:
    """Two products with constants and an Identity between them."""
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", shape=ir.Shape(["n", 64]), type=ir.TensorType(ir.DataType.FLOAT))
    weights = [
        ir.Value(name=n, const_value=ir.tensor(rng.standard_normal((64, 64), np.float32), name=n))
        for n in ("fc1.weight", "fc2.weight")
    ]
    first = ir.node("MatMul", [x, weights[0]])
    idle = ir.node("Identity", [first.outputs[0]])
    second = ir.node("MatMul", [idle.outputs[0], weights[1]])
    for node, name in ((first, "a"), (idle, "b"), (second, "c")):
        node.outputs[0].name = name
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape(["n", 64])
    graph = ir.Graph(
        [x], second.outputs, nodes=[first, idle, second], initializers=weights,
        opset_imports={"": 24}, name="g",
    )  # fmt: skip
    model = ir.Model(graph, ir_version=11)
    provenance.stamp(model)
    return model


def test_counts_times_and_progress() -> None:
    told: list[str] = []
    outcome = pipeline.canonicalise(mlp(), [Fold(), Linears()], Context(progress=told.append))
    fold, linears = outcome.steps
    assert (fold.label, linears.label) == ("01_fold", "02_linears")
    assert fold.difference() == {"Identity": -1}
    assert linears.difference() == {"MatMul": -2, "pfmc.FixedLinear": 2}
    assert linears.changed == 2
    assert told == ["1/2 fold", "2/2 linears"]
    assert set(outcome.timing_s()) == {"01_fold", "02_linears"}
    assert all(t >= 0 for t in outcome.timing_s().values())
    assert linears.report()["operators"] == {"MatMul": -2, "pfmc.FixedLinear": 2}
    assert not outcome.stopped


@pytest.mark.parametrize(("stop", "count"), [("fold", 1), ("02_linears", 2), ("03_fold", 3)])
def test_stop_after(stop: str, count: int) -> None:
    outcome = pipeline.run(mlp(), [Fold(), Linears(), Fold()], None, Settings(stop_after=stop))
    assert len(outcome.steps) == count
    assert outcome.stopped


def test_stop_after_an_unknown_pass() -> None:
    with pytest.raises(UsageError, match="'fild'") as caught:
        pipeline.run(mlp(), [Fold()], None, Settings(stop_after="fild"))
    assert "did you mean" in caught.value.mend


def test_what_is_left_over_is_refused_with_the_node() -> None:
    with pytest.raises(InputError, match="did not become a fixed linear") as caught:
        pipeline.canonicalise(mlp(), [Fold()])
    assert "(MatMul) n0" in caught.value.where


def test_dump(tmp_path: Path) -> None:
    pipeline.run(mlp(), [Fold(), Fold(), Linears()], None, Settings(dump=tmp_path))
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [
        "01_fold.onnx", "01_fold.txt", "03_linears.onnx", "03_linears.txt", "source.onnx",
        "source.txt",
    ]  # fmt: skip
    assert "Identity" in (tmp_path / "source.txt").read_text()
    assert "pfmc.FixedLinear(%x, @fc1.weight[64,64]" in (tmp_path / "03_linears.txt").read_text()
    assert (tmp_path / "03_linears.onnx").stat().st_size < 4000
    again = instruments.load_slim(tmp_path / "03_linears.onnx")
    noise = again.graph.initializers["fc1.weight"].const_value
    assert noise is not None
    assert noise.numpy().std() == pytest.approx(0.02, rel=0.1)
    session = onnxruntime.InferenceSession(ir.to_proto(again).SerializeToString())
    assert session.run(None, {"x": np.ones((3, 64), np.float32)})[0].shape == (3, 64)


@pytest.mark.parametrize("how", ["raise", "dangle", "forget"])
@pytest.mark.parametrize("keep", [False, True])
def test_a_crash_replays(tmp_path: Path, how: str, keep: bool) -> None:
    model = mlp()
    real = model.graph.initializers["fc1.weight"].const_value
    assert real is not None
    settings = Settings(reproducer=tmp_path / "crash", keep_weights=keep)
    with pytest.raises(InternalError) as caught:
        pipeline.run(model, [Fold(), Clumsy(how), Linears()], Context(seed=3), settings)
    assert str(tmp_path / "crash") in caught.value.mend
    story = json.loads((tmp_path / "crash" / "reproducer.json").read_text())
    assert story["pass"] == [{"name": "clumsy", "how": how}]
    assert story["seed"] == 3
    assert "numpy" in story["versions"]
    assert "Traceback" in (tmp_path / "crash" / "traceback.txt").read_text()
    before, _, _ = instruments.read_reproducer(tmp_path / "crash")
    assert [n.op_type for n in before.graph] == ["MatMul", "MatMul"]
    held = before.graph.initializers["fc1.weight"].const_value
    assert held is not None
    assert np.array_equal(held.numpy(), real.numpy()) is keep
    with pytest.raises((ZeroDivisionError, InternalError)) as replayed:
        pipeline.replay(tmp_path / "crash")
    assert isinstance(replayed.value, ZeroDivisionError) is (how == "raise")


def test_a_refusal_is_no_crash() -> None:
    with pytest.raises(InputError, match="not this model"):
        pipeline.run(mlp(), [Clumsy("refuse")])


def test_checks_can_be_left_out() -> None:
    outcome = pipeline.run(mlp(), [Clumsy("forget")], None, Settings(verify_each=False))
    assert outcome.reasons() == {"here": "too hard"}


def test_a_folder_that_is_no_reproducer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a crash reproducer"):
        pipeline.replay(tmp_path)


def test_explain_leaves_the_model_alone() -> None:
    model = mlp()
    told = pipeline.explain(model, [Fold(), Linears(), Clumsy("fine")])
    assert [n.op_type for n in model.graph] == ["MatMul", "Identity", "MatMul"]
    assert any("Identity" in line for line in told[0].removed)
    assert sum("FixedLinear" in line for line in told[1].added) == 2
    assert "02_linears: 2 changed (MatMul -2, pfmc.FixedLinear +2)" in told[1].to_text()
    assert "declined here: too hard" in told[2].to_text()
