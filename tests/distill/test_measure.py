"""Perplexity, KL divergence and agreement against closed forms and torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pfmc.distill.measure import (
    Comparison,
    compare_logits,
    mean_estimate,
    percentile_estimate,
    perplexity,
    token_losses,
)
from pfmc.errors import UsageError


@settings(max_examples=20, deadline=None, derandomize=True)
@given(n=st.integers(1, 4), s=st.integers(2, 6), v=st.integers(2, 9), seed=st.integers(0, 99))
def test_against_torch(n: int, s: int, v: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    teacher, student = (rng.normal(size=(n, s, v)).astype(np.float32) * 3 for _ in range(2))
    ids = rng.integers(0, v, (n, s))
    found = compare_logits(teacher, student, ids)
    p, q = (torch.log_softmax(torch.tensor(x, dtype=torch.float64), -1) for x in (teacher, student))
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert found.kl_mean.value == pytest.approx(kl.mean().item(), abs=1e-12)
    assert found.kl_p99.value == pytest.approx(np.percentile(kl.numpy(), 99), abs=1e-12)
    assert found.top1.value == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    want = torch.nn.functional.cross_entropy(
        torch.tensor(student)[:, :-1].reshape(-1, v).double(), torch.tensor(ids)[:, 1:].reshape(-1)
    )
    assert found.perplexity_student is not None
    assert found.perplexity_student.value == pytest.approx(math.exp(want.item()), rel=1e-9)
    assert (found.windows, found.tokens) == (n, n * s)


def test_equal_models_agree_wholly() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 4, 5))
    found = compare_logits(logits, logits + 7)  # a constant shift changes nothing
    assert found.kl_mean.value == pytest.approx(0, abs=1e-15)
    assert found.top1.value == 1
    assert found.perplexity_teacher is None


def test_uniform_scores_have_the_perplexity_of_the_vocabulary() -> None:
    losses = token_losses(np.zeros((2, 5, 50)), np.zeros((2, 5), np.int64))
    assert losses.shape == (2, 4)
    assert perplexity(losses).value == pytest.approx(50)


def test_student_t_interval() -> None:
    found = mean_estimate(np.array([1.0, 2.0, 3.0, 4.0]))
    half = 3.182446305284263 * math.sqrt(5 / 3) / 2  # t(0.975, 3), tables
    assert (found.value, found.low, found.high) == pytest.approx((2.5, 2.5 - half, 2.5 + half))
    alone = mean_estimate(np.array([1.0]))
    assert (alone.low, alone.high) == (-math.inf, math.inf)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    hits = sum(
        e.low <= 0 <= e.high for e in (mean_estimate(rng.normal(size=12)) for _ in range(1000))
    )
    assert 930 <= hits <= 970


def test_percentile_bootstrap_is_repeatable_and_brackets() -> None:
    values = np.random.default_rng(0).exponential(size=(40, 64))
    one, two = percentile_estimate(values, 99), percentile_estimate(values, 99)
    assert one == two
    assert one.low < one.value < one.high
    assert one.low < -math.log(0.01) < one.high  # the exponential law's 99th percentile


def test_windows_add_up() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, 3, 6)), rng.normal(size=(4, 3, 6))
    parts = Comparison()
    parts.add(a[:1], b[:1])
    parts.add(a[1:], b[1:])
    assert parts.result() == compare_logits(a, b)


def test_impossible_tokens_cost_nothing_and_bad_input_is_refused() -> None:
    a = np.array([[[0.0, -np.inf, 0.0]]])
    assert compare_logits(a, np.zeros((1, 1, 3))).kl_mean.value == pytest.approx(math.log(1.5))
    with pytest.raises(UsageError, match="shape"):
        compare_logits(np.zeros((1, 2, 3)), np.zeros((1, 2, 4)))
    with pytest.raises(UsageError, match="no window"):
        Comparison().result()
