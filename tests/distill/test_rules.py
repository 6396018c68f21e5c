"""Training rules against closed forms: theory, finite differences, automatic differentiation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks import mismatched
from benchmarks import rules as compared
from pfmc.distill import rules
from pfmc.distill.rules import feedback
from pfmc.distill.rules.base import Part, Problem, cosine, pull_back, record
from pfmc.distill.rules.equilibrium import contrast, settle
from pfmc.distill.rules.local import local_loss
from pfmc.distill.rules.masks import MaskStack, coupler
from pfmc.distill.rules.zeroth import spsa_cosine
from pfmc.errors import UsageError

BATCH = mismatched.data(256, 1)


def ideal() -> Problem:
    """A device that is what its model says."""
    whole = mismatched.problem()
    return Problem(whole.model, whole.parameters, whole.loss, whole.model, slope=whole.slope)


def norm_ratio(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    a, b = (math.sqrt(sum(float(v.square().sum()) for v in g.values())) for g in (one, other))
    return a / b


# -- the registry ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", rules.RULES)
def test_every_rule_says_what_it_is(name: str) -> None:
    kind = rules.get(name)
    assert kind.name == name
    assert kind.title
    assert kind.paper
    assert kind.needs
    assert kind.parts
    assert rules.make(name).runs()


def test_masks_are_trained_in_silico_alone() -> None:
    fit = {n for n in rules.RULES if Part.MASKS in rules.get(n).parts}
    assert fit == {"in-silico", "noise-aware"}
    with pytest.raises(UsageError, match="cannot train masks"):
        rules.get("spsa").require(Part.MASKS)


def test_refusals() -> None:
    with pytest.raises(UsageError, match="no training rule 'spsaa'") as caught:
        rules.get("spsaa")
    assert "spsa" in caught.value.mend
    with pytest.raises(UsageError, match="no option 'probe'"):
        rules.make("spsa", {"probe": 3})
    bare = Problem(ideal().model, ideal().parameters, mismatched.loss)
    with pytest.raises(UsageError, match="needs a device"):
        rules.make("physics-aware").gradient(bare, BATCH)
    with pytest.raises(UsageError, match="noise of a target"):
        rules.make("noise-aware").gradient(bare, BATCH)
    with pytest.raises(UsageError, match="no phase masks"):
        rules.make("echo").gradient(ideal(), BATCH)
    with pytest.raises(UsageError, match="negative batches"):
        rules.make("local").gradient(ideal(), BATCH)


# -- differentiation -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["physics-aware", "reciprocal", "equilibrium"])
def test_a_perfect_device_gives_backpropagation(name: str) -> None:
    whole = ideal()
    true = rules.make("in-silico").gradient(whole, BATCH)
    found = rules.make(name).gradient(whole, BATCH)
    assert cosine(found, true) > 0.9999
    assert norm_ratio(found, true) == pytest.approx(1.0, abs=0.01)


def test_measured_forward_passes_help_on_a_device_that_differs() -> None:
    """PAT is nearer to the gradient of the device, and trains it better (arXiv 2406.03372)."""
    gains = []
    for die in range(3):
        whole = mismatched.problem(die)
        true = mismatched.true_gradient(whole, BATCH)
        in_silico, aware = (
            cosine(rules.make(n).gradient(whole, BATCH), true)
            for n in ("in-silico", "physics-aware")
        )
        assert 0.85 < in_silico < 0.99
        gains.append(aware - in_silico)
    assert sum(gains) > 0
    reached = {
        n: compared.train(mismatched.problem(), rules.make(n), 150, 5e-3)
        for n in ("in-silico", "physics-aware")
    }
    assert reached["physics-aware"] > reached["in-silico"] > 0.9


def test_noise_is_averaged() -> None:
    """The mean over many draws of a linear layer's gradient is that without noise."""
    whole = mismatched.problem()
    one, many = (rules.make("noise-aware", {"draws": d}).gradient(whole, BATCH) for d in (1, 64))
    true = rules.make("in-silico").gradient(whole, BATCH)
    assert cosine(many, true) > cosine(one, true)


# -- feedback --------------------------------------------------------------------------------------


def test_feedback_through_the_true_transpose_is_backpropagation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With B of the layer below the output its W transposed, that layer's gradient is exact."""
    whole = ideal()
    last: Any = whole.model.linears[mismatched.LAYERS[2]]
    monkeypatch.setattr(feedback, "feedback_matrix", lambda *_: last.weight.detach().T)
    found = rules.make("feedback").gradient(whole, BATCH)
    true = rules.make("in-silico").gradient(whole, BATCH)
    for layer in mismatched.LAYERS[1:]:
        torch.testing.assert_close(found[f"{layer}.weight"], true[f"{layer}.weight"])


