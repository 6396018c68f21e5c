"""The teacher: the untouched model, asked afresh or remembered for every sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pfmc.distill.lessons import Lesson
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
        self._known: dict[str, Tensor] | None = None

    @torch.no_grad()
    def ask(self, rows: Sequence[int], held_out: bool = False) -> dict[str, Tensor]:
        """What the lesson keeps of the answers to samples by number."""
        if self._known is not None and not held_out:
            index = torch.as_tensor(list(rows))
            return {k: v[index] for k, v in self._known.items()}
        return self._fresh(rows, held_out)

    def _fresh(self, rows: Sequence[int], held_out: bool) -> dict[str, Tensor]:
        return self.lesson.keep(self.student(**self.lesson.feeds(rows, held_out)))

    @torch.no_grad()
    def remember(self, uses: int) -> bool:
        """Keeps all answers if each is wanted more than once and they fit; says whether.

        They are asked for in order, so that they do not depend on which are needed first.

        Args:
            uses: samples that will be asked for, repeated ones counted.
        """
        count = self.lesson.rows
        first = self._fresh(range(min(self.batch, count)), False)
        size = sum(v.element_size() * v[0].numel() for v in first.values()) * count
        if uses <= count or size > REMEMBERED_BYTES:
            return False
        known = {k: v.new_empty((count, *v.shape[1:])) for k, v in first.items()}
        for start in range(0, count, self.batch):
            rows = range(start, min(start + self.batch, count))
            for name, value in self._fresh(rows, False).items():
                known[name][start : start + len(rows)] = value
        self._known = known
        return True
