"""Choosing the next token from its scores: greedy, temperature, top-k, top-p; seeded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pfmc.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the scores; 0 means greedy.
        top_k: keep the k best tokens; 0 keeps all.
        top_p: keep the fewest tokens whose probability reaches p (arXiv:1904.09751); 1 keeps all.
        greedy: always the best token, the lowest id among equals.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UsageError(f"temperature is {self.temperature}", mend="give 0 or more")
        if self.top_k < 0:
            raise UsageError(f"top-k is {self.top_k}", mend="give 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p is {self.top_p}", mend="give more than 0 and at most 1")

    def probabilities(self, scores: np.ndarray) -> np.ndarray:
        """What is drawn from: float64 ``[B, V]`` from scores ``[B, V]``, temperature > 0."""
        wide = scores.astype(np.float64) / self.temperature
        order = np.argsort(-wide, axis=-1, kind="stable")
        ranked: np.ndarray = np.take_along_axis(wide, order, axis=-1)
        ranked = np.exp(ranked - ranked[:, :1])
        if self.top_k:
            ranked[:, self.top_k :] = 0
        ranked /= ranked.sum(axis=-1, keepdims=True)
        before = np.cumsum(ranked, axis=-1) - ranked
        ranked = np.where((before < self.top_p) | (self.top_p == 1.0), ranked, 0.0)
        ranked /= ranked.sum(axis=-1, keepdims=True)
        made: np.ndarray = np.empty_like(ranked)
        np.put_along_axis(made, order, ranked, axis=-1)
        return made

    def choose(self, scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One token for each row of ``scores[B, V]``: int64 ``[B]``; one draw a row."""
        if self.greedy or self.temperature == 0:
            return np.asarray(np.argmax(scores, axis=-1), dtype=np.int64)
        cumulative = np.cumsum(self.probabilities(scores), axis=-1)
        drawn = rng.random((len(scores), 1)) * cumulative[:, -1:]
        return np.asarray(np.sum(cumulative <= drawn, axis=-1), dtype=np.int64)
