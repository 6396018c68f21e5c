"""Samples of different lengths: which are fed together, without which padding, and remembered."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pfmc.distill.drive import Drive
from pfmc.distill.lessons import Language, Vectors, order_of
from pfmc.distill.teacher import Teacher

LENGTHS = (3, 9, 1, 5, 9, 2, 4, 12, 6, 7, 1)


def lesson_of(lengths: tuple[int, ...], padded: bool = True) -> Vectors:
    """Samples ``1 … n``, padded by 0 at the right to the longest but two."""
    mask = np.arange(max(lengths) + 2) < np.array(lengths)[:, None]
    ids = np.where(mask, np.arange(1, mask.shape[1] + 1), 0)
    feeds = {"ids": ids, "mask": mask.astype(np.int64)}
    return Vectors(feeds, feeds, (), ("y",), "mask", padded)


class Echo(torch.nn.Module):
    """Vectors that tell the token and the sample's sum."""

    def forward(self, ids: Any, mask: Any) -> dict[str, torch.Tensor]:
        ids = torch.as_tensor(ids, dtype=torch.float32)
        return {"y": torch.stack([ids, ids.sum(dim=1, keepdim=True).expand_as(ids)], dim=2)}


@pytest.mark.parametrize(("vocabulary", "width"), [(1000, 1.0), (50_000, 2.0), (100_000, 4.0)])
def test_the_divergence_of_a_large_vocabulary_is_right(vocabulary: int, width: float) -> None:
    """Against float64: many small chances count, and the teacher is no way from itself."""
    made = torch.Generator().manual_seed(0)
    truth = width * torch.randn(4, 32, vocabulary, generator=made)
    ours = truth + 0.1 * torch.randn(4, 32, vocabulary, generator=made)
    ids = np.zeros((4, 32), np.int64)
    lesson = Language(Drive("ids", "", False, "", "", "y", (), None, None, vocabulary), ids, ids)
    target = lesson.keep({"y": truth})
    p, q = (v.double().log_softmax(-1) for v in (truth, ours))
    exact = float((p.exp() * (p - q)).sum(-1).mean())
    assert 0 <= float(lesson.loss({"y": truth}, target, {})) < 0.1 * exact
    assert float(lesson.loss({"y": ours}, target, {})) == pytest.approx(exact, rel=0.1)


def test_a_batch_is_as_long_as_its_longest_sample() -> None:
    lesson = lesson_of(LENGTHS)
    feeds = lesson.feeds([0, 3, 5])
    assert feeds["ids"].shape == feeds["mask"].shape == (3, 5)
    assert feeds["ids"][1].tolist() == [1, 2, 3, 4, 5]
    assert lesson.lengths is not None and lesson.lengths.tolist() == list(LENGTHS)


def test_a_graph_of_one_length_gets_all_of_it() -> None:
    lesson = lesson_of(LENGTHS, padded=False)
    assert lesson.lengths is None and lesson.feeds([0])["ids"].shape == (1, 14)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=200), st.integers(1, 9), st.integers(0, 9))
def test_an_epoch_has_each_sample_once_and_little_padding(
    lengths: list[int], batch: int, seed: int
) -> None:
    lesson = lesson_of(tuple(lengths))
    order = order_of(lesson, batch, np.random.default_rng(seed))
    assert sorted(order) == list(range(len(lengths)))
    whole = len(order) // batch * batch
    fed = np.array(lengths)[order[:whole]].reshape(-1, batch)
    if whole == len(lengths) <= 32 * batch:  # sorted as a whole, no batch could be shorter
        best = np.sort(lengths).reshape(-1, batch).max(axis=1)
        assert sorted(fed.max(axis=1)) == best.tolist()


def test_the_order_is_no_more_than_a_shuffle_where_lengths_are_equal() -> None:
    lesson = lesson_of(LENGTHS, padded=False)
    order = order_of(lesson, 4, np.random.default_rng(5))
    assert order.tolist() == np.random.default_rng(5).permutation(11).tolist()


@pytest.mark.parametrize("padded", [True, False])
def test_remembered_answers_are_the_fresh_ones(padded: bool) -> None:
    lesson = lesson_of(LENGTHS, padded)
    fresh, kept = (Teacher(Echo(), lesson, 4) for _ in range(2))  # type: ignore[arg-type]
    assert kept.remember(uses=100)
    for rows in ([0, 7, 2], [3], [10, 2]):
        counts = torch.as_tensor(lesson.feeds(rows)["mask"]) != 0
        one, other = kept.ask(rows)["y"], fresh.ask(rows)["y"]
        assert one.shape == other.shape
        torch.testing.assert_close(one[counts], other[counts], rtol=0, atol=0)
