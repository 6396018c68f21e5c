"""What a change of one layer's weights does to the whole model's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from pfmc.distill.calibrate import real_rows
from pfmc.distill.drive import detect
from pfmc.distill.student import IdealLinear, Student
from pfmc.errors import UsageError

BATCHES = 4
"""Batches of calibration data that a measurement takes at most."""


class Meter:
    """Runs the float model with one layer changed.

    Args:
        model: at stage CANONICAL.
        feeds: graph inputs by name; the first `BATCHES` are used.
    """

    def __init__(self, model: ir.Model, feeds: Sequence[Mapping[str, npt.NDArray[Any]]]) -> None:
        self.student = Student(model).eval()
        self.feeds = list(feeds[:BATCHES])
        try:
            self.logits: str | None = detect(model).logits
        except UsageError:  # an encoder or a vision model
            self.logits = None
        self.truth = [self._run(n) for n in range(len(self.feeds))]

    @torch.inference_mode()
    def _run(self, number: int) -> list[Tensor]:
        feeds = self.feeds[number]
        found = self.student(**feeds)
        if self.logits is not None:
            scores = self._real(found[self.logits], feeds)
            return [torch.log_softmax(scores.float(), dim=-1)]
        names = [n for n, v in found.items() if v.is_floating_point()]
        return [self._real(found[n], feeds) for n in names]

    def _real(self, y: Tensor, feeds: Mapping[str, npt.NDArray[Any]]) -> Tensor:
        real = real_rows(feeds)
        return y[real] if real is not None and y.shape[: real.dim()] == real.shape else y

    def harm(self, layer: str, weight: npt.NDArray[np.float32]) -> float:
        """KL divergence in nats a token with `weight` in `layer`; else relative square error."""
        before = self.student.linears[layer]
        changed = IdealLinear(torch.from_numpy(weight), getattr(before, "bias", None))
        self.student.replace(layer, changed)
        try:
            return self._harm()
        finally:
            self.student.replace(layer, before)

    def harm_of(self, model: ir.Model) -> float:
        """The same measure for a whole model in place of the float one, at any stage."""
        before, self.student = self.student, Student(model).eval()
        try:
            return self._harm()
        finally:
            self.student = before

    def apart(self, model: ir.Model) -> float:
        """Largest difference to the float model, over its largest (log) score or output."""
        before, self.student = self.student, Student(model).eval()
        try:
            pairs = self._pairs()
        finally:
            self.student = before
        return max(float((t - f).abs().max()) / (float(t.abs().max()) or 1.0) for t, f in pairs)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        both = zip(self.truth, map(self._run, range(len(self.feeds))), strict=True)
        return [pair for a, b in both for pair in zip(a, b, strict=True)]

    def _harm(self) -> float:
        pairs = self._pairs()
        if self.logits is not None:
            nats = sum(float((t.exp() * (t - f)).sum()) for t, f in pairs)
            return nats / max(1, sum(t[..., 0].numel() for t, _ in pairs))
        power = sum(float((t.double() ** 2).sum()) for t, _ in pairs)
        wrong = sum(float(((t - f).double() ** 2).sum()) for t, f in pairs)
        return wrong / power if power > 0 else wrong
