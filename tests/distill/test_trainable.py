"""Trainable layers and models: they start where the quantiser ended and settle what they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pfmc import formats
from pfmc.compile import Options, Prepared, prepare
from pfmc.distill.batching import freed
from pfmc.distill.student import Student
from pfmc.distill.trainable import InputGrid, TrainableLinear
from pfmc.distill.trainee import IDEAL, Trainee, build
from pfmc.errors import UsageError
from pfmc.hardware import FixedLinear, QuantisedMatrix
from pfmc.passes.records import linear_record, quantised_linears
from pfmc.targets.exact import ExactTwin


def record(form: str = "int", bits: int = 3, group: int = 0) -> FixedLinear:
    rng = np.random.default_rng(0)
    known = formats.of(form, bits)
    weight = rng.standard_normal((24, 6)).astype(np.float32)
    group = group or 24
    scale = np.abs(weight).reshape(-1, group, 6).max(axis=1) / known.top
    wide = np.repeat(scale, group, axis=0)
    codes = known.codes((weight / wide).astype(np.float64)).astype(np.int8)
    matrix = QuantisedMatrix(codes, known.bits, scale.astype(np.float32), group, format=form)
    bias = rng.standard_normal(6).astype(np.float32)
    return FixedLinear("net.layer", matrix, bias, 8, 0.02, None)


@pytest.mark.parametrize("form", ["int", "midrise", "ternary"])
@pytest.mark.parametrize("group", [0, 8])
def test_a_layer_starts_at_its_codes_and_settles_to_them(form: str, group: int) -> None:
    start = record(form, 2 if form == "ternary" else 3, group)
    real = torch.from_numpy(start.matrix.weights()) + 0.3 * torch.randn(24, 6)
    layer = TrainableLinear(start, real, InputGrid(8, 0.02), ExactTwin())
    np.testing.assert_allclose(
        layer.rounded().detach().T, start.matrix.weights(), rtol=1e-5, atol=1e-6
    )
    state = {n: p.detach() for n, p in layer.named_parameters()}
    done = layer.settled(start, state)
    np.testing.assert_array_equal(done.matrix.codes, start.matrix.codes)
    np.testing.assert_allclose(done.matrix.scale, start.matrix.scale, rtol=1e-6)
    np.testing.assert_array_equal(done.bias, start.bias)
    assert done.input_scale == pytest.approx(0.02)
    x = torch.randn(5, 24)
    y = torch.round(x / 0.02).clamp(-127, 127) * 0.02 @ torch.from_numpy(done.matrix.weights())
    np.testing.assert_allclose(layer(x).detach(), y + done.bias, atol=1e-4)


def test_formats_with_bound_scales_are_refused() -> None:
    start = record()
    other = FixedLinear(
        "net.layer", QuantisedMatrix(start.matrix.codes, 4, start.matrix.scale, 24, format="mxfp4"),
        None, 8, None,
    )  # fmt: skip
    with pytest.raises(UsageError, match="not mxfp4"):
        TrainableLinear(other, torch.zeros(24, 6), InputGrid(8, None), ExactTwin())


# -- whole models ---------------------------------------------------------------------------------


def trainee_of(prepared: Prepared) -> tuple[Trainee, Student, Student]:
    """The trainee, the quantised model it starts from, and the teacher."""
    model, teacher = freed(prepared.model), Student(freed(prepared.teacher))
    known = prepared.statistics
    records = {
        str(n.name): linear_record(n, known.get(str(n.name))) for n in quantised_linears(model)
    }
    weights = {n: m.weight for n, m in teacher.linears.items()}
    made = build(
        model,
        records,
        weights,
        lambda r: prepared.target.twin(r, prepared.tech),  # type: ignore[arg-type]
    )
    return made, Student(model), teacher


@pytest.mark.parametrize("target", ["rom", "crossbar"])
def test_a_trainee_computes_what_the_quantised_model_computes(tiny: Path, target: str) -> None:
    settings = ("calibration.sequences=2", "calibration.length=16")
    trainee, quantised, _ = trainee_of(prepare(tiny, Options(target=target, settings=settings)))
    trainee.face(IDEAL, converters=False)
    ids = np.random.default_rng(0).integers(0, 128, (3, 12))
    feeds = {"input_ids": ids}
    feeds |= {n: np.zeros((3, 4, 0, 16), np.float32) for n in quantised.input_names if "past" in n}
    with torch.no_grad():
        ours, truth = trainee.student.eval()(**feeds), quantised.eval()(**feeds)
    off = (ours["logits"] - truth["logits"]).abs()
    assert float(off.median()) < 1e-5  # an input at the edge between two codes may fall otherwise
    assert float(off.max()) < 0.1
    inputs = {id(m._grid[0]) for m in trainee.linears.values()}
    assert len(inputs) < len(trainee.linears)  # q, k and v share one converter
    assert trainee.constants


@pytest.mark.parametrize("name", ["llama__t_static", "bert__t_static", "vit__t_static"])
def test_a_graph_of_one_sample_takes_many(zoo: Path, name: str) -> None:
    prepared = prepare(
        zoo / f"{name}.onnx",
        Options(target="rom", recipe="stream"),
    )
    model = prepared.teacher
    free = freed(model)
    sizes = [str(v.shape[0]) for v in model.graph.inputs if v.shape is not None]
    if "1" not in sizes:
        assert free is model
        return
    assert free is not model
    assert all(str(v.shape[0]) != "1" for v in free.graph.inputs if v.shape is not None)