def test_random_feedback_aligns_by_training() -> None:
    whole = mismatched.problem()
    assert compared.train(whole, rules.make("feedback"), 150, 5e-3) > 0.95
    assert compared.train(mismatched.problem(), rules.make("augmented-feedback"), 150, 5e-3) > 0.95


def test_the_error_reaches_every_position_of_a_layer() -> None:
    error = torch.randn(3, 4)
    assert feedback._spread(error, torch.zeros(3, 7, 5)).shape == (3, 7, 4)
    torch.testing.assert_close(feedback._spread(error, torch.zeros(3, 7, 5)).sum(1), error)
    assert feedback._spread(torch.randn(2, 3, 4), torch.zeros(6, 5)).shape == (6, 4)


# -- local -----------------------------------------------------------------------------------------


def test_the_local_loss_is_its_formula() -> None:
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    expected = math.log1p(math.exp(3 * math.cos(math.pi / 4)))
    assert float(local_loss(a, b, 3.0)) == pytest.approx(expected, rel=1e-6)


def test_local_learning_follows_the_finite_difference() -> None:
    """On a perfect device the gradient is that of the sum of the layers' own losses."""
    whole = mismatched.problem()
    whole = Problem(whole.model, whole.parameters, whole.loss, whole.model,
                    contrast=mismatched.contrast)  # fmt: skip
    rule: Any = rules.make("local")
    found = rule.gradient(whole, BATCH)
    layer, (name, weight) = mismatched.LAYERS[1], ("weight", whole.parameters["layers.1"]["weight"])
    assert whole.contrast is not None
    sides = [record(whole.model, side)[1][layer][0] for side in whole.contrast(BATCH)]
    direction, step = torch.randn_like(weight), 1e-3
    ends = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            moved = weight + sign * step * direction
            ends.append(float(local_loss(sides[0] @ moved, sides[1] @ moved, rule.theta).double()))
    slope = (ends[0] - ends[1]) / (2 * step)
    assert float((found[f"{layer}.{name}"] * direction).sum()) == pytest.approx(slope, rel=0.03)


def test_local_learning_makes_features_that_separate_better() -> None:
    before = compared.readout_accuracy(mismatched.problem())
    after = compared.local_accuracy(mismatched.problem(), rules.make("local"), 150)
    assert 1 - after < 0.8 * (1 - before)


# -- loss alone ------------------------------------------------------------------------------------


@pytest.mark.parametrize("probes", [100, 400])
def test_spsa_has_the_cosine_of_theory(probes: int) -> None:
    """sqrt(K / (K + P)) (0.149 and 0.288 for P = 4,426), within 3 sd of sampling, 1/sqrt(P)."""
    whole = mismatched.problem()
    true = mismatched.true_gradient(whole, BATCH)
    count = sum(p.numel() for p in whole.flat().values())
    small = {k: v[:64] for k, v in BATCH.items()}
    true = mismatched.true_gradient(whole, small)
    found = rules.make("spsa", {"probes": probes}).gradient(whole, small, seed=1)
    assert cosine(found, true) == pytest.approx(spsa_cosine(probes, count), abs=3 / count**0.5)


def test_zeroth_order_rules_leave_the_parameters_as_they_were() -> None:
    whole = mismatched.problem()
    before = {k: p.detach().clone() for k, p in whole.flat().items()}
    for name in ("spsa", "evolution"):
        rule = rules.make(name)
        first, again, other = (rule.gradient(whole, BATCH, seed=s) for s in (1, 1, 2))
        assert all(torch.equal(first[k], again[k]) for k in first)
        assert any(not torch.equal(first[k], other[k]) for k in first)
    assert all(torch.equal(before[k], p) for k, p in whole.flat().items())


def test_evolution_reads_the_order_of_losses_alone() -> None:
    whole = mismatched.problem()
    stretched = Problem(
        whole.model, whole.parameters, lambda o, f: 7 * mismatched.loss(o, f) + 3, whole.device
    )
    rule = rules.make("evolution", {"pairs": 16})
    one, other = rule.gradient(whole, BATCH), rule.gradient(stretched, BATCH)
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert cosine(one, mismatched.true_gradient(whole, BATCH)) > 0.03
    flat = Problem(whole.model, whole.parameters, lambda *_: torch.ones(()), whole.device)
    assert not any(g.any() for g in rule.gradient(flat, BATCH).values()), "equal losses say nothing"


# -- equilibria ------------------------------------------------------------------------------------


