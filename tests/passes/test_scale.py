"""Scaling: the folded float model equals the original, and what it is kept for is measured."""

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
from pfmc.ir import check, vocabulary
from pfmc.ir.vocabulary import Stage
from pfmc.oracle import Oracle
from pfmc.passes import pipeline, recipe
from pfmc.passes.base import Context
from pfmc.passes.quantise import Quantise
from pfmc.passes.scale import Scale, fold, groups

REPOSITORY = Path(__file__).resolve().parents[2]
BARD = REPOSITORY / "models" / "bard" / "model.onnx"
STORIES = REPOSITORY.parent / "shared" / "data" / "stories260K" / "model.onnx"
LIMITS = Limits((2, 8), 8, 0, 256, 64, False)
MODELS = [pytest.param(p, marks=pytest.mark.skipif(not p.is_file(), reason=f"{p.stem} is absent"))
          for p in (BARD, STORIES)]  # fmt: skip


def canonical(path: Path) -> ir.Model:
    model = ingest.load(path).model
    return pipeline.canonicalise(
        model, recipe.load("rom").passes, Context(), pipeline.Settings()
    ).model


def run(model: ir.Model, folder: Path, length: int = 16) -> dict[str, np.ndarray]:
    """By ONNX Runtime."""
    path = folder / "model.onnx"
    ir.save(model, path)
    feeds = next(iter(calibrate.batches(model, 2, length, 0)))
    with Oracle(path) as oracle:
        return {k: np.asarray(v) for k, v in oracle.run(feeds).items()}


@pytest.mark.parametrize("path", MODELS)
def test_every_fold_keeps_the_float_model(tmp_path: Path, path: Path) -> None:
    model = canonical(path)
    before = run(model, tmp_path)
    found = list(groups(model.graph))
    linears = len(vocabulary.fixed_linears(model))
    covered = sum(len(g.readers) for g in found)
    assert covered >= linears - 1  # the head may share its table with the embedding
    rng = np.random.default_rng(0)
    for group in found:
        count = int(group.places.max()) + 1
        fold(model.graph, group, np.exp(rng.normal(0, 1.0, count)).astype(np.float32))
    check.require_stage(model, Stage.CANONICAL)
    after = run(model, tmp_path)
    for name, value in before.items():
        if "value" not in name:  # what a KV memory holds is scaled
            np.testing.assert_allclose(
                after[name], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=name
            )


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 2.0))
def test_any_factor_of_one_group_keeps_the_student(seed: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    model = canonical(BARD)
    feeds = next(iter(calibrate.batches(model, 1, 8, seed)))
    before = Student(model).eval()(**feeds)
    found = list(groups(model.graph))
    group = found[int(rng.integers(len(found)))]
    count = int(group.places.max()) + 1
    fold(model.graph, group, np.exp(rng.normal(0, spread, count)).astype(np.float32))
    after = Student(model).eval()(**feeds)
    name = next(iter(before))
    truth = before[name].detach().numpy()
    np.testing.assert_allclose(
        after[name].detach().numpy(), truth, rtol=0, atol=1e-5 * np.abs(truth).max()
    )


def test_it_is_kept_only_where_the_loss_falls() -> None:
    model = canonical(BARD)
    feeds = calibrate.made_up(model, 8, 32, 0)
    statistics = calibrate.calibrate(model, feeds, moments=True)
    options = Quantise(weight_bits=3, search="clip", inputs="token")
    lines: list[str] = []
    context = Context(limits=LIMITS, statistics=statistics, progress=lines.append)
    result = Scale(options).apply(model, context)
    assert result.changed + len(result.declined) == result.notes["groups"]
    assert result.changed == len(lines) > 0
    assert 0 < float(result.notes["loss_ratio_mean"]) < 0.99
    assert {d.reason for d in result.declined} <= {"no scaling lowers the calibrated loss"}
