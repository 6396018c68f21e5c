"""Rounding layer after layer: better with the rounded prefix, and better still when learned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from pfmc import formats, ingest
from pfmc.distill import calibrate, sequential
from pfmc.distill.learned import LatentLinear, Learning, torch_codes
from pfmc.distill.lockstep import Lockstep
from pfmc.distill.sequential import Order, solve
from pfmc.distill.student import IdealLinear, Student
from pfmc.errors import UsageError
from pfmc.hardware import LayerStatistics, QuantisedMatrix
from pfmc.ir import routing
from pfmc.layer_rounding import LayerPlan
from pfmc.passes import pipeline, recipe
from tests.one_linear import one_linear

Make = Callable[..., ir.Model]


def feeds_of(model: ir.Model, count: int = 16) -> list[dict[str, np.ndarray]]:
    return list(calibrate.batches(model, count, 24, 3))


def solved(
    model: ir.Model, search: str, bits: int = 3, name: str = "int", **more: object
) -> tuple[dict[str, QuantisedMatrix], dict[str, LayerStatistics]]:
    form, found = formats.of(name, bits), dict[str, QuantisedMatrix]()
    order = Order(
        lambda _: LayerPlan(form, 0, search), lambda _: None,  # type: ignore[arg-type]
        Learning(iterations=60), **more,  # type: ignore[arg-type]
    )  # fmt: skip
    return found, solve(model, feeds_of(model), order, found.__setitem__)


def output_error(model: ir.Model, matrices: dict[str, QuantisedMatrix]) -> float:
    """Relative square error of the logits on the calibration data."""
    exact, student = Student(model).eval(), Student(model).eval()
    for name, matrix in matrices.items():
        bias = getattr(student.linears[name], "bias", None)
        student.replace(name, IdealLinear(torch.from_numpy(matrix.weights()), bias))
    wrong = power = 0.0
    for feeds in feeds_of(model):
        with torch.inference_mode():
            a, b = exact(**feeds)["logits"], student(**feeds)["logits"]
        wrong, power = wrong + float(((a - b) ** 2).sum()), power + float((a**2).sum())
    return wrong / power


def test_both_streams_are_the_float_model_without_rounding(canonical_llama: Make) -> None:
    model = canonical_llama()
    order = Order(lambda _: None, lambda _: None)
    found = solve(model, feeds_of(model), order, lambda n, m: pytest.fail("nothing to keep"))
    truth = calibrate.calibrate(model, feeds_of(model))
    assert list(found) == list(truth)
    for name, one in truth.items():
        other = found[name]
        assert other.samples == one.samples
        assert other.input_peak == pytest.approx(one.input_peak, rel=1e-5)
        np.testing.assert_allclose(other.input_power, one.input_power, rtol=1e-4)
        np.testing.assert_allclose(other.output_rms, one.output_rms, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(other.output_peak, one.output_peak, rtol=1e-4, atol=1e-5)


def test_blocks_end_where_one_value_carries_everything(canonical_llama: Make) -> None:
    model = canonical_llama(memory=True)
    lock = Lockstep(model, feeds_of(model))
    names = [b.linears for b in lock.blocks]
    assert names[0] == tuple(
        f"layers.0.{n}" for n in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj",
                                  "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    )  # fmt: skip
    assert names[1:] == [("lm_head",)]
    assert len(lock.blocks[0].results) == 1


def test_each_search_is_better_than_the_one_before(canonical_llama: Make) -> None:
    model = canonical_llama()
    plain, _ = solved(model, "plain", 2)
    asymmetric, _ = solved(model, "compensate", 2)
    learned, _ = solved(model, "learned", 2)
    errors = [output_error(model, m) for m in (plain, asymmetric, learned)]
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < errors[1]
    for matrix in learned.values():
        found = matrix.diagnostics
        assert found["block_error"] <= found["block_error_before"]
    first = learned["layers.0.attn.q_proj"]
    assert first.choice == "learned"
    assert first.diagnostics["block_error"] < first.diagnostics["block_error_before"]


@pytest.mark.parametrize("name", ["midrise", "ternary", "mxfp4"])
def test_every_format_can_be_learned(canonical_llama: Make, name: str) -> None:
    model = canonical_llama()
    found, _ = solved(model, "learned", 2, name)
    for matrix in found.values():
        form = formats.of(matrix.format, matrix.bits)
        values = matrix.codes.astype(np.float64)
        np.testing.assert_array_equal(form.codes(values.copy()), values)
        np.testing.assert_array_equal(form.lattice(matrix.scale), matrix.scale)


def test_the_same_data_give_the_same_codes(canonical_llama: Make) -> None:
    one, other = (solved(canonical_llama(), "learned")[0] for _ in range(2))
    assert {n: m.digest() for n, m in one.items()} == {n: m.digest() for n, m in other.items()}


def test_input_converters_are_part_of_the_rounded_stream(canonical_llama: Make) -> None:
    model = canonical_llama()
    form, found = formats.of("int", 4), dict[str, QuantisedMatrix]()
    seen: list[float] = []

    def static(statistics: LayerStatistics) -> sequential.Convert:
        seen.append(statistics.input_peak)
        return sequential.static_converter(7.0, statistics.input_peak / 7.0)

    order = Order(lambda _: LayerPlan(form, 0, "compensate"), static)
    solve(model, feeds_of(model), order, found.__setitem__)
    assert min(seen) > 0
    without, _ = solved(model, "compensate", 4)
    assert any((found[n].codes != without[n].codes).any() for n in found)


def test_no_data_is_refused(canonical_llama: Make) -> None:
    with pytest.raises(UsageError, match="no calibration data"):
        Lockstep(canonical_llama(), [])


@pytest.mark.parametrize("form", [formats.of("int", 3), formats.of("midrise", 2),
                                  formats.of("mxfp4")], ids=lambda f: f.name)  # fmt: skip
def test_torch_rounds_as_numpy(form: formats.Format) -> None:
    ratio = np.random.default_rng(0).normal(0, form.top, 1000).astype(np.float32)
    np.testing.assert_array_equal(
        torch_codes(torch.from_numpy(ratio), form).numpy(), form.codes(ratio.copy())
    )


def test_a_latent_starts_at_the_codes_it_was_given() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(-3, 4, (10, 4)).astype(np.int8)
    scale = np.full((1, 4), 0.1, np.float32)
    weight = rng.standard_normal((10, 4)).astype(np.float32)
    module = LatentLinear(weight, QuantisedMatrix(codes, 3, scale, 10), None)
    found, same = module.result()
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_allclose(same, scale)


def test_a_block_that_gives_no_real_numbers_is_not_learned() -> None:
    """The index of the largest score, say: rounding stays what the layer-wise search found."""
    rng = np.random.default_rng(0)
    model = one_linear(rng.standard_normal((16, 6)), np.zeros(6), then="ArgMax")
    feeds = [{"x": rng.standard_normal((8, 16)).astype(np.float32)} for _ in range(3)]
    made: dict[str, dict[str, QuantisedMatrix]] = {"compensate": {}, "learned": {}}
    for search, found in made.items():
        order = Order(
            lambda _, s=search: LayerPlan(formats.of("int", 2), 0, s),  # type: ignore[misc]
            lambda _: None,
        )
        solve(model, feeds, order, found.__setitem__)
    assert made["learned"]["fc"].choice == made["compensate"]["fc"].choice
    np.testing.assert_array_equal(made["learned"]["fc"].codes, made["compensate"]["fc"].codes)


@pytest.mark.parametrize("search", ["compensate", "learned"])
def test_experts_make_up_for_nothing_before_their_router(
    zoo: Path, monkeypatch: pytest.MonkeyPatch, search: str
) -> None:
    """The routers of both streams choose other rows, so there are no pairs of rows to compare."""
    base = ingest.load(zoo / "mixtral__h_dyn.onnx").model
    model = pipeline.canonicalise(base, recipe.load("rom").passes).model
    experts = {name for names in routing.groups(model) for name in names}
    assert len(experts) > 12
    crossed: dict[str, bool] = {}
    real = sequential._Solver._solved

    def noted(self: Any, name: str, *rest: Any, **more: Any) -> QuantisedMatrix:
        crossed[name] = self.shared.seen.cross is not None
        return real(self, name, *rest, **more)

    monkeypatch.setattr(sequential._Solver, "_solved", noted)
    found: dict[str, QuantisedMatrix] = {}
    order = Order(
        lambda _: LayerPlan(formats.of("ternary"), 0, search),  # type: ignore[arg-type]
        lambda _: sequential.token_converter(127.0), Learning(iterations=3),
    )  # fmt: skip
    solve(model, list(calibrate.batches(model, 4, 24, 1)), order, found.__setitem__)
    assert set(found) == set(crossed)
    assert {name for name, is_crossed in crossed.items() if not is_crossed} == experts