def test_equilibrium_propagation_in_a_network_of_symmetric_couplings() -> None:
    """A continuous Hopfield network: the contrast equals the finite difference of the loss at the
    free equilibrium (0.9994 in the notes at beta = 0.02)."""
    torch.manual_seed(0)
    x, target = torch.randn(16, 6).double(), torch.randn(16, 3).double()
    w1 = (0.3 * torch.randn(6, 8)).double().requires_grad_()
    w2 = (0.3 * torch.randn(8, 3)).double().requires_grad_()

    def energy(states: Any, beta: float = 0.0, a: Tensor = w1, b: Tensor = w2) -> Tensor:
        h, y = states
        coupling = ((x @ a) * torch.tanh(h)).sum() + ((torch.tanh(h) @ b) * torch.tanh(y)).sum()
        rest = 0.5 * (h.square().sum() + y.square().sum()) - coupling
        return rest + beta * 0.5 * (y - target).square().sum()

    zero = [torch.zeros(16, 8).double(), torch.zeros(16, 3).double()]

    def loss_at(a: Tensor, b: Tensor) -> float:
        free = settle(lambda s: energy(s, 0.0, a, b), zero, 400, 0.3)
        return float(0.5 * (free[1] - target).square().sum())

    free, beta = settle(energy, zero, 400, 0.3), 0.02
    plus, minus = (settle(lambda s, b=b: energy(s, b), free, 400, 0.3) for b in (beta, -beta))
    found = contrast(energy, [w1, w2], plus, minus, beta)
    for index, weight in enumerate((w1, w2)):
        direction = torch.randn_like(weight)
        ends = []
        for sign in (1.0, -1.0):
            moved = [w1.detach(), w2.detach()]
            moved[index] = moved[index] + sign * 1e-4 * direction
            ends.append(loss_at(*moved))
        slope = (ends[0] - ends[1]) / 2e-4
        assert float((found[index] * direction).sum()) == pytest.approx(slope, rel=1e-2)


# -- waves -----------------------------------------------------------------------------------------


def test_the_coupler_is_lossless_and_reciprocal() -> None:
    c = coupler(12)
    torch.testing.assert_close(c @ c.conj().T, torch.eye(12, dtype=c.dtype), atol=1e-6, rtol=0)
    torch.testing.assert_close(c, c.T, atol=1e-6, rtol=0)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(2, 16), st.integers(0, 99))
def test_measured_gradients_of_masks_equal_calculus(planes: int, modes: int, seed: int) -> None:
    """9 masks of 16 modes agreed with automatic differentiation to 6.7e-6 in the notes."""
    generator = torch.Generator().manual_seed(seed)
    error = torch.randn(planes, modes, generator=generator)
    stack = MaskStack(modes - 1, modes // 2 + 1, modes, planes, "l", seed, error)
    x = torch.randn(5, modes - 1, generator=generator).requires_grad_()
    cotangent = torch.randn(5, modes // 2 + 1, generator=generator)
    found = {}
    for stack.measure in ("autograd", "adjoint", "echo"):
        y = stack(x)
        found[stack.measure] = torch.autograd.grad(y, [stack.phase, stack.gain, x], cotangent)
    for measure, tolerance in (("adjoint", 1e-5), ("echo", 1e-3)):
        for true, measured in zip(found["autograd"], found[measure], strict=True):
            assert float((true - measured).norm()) <= tolerance * float(true.norm()) + 1e-6


def test_an_echo_of_darkness_still_tells_the_gradient_by_the_input() -> None:
    """A sample of zeros has no field to scale the kick by; what lies before it must learn."""
    stack = MaskStack(4, 3, 8, 3, "l", 0)
    x = torch.zeros(2, 4).requires_grad_()
    (true,) = torch.autograd.grad(stack(x).sum(), x)
    stack.measure = "echo"
    torch.testing.assert_close(torch.autograd.grad(stack(x).sum(), x)[0], true, rtol=1e-3, atol=0)


def test_masks_with_unknown_errors_are_trained_through_their_own_waves() -> None:
    whole = mismatched.wave_problem()
    true = mismatched.true_gradient(whole, BATCH)
    blind = rules.make("in-silico").gradient(whole, BATCH)
    assert cosine(blind, true) < 0.8
    for name in ("adjoint", "echo"):
        assert cosine(rules.make(name).gradient(whole, BATCH), true) > 0.999


def test_a_stack_too_narrow_is_refused() -> None:
    with pytest.raises(UsageError, match="8 modes cannot carry 9 inputs"):
        MaskStack(9, 4, 8, 2)


# -- tools -----------------------------------------------------------------------------------------


def test_pulling_back_is_the_outer_product() -> None:
    whole = ideal()
    x, delta = torch.randn(7, 32), torch.randn(7, 48)
    found = pull_back(whole, "layers.0", x, delta)
    torch.testing.assert_close(found["layers.0.weight"], x.T @ delta)
    torch.testing.assert_close(found["layers.0.bias"], delta.sum(0))
    assert pull_back(whole, "no such layer", x, delta) == {}


def test_recording_restores_the_layers() -> None:
    whole = ideal()
    before = dict(whole.model.linears)
    outputs, seen = record(whole.model, BATCH)
    assert set(seen) == set(before)
    assert all(whole.model.linears[k] is m for k, m in before.items())
    torch.testing.assert_close(seen["layers.2"][1], outputs["logits"])
    assert isinstance(next(iter(before.values())), nn.Module)
