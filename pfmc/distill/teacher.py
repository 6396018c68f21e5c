"""The teacher: the untouched model, asked afresh or remembered for every sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pfmc.distill.lessons import Array, Lesson
from pfmc.distill.student import Student

REMEMBERED_BYTES = 512 << 20
"""Memory that remembered answers may take; a lesson with more of them is asked afresh."""


class Teacher:
    """Answers for samples of a lesson.

    Args:
        student: the untouched float model.
        lesson: the samples.
        batch: samples asked at a time.
    """

    def __init__(self, student: Student, lesson: Lesson, batch: int) -> None:
        self.student, self.lesson, self.batch = student.eval(), lesson, batch
        self._known: dict[str, dict[int, Tensor]] | None = None

    @torch.no_grad()
    def ask(self, rows: Sequence[int], held_out: bool = False) -> dict[str, Tensor]:
        """What the lesson keeps of the answers to samples by number."""
        if self._known is not None and not held_out:
            return {k: pad_sequence([v[r] for r in rows], True) for k, v in self._known.items()}
        return self._fresh(rows, held_out)

    def _fresh(self, rows: Sequence[int], held_out: bool) -> dict[str, Tensor]:
        return self.lesson.keep(self.student(**self.lesson.feeds(rows, held_out)))

    @torch.no_grad()
    def remember(self, uses: int) -> bool:
        """Keeps all answers if each is wanted more than once and they fit; says whether.

        They are asked for from the shortest to the longest, so that little padding is computed, and
        not in the order in which they are needed first; padding is not kept.

        Args:
            uses: samples that will be asked for, repeated ones counted.
        """
        count, lengths = self.lesson.rows, self.lesson.lengths
        first = self._fresh(range(min(self.batch, count)), False)
        size = sum(v.element_size() * v[0].numel() for v in first.values()) * count
        if lengths is not None:
            size = int(size / lengths[: self.batch].max() * lengths.mean())
        if uses <= count or size > REMEMBERED_BYTES:
            return False
        order = range(count) if lengths is None else lengths.argsort(kind="stable").tolist()
        known: dict[str, dict[int, Tensor]] = {name: {} for name in first}
        for start in range(0, count, self.batch):
            rows = order[start : start + self.batch]
            for name, values in self._fresh(rows, False).items():
                for row, value in zip(rows, values, strict=True):
                    known[name][row] = _unpadded(value, lengths, row)
        self._known = known
        return True


def _unpadded(value: Tensor, lengths: Array | None, row: int) -> Tensor:
    """One sample's answer, vectors ``[S, D]`` up to its length."""
    return value if lengths is None or value.ndim < 2 else value[: lengths[row]].clone()
