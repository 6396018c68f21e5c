"""How well one model follows another: perplexity, KL divergence, top-1 agreement, with intervals.

The window is the unit of sampling: tokens of one window are not independent, windows are taken to
be. Intervals are 95 %: Student's t over window means, and for a percentile a seeded bootstrap over
windows (Efron and Tibshirani 1993, chapter 13).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from pfmc.errors import UsageError

CONFIDENCE = 0.95
RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval; the interval is infinite from a single window."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Agreement:
    """A student against its teacher over the same windows.

    Attributes:
        windows: how many.
        tokens: predictions compared.
        kl_mean: mean of KL(teacher || student), nats a token.
        kl_p99: 99th percentile of the same.
        top1: share of positions where both prefer the same token.
        perplexity_teacher: exp of the mean negative log likelihood; None without reference text.
        perplexity_student: likewise.
    """

    windows: int
    tokens: int
    kl_mean: Estimate
    kl_p99: Estimate
    top1: Estimate
    perplexity_teacher: Estimate | None
    perplexity_student: Estimate | None


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log probabilities over the last axis, float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


def token_losses(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Negative log likelihood of each next token.

    Args:
        logits: ``[N, S, V]``.
        ids: ``[N, S]``, the tokens that were read.

    Returns:
        float64 ``[N, S - 1]``, nats.
    """
    logs = log_softmax(logits[:, :-1])
    taken = np.take_along_axis(logs, ids[:, 1:, None].astype(np.int64), axis=-1)
    return np.asarray(-taken[..., 0])


def mean_estimate(per_window: np.ndarray) -> Estimate:
    """Mean over windows with Student's t interval; `per_window` is ``[N]``."""
    from scipy.stats import t

    value, count = float(per_window.mean()), len(per_window)
    if count < 2:
        return Estimate(value, -math.inf, math.inf)
    half = float(t.ppf(0.5 + CONFIDENCE / 2, count - 1) * per_window.std(ddof=1) / math.sqrt(count))
    return Estimate(value, value - half, value + half)


def percentile_estimate(values: np.ndarray, percent: float, seed: int = 0) -> Estimate:
    """Percentile over all of ``values[N, S]`` with a bootstrap interval over the N windows."""
    value = float(np.percentile(values, percent))
    if len(values) < 2:
        return Estimate(value, -math.inf, math.inf)
    rng = np.random.default_rng(seed)
    drawn = [
        np.percentile(values[rng.integers(0, len(values), len(values))], percent)
        for _ in range(RESAMPLES)
    ]
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Estimate(value, float(low), float(high))


def perplexity(losses: np.ndarray) -> Estimate:
    """``exp(mean loss)`` from ``losses[N, S]`` in nats a token."""
    mean = mean_estimate(losses.mean(axis=1))
    top = math.inf if mean.high > 700 else math.exp(mean.high)
    return Estimate(math.exp(mean.value), math.exp(max(mean.low, -700.0)), top)


@dataclass
class Comparison:
    """Gathers two models' logits window by window; holds numbers per token, not logits."""

    divergences: list[np.ndarray] = field(default_factory=list)
    agreements: list[np.ndarray] = field(default_factory=list)
    teacher_losses: list[np.ndarray] = field(default_factory=list)
    student_losses: list[np.ndarray] = field(default_factory=list)

    def add(self, teacher: np.ndarray, student: np.ndarray, ids: np.ndarray | None = None) -> None:
        """Adds windows: logits ``[N, S, V]`` of both and, for perplexity, the tokens ``[N, S]``."""
        if teacher.shape != student.shape:
            raise UsageError(f"logits differ in shape: {teacher.shape} and {student.shape}")
        for i in range(len(teacher)):
            p, q = log_softmax(teacher[i : i + 1]), log_softmax(student[i : i + 1])
            with np.errstate(invalid="ignore"):
                terms = np.where(np.isneginf(p), 0.0, np.exp(p) * (p - q))
            self.divergences.append(terms.sum(axis=-1))
            self.agreements.append(p.argmax(axis=-1) == q.argmax(axis=-1))
            if ids is not None:
                self.teacher_losses.append(token_losses(p, ids[i : i + 1]))
                self.student_losses.append(token_losses(q, ids[i : i + 1]))

    def result(self) -> Agreement:
        """The agreement over all windows added.

        Raises:
            UsageError: none was added.
        """
        if not self.divergences:
            raise UsageError("no window was compared")
        kl = np.concatenate(self.divergences)
        same = mean_estimate(np.concatenate(self.agreements).mean(axis=1))
        low, high = max(0.0, same.low), min(1.0, same.high)
        return Agreement(
            windows=len(kl),
            tokens=kl.size,
            kl_mean=mean_estimate(kl.mean(axis=1)),
            kl_p99=percentile_estimate(kl, 99),
            top1=Estimate(same.value, low, high),
            perplexity_teacher=_perplexity(self.teacher_losses),
            perplexity_student=_perplexity(self.student_losses),
        )


def _perplexity(losses: list[np.ndarray]) -> Estimate | None:
    return perplexity(np.concatenate(losses)) if losses else None


def compare_logits(
    teacher: np.ndarray, student: np.ndarray, ids: np.ndarray | None = None
) -> Agreement:
    """`Comparison` of two logit arrays ``[N, S, V]`` at once, window by window."""
    comparison = Comparison()
    comparison.add(teacher, student, ids)
    return comparison.result()
