"""Losses against torch's own and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from pfmc.distill.losses import forward_kl, inner_error, vector_error


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_forward_kl_and_its_gradient_are_torchs() -> None:
    scores, teacher = drawn(7, 11).requires_grad_(), drawn(7, 11, seed=1)
    chances = functional.softmax(teacher, dim=-1)
    forward_kl(scores, chances).backward()
    ours = scores.grad
    again = scores.detach().clone().requires_grad_()
    truth = functional.kl_div(functional.log_softmax(again, dim=-1), chances, reduction="batchmean")
    truth.backward()
    assert float(forward_kl(again.detach(), chances)) == pytest.approx(truth.item(), rel=1e-5)
    np.testing.assert_allclose(ours, again.grad, atol=1e-7)


def test_an_impossible_token_of_the_teacher_costs_nothing() -> None:
    chances = torch.tensor([[0.25, 0.75, 0.0]])
    scores = torch.tensor([[0.25, 0.75, 1e-30]]).log()
    assert float(forward_kl(scores, chances)) == pytest.approx(0, abs=1e-6)


def test_vectors_are_compared_where_there_are_tokens() -> None:
    truth = drawn(2, 3, 5)
    ours, mask = truth.clone(), torch.tensor([[1, 1, 0], [1, 0, 0]])
    ours[0, 2] += 9
    ours[1, 1:] += 9
    assert float(vector_error(ours, truth, mask)) == pytest.approx(0, abs=1e-6)
    assert float(vector_error(ours, truth)) > 1
    assert float(vector_error(2 * truth, truth)) == pytest.approx(1, abs=1e-5)
    assert float(vector_error(-truth[:, 0], truth[:, 0])) == pytest.approx(4 + 2, abs=1e-5)


def test_inner_errors_are_relative_and_averaged() -> None:
    truth = {"a": drawn(4, 3), "b": drawn(4, 2)}
    ours = {"a": 1.1 * truth["a"], "b": truth["b"]}
    assert float(inner_error(ours, truth)) == pytest.approx(0.01 / 2, rel=1e-4)
