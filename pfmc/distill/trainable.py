"""Fixed linears that can be trained: everything a layer stores, with gradients through rounding.

A `TrainableLinear` stands in a `pfmc.distill.student.Student` where a quantised linear stood. It
holds real *latent* weights; at every call they are rounded to the grid that the target stores, the
input falls on the grid of the target's input converter, and the target's own twin
(`pfmc.targets.base.Twin`) multiplies, with its noise. Learned are the latent weights, the scale of
each channel or group, the bias, the step of a static input converter and whatever the twin can
learn (ranges of output converters). Positive numbers are held as logarithms, so that one learning
rate means the same relative change for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from pfmc.errors import UsageError
from pfmc.hardware import FixedLinear, QuantisedMatrix
from pfmc.targets.base import Twin
from pfmc.targets.grids import on_grid, on_own_grid, peak_step

_INSIDE = 0.49
"""How far from its code, in steps, a latent weight starts at most: rounding gives the code back."""
_SMALLEST = 1e-12
_TOPS: dict[str, Callable[[int], float]] = {
    "int": lambda bits: 2.0 ** (bits - 1) - 1,
    "ternary": lambda bits: 1.0,
    "midrise": lambda bits: 2.0**bits - 1,
}
"""Largest code by format and width (`pfmc.formats`)."""


class InputGrid(nn.Module):
    """An input converter, shared by the linears that read the same value.

    Args:
        bits: width of an input code, 0 for real numbers.
        step: of a static converter, learned; None where every position is scaled by its own peak.
    """

    def __init__(self, bits: int, step: float | None) -> None:
        super().__init__()
        self.top = float(2 ** (bits - 1) - 1) if bits else 0.0
        known = None if step is None else torch.tensor(math.log(max(step, _SMALLEST)))
        self.log_step = None if known is None else nn.Parameter(known)
        self._last: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x on the grid, and the x of the largest code (``[]`` or ``[..., 1]``)."""
        if self._last is None or self._last[0] is not x:
            self._last = (x, self._convert(x))
        return self._last[1]

    def _convert(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.top:
            return x, x.new_ones(())
        if self.log_step is None:
            return on_own_grid(x, self.top), peak_step(x, self.top) * self.top
        step = self.log_step.exp()
        return on_grid(x, step, self.top), step * self.top

    def forget(self) -> None:
        """Lets go of the last input; called after each step."""
        self._last = None


class TrainableLinear(nn.Module):
    """``x[..., in] -> y[..., out]`` of one layer under training.

    Args:
        record: the layer as the quantiser left it: where training starts.
        weight: the untouched real weights ``[in, out]``.
        grid: its input converter, registered elsewhere since others share it.
        twin: the target's stand-in.

    Attributes:
        weight: latent ``[out, in]``; log_scale ``[out, groups]``; bias ``[out]``.
    """

    def __init__(self, record: FixedLinear, weight: Tensor, grid: InputGrid, twin: Twin) -> None:
        super().__init__()
        matrix = record.matrix
        if matrix.format not in _TOPS:
            raise UsageError(
                f"distillation trains integer codes, not {matrix.format}", where=record.name,
                mend=f"choose a format of {', '.join(_TOPS)}",
            )  # fmt: skip
        self.name, self.group = record.name, matrix.group
        self.top, self.odd = _TOPS[matrix.format](matrix.bits), matrix.format == "midrise"
        scale = np.maximum(np.asarray(matrix.scale, np.float32), _SMALLEST)
        self.log_scale = nn.Parameter(torch.from_numpy(np.log(scale)).T.contiguous())
        self.weight = nn.Parameter(self._latent(matrix, weight.detach().float().cpu()))
        held = np.zeros(record.outputs, np.float32) if record.bias is None else record.bias
        self.bias = nn.Parameter(torch.from_numpy(np.array(held, np.float32)))
        if not isinstance(twin, nn.Module):
            raise TypeError(f"the twin of {record.name} is no torch module")
        self.twin = twin
        self._grid = (grid,)  # in a tuple: registered once, by the trainee

    @property
    def grid(self) -> InputGrid:
        """Its input converter."""
        return self._grid[0]

    def _latent(self, matrix: QuantisedMatrix, weight: Tensor) -> Tensor:
        """The real weights, pulled so near to the start's codes that they round to them."""
        step = self._steps(matrix.codes.shape[0]).detach()
        codes = torch.from_numpy(matrix.codes.astype(np.float32)).T
        ratio = weight.T / step
        near = _INSIDE * (2 if self.odd else 1)
        held = torch.minimum(torch.maximum(ratio, codes - near), codes + near)
        return (held * step).contiguous()

    def _steps(self, inputs: int) -> Tensor:
        """The step of every weight, broadcasting against ``[out, in]``."""
        steps = self.log_scale.exp()
        if steps.shape[1] == 1:
            return steps
        return steps.repeat_interleave(self.group, dim=1)[:, :inputs]

    def rounded(self) -> Tensor:
        """The weights on their grid, ``[out, in]``."""
        return on_grid(self.weight, self._steps(self.weight.shape[1]), self.top, self.odd)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``, bias included."""
        held, full = self._grid[0](x)
        y: Tensor = self.twin(held, self.rounded(), full)
        return y + self.bias

    # -- settling -------------------------------------------------------------------------------

    def settled(self, record: FixedLinear, values: Mapping[str, Tensor]) -> FixedLinear:
        """`record` with what was learned.

        Args:
            record: the layer before.
            values: ``weight``, ``log_scale``, ``bias`` as whole tensors (they may lie sharded).
        """
        steps = values["log_scale"].detach().float().cpu().exp()
        wide = steps.repeat_interleave(self.group, dim=1)[:, : record.inputs]
        latent, unit = values["weight"].detach().float().cpu(), torch.ones(())
        ratio = latent / (wide if steps.shape[1] > 1 else steps)
        codes = on_grid(ratio, unit, self.top, self.odd).T.contiguous().numpy().astype(np.int8)
        matrix = replace(
            record.matrix, codes=codes, scale=steps.T.contiguous().numpy(), diagnostics={},
            choice="distilled",
        )  # fmt: skip
        bias = values["bias"].detach().float().cpu().numpy().copy()
        step = self._grid[0].log_step
        return replace(
            record, matrix=matrix, bias=bias if bias.any() else None,
            input_scale=None if step is None else float(step.detach().exp()),
        )  # fmt: skip
