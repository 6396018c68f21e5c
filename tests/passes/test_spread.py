"""Spreading: sums stay the matrix, stable rank by closed form, and the rank is the best one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pfmc import ingest
from pfmc.distill import calibrate
from pfmc.distill.student import Student
from pfmc.hardware import Limits
from pfmc.ir import check, matcher, vocabulary
from pfmc.ir.vocabulary import Stage
from pfmc.oracle import Oracle
from pfmc.passes import pipeline, recipe
from pfmc.passes.base import Context
from pfmc.passes.fabric_formats import FabricFormats, rounded_columns
from pfmc.passes.spread import Spread, directions, measure

BARD = Path(__file__).resolve().parents[2] / "models" / "bard" / "model.onnx"
LIMITS = Limits((2, 8), 8, 8, 64, 64, True, 8)


@pytest.fixture(scope="module")
def bard() -> ir.Model:
    model = ingest.load(BARD).model
    return pipeline.canonicalise(model, recipe.load("optical").passes, Context()).model


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6))
def test_stable_rank_is_that_of_the_singular_values(inputs: int, outputs: int, seed: int) -> None:
    matrix = np.random.default_rng(seed).normal(size=(inputs, outputs))
    values = np.linalg.svd(matrix, compute_uv=False)
    light = measure(matrix, None)
    assert light.stable_rank == pytest.approx((values**2).sum() / values[0] ** 2)
    assert light.power == pytest.approx(light.stable_rank / inputs)
    assert light.noise == pytest.approx(outputs * values[0] ** 2)


def test_a_square_gaussian_delivers_a_quarter_of_its_power() -> None:
    matrix = np.random.default_rng(0).normal(size=(512, 512))
    assert measure(matrix, None).power == pytest.approx(0.25, rel=0.03)


def test_tiles_are_measured_one_by_one() -> None:
    matrix = np.zeros((100, 70))
    matrix[:64, :64] = 2 * np.eye(64)  # four tiles: 64x64, 64x6, 36x64, 36x6
    matrix[64:, 64:] = np.ones((36, 6))
    light = measure(matrix, LIMITS)
    assert light.noise == pytest.approx(64 * 4 + 6 * 36 * 6)
    assert light.stable_rank == pytest.approx((64 + 0 + 0 + 1) / 4)


@pytest.mark.parametrize("shape", [(40, 60), (1100, 1050)])  # directly, and by iteration
def test_directions_are_the_largest(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    left, _ = np.linalg.qr(rng.normal(size=(shape[0], 3)))
    right, _ = np.linalg.qr(rng.normal(size=(shape[1], 3)))
    matrix = (left * [9.0, 5.0, 3.0]) @ right.T + rng.normal(0, 0.01, shape)
    down, up = directions(matrix, 2)
    rest = np.linalg.svd(matrix - down @ up, compute_uv=False)[0]
    assert rest == pytest.approx(np.linalg.svd(matrix, compute_uv=False)[2], rel=1e-6)


def test_the_model_stays_equal(bard: ir.Model, tmp_path: Path) -> None:
    feeds = next(iter(calibrate.batches(bard, 1, 12, 0)))
    path = tmp_path / "model.onnx"
    runs = []
    for model in (bard, pipeline.run(bard.clone(), [Spread()], Context(limits=LIMITS)).model):
        check.require_stage(model, Stage.CANONICAL)
        ir.save(model, path)
        with Oracle(path) as oracle:
            runs.append({k: np.asarray(v) for k, v in oracle.run(feeds).items()})
    for name, value in runs[0].items():
        np.testing.assert_allclose(runs[1][name], value, atol=1e-5 * np.abs(value).max())
    student = Student(model).eval()(**feeds)
    for name, value in runs[1].items():
        np.testing.assert_allclose(
            student[name].detach().numpy(), value, atol=1e-4 * np.abs(value).max()
        )


def test_every_layer_with_a_path_delivers_more_for_less_than_it_asks(bard: ir.Model) -> None:
    step = pipeline.run(bard.clone(), [Spread(rank=3)], Context(limits=LIMITS)).steps[0]
    assert step.changed >= 10
    assert step.changed + len(step.declined) == len(vocabulary.fixed_linears(bard))
    assert step.notes["layers"] == step.changed
    for node in vocabulary.fixed_linears(bard):
        words = str(step.notes[str(node.name)]).replace(",", "").split()
        rank, power, saved = int(words[1]), (float(words[8]), float(words[10])), -float(words[13])
        weight = matcher.constant(node.inputs[1])
        assert weight is not None
        percent = 100 * rank * sum(weight.shape) / weight.size
        assert power[1] > power[0] if rank else power[1] == power[0]
        assert saved >= percent - 0.01 if rank else saved == 0


def test_the_fabric_holds_what_was_subtracted(bard: ir.Model) -> None:
    """The factors are rounded already, so rounding them again, as the fabric does, changes none."""
    model = pipeline.run(bard.clone(), [Spread()], Context(limits=LIMITS)).model
    paths = [n for n in model.graph if vocabulary.is_op(n, "SidePath", "pfmc")]
    assert all(n.metadata_props[vocabulary.KEY_SPREAD] == "1" for n in paths)
    assert FabricFormats.name == "fabric-formats"
    for node in paths:
        for index in (2, 3):
            factor = matcher.constant(node.inputs[index])
            assert factor is not None
            np.testing.assert_allclose(rounded_columns(factor, 127.0), factor, rtol=1e-6, atol=0)


def test_no_rank_changes_nothing(bard: ir.Model) -> None:
    step = pipeline.run(bard.clone(), [Spread(rank=0)], Context(limits=LIMITS)).steps[0]
    assert step.changed == 0
    assert not step.difference()


def test_a_direction_must_be_worth_its_numbers(bard: ir.Model) -> None:
    step = pipeline.run(bard.clone(), [Spread(worth=1e6)], Context(limits=LIMITS)).steps[0]
    assert step.changed == 0
    assert "no direction saves 1e+06 dB" in step.declined[0].reason
