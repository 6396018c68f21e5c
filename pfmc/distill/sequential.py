"""Rounds a model layer by layer, each on what the layers rounded before it give.

Unlike `pfmc.distill.calibrate`, which runs the whole float model first, this holds one layer's
weight at a time (one block's, where rounding is learned) beside the data at that place, and each
layer makes up for the errors of those before it: its goal is the float output, its inputs are the
rounded ones (`pfmc.layer_rounding.Seen.target`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor, nn

from pfmc import rounding
from pfmc.distill.calibrate import MOMENT_WIDEST, InputSums, LayerSums, real_part, real_rows
from pfmc.distill.learned import LatentLinear, Learning, tune
from pfmc.distill.lockstep import LARGEST_BLOCK, Block, Lockstep, call
from pfmc.distill.program import Step
from pfmc.errors import InputError
from pfmc.hardware import LayerStatistics, QuantisedMatrix
from pfmc.ir import routing, stored
from pfmc.layer_rounding import LayerPlan, Seen, round_layer

_COLUMNS = 2048  # outputs summed at a time

Array = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Convert = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Order:
    """What the quantiser asks for.

    Attributes:
        of: layer name -> how it is rounded; None leaves it float.
        convert: a layer's statistics -> its input converter, or None where inputs stay float.
        learning: for layers whose search is ``learned``.
        asymmetric: whether layers make up for the errors of those before them.
    """

    of: Callable[[str], LayerPlan | None]
    convert: Callable[[LayerStatistics], Convert | None]
    learning: Learning = field(default_factory=Learning)
    asymmetric: bool = True


def token_converter(top: float) -> Convert:
    """``QuantiseToken``: afresh for every position."""

    def convert(x: Tensor) -> Tensor:
        step = x.detach().abs().amax(-1, keepdim=True).clamp_min(1e-30) / top
        ratio = x / step
        return (ratio + (ratio.round() - ratio).detach()) * step

    return convert


def static_converter(top: float, step: float) -> Convert:
    """``Quantise`` of one step."""

    def convert(x: Tensor) -> Tensor:
        ratio = (x / step).clamp(-top, top)
        return (ratio + (ratio.round() - ratio).detach()) * step

    return convert


def _silent(_: str) -> None:
    """No progress shown."""


def solve(
    model: ir.Model,
    batches: Iterable[Mapping[str, np.ndarray]],
    plan: Order,
    keep: Callable[[str, QuantisedMatrix], None],
    progress: Callable[[str], None] = _silent,
) -> dict[str, LayerStatistics]:
    """Rounds every fixed linear of a CANONICAL model in the order of the graph.

    Args:
        model: at stage CANONICAL.
        batches: graph inputs by name, one mapping a batch; all are held.
        plan: how.
        keep: takes each layer's matrix once it is final.
        progress: takes a line a layer.

    Returns:
        the float model's statistics of every layer (without moments).
    """
    return _Solver(model, batches, plan, keep, progress).run()


@dataclass
class _Shared:
    """What layers that read the same input share."""

    slot: int
    sums: InputSums
    seen: Seen


class _Solver:
    def __init__(
        self, model: ir.Model, batches: Iterable[Mapping[str, np.ndarray]], plan: Order,
        keep: Callable[[str, QuantisedMatrix], None], progress: Callable[[str], None],
    ) -> None:  # fmt: skip
        feeds = list(batches)
        self.real = [real_rows(f) for f in feeds]
        self.lock = Lockstep(model, feeds)
        self.routed = {name for names in routing.groups(model) for name in names}
        self.plan, self.keep, self.progress = plan, keep, progress
        self.statistics: dict[str, LayerStatistics] = {}
        self.shared: _Shared | None = None
        self.found: dict[str, tuple[QuantisedMatrix, Array]] = {}
        self.converters: dict[str, Convert | None] = {}
        self.moved = False  # whether the streams differ

    def run(self) -> dict[str, LayerStatistics]:
        if not self._learns(self.lock.blocks[-1]):
            self.lock.drop_results()
        for block in self.lock.blocks:
            with torch.no_grad():
                if self._learns(block):
                    self._learned(block)
                else:
                    self._steps(block)
            for name, (matrix, _) in self.found.items():
                self.keep(name, matrix)
            self.found.clear()
        return self.statistics

    def _steps(self, block: Block) -> None:
        for index in range(block.start, block.stop):
            if self.lock.program.steps[index].linear:
                self._linear(index, self._learns(block))
            else:
                self.lock.run(index)

    # -- one layer --------------------------------------------------------------------------------

    def _linear(self, index: int, hold: bool) -> None:
        step = self.lock.program.steps[index]
        node = self.lock.linears[step.linear]
        weight, bias = _arrays(node)
        exact, rounded = self.lock.read(index, False), self.lock.read(index, True)
        plan = self.plan.of(step.linear)
        self._look(step, exact, rounded, plan)
        self._note(step.linear, exact, weight)
        self._write(index, exact, weight, bias, None, False)
        if plan is not None:
            matrix = self._solved(step.linear, weight, plan, spare=not hold)
            self.moved = True
            if hold:
                self.found[step.linear] = (matrix, weight)
            else:
                self.keep(step.linear, matrix)
            del weight  # overwritten, and not held beside the rounded one
            weight = _weights(matrix)
        self._write(index, rounded, weight, bias, self.converters.get(step.linear), True)
        self.lock.forget(index)
        _release(node)

    def _write(
        self, index: int, xs: Sequence[Tensor], weight: Array, bias: Array,
        convert: Convert | None, rounded: bool,
    ) -> None:  # fmt: skip
        matrix, offset = torch.from_numpy(weight), torch.from_numpy(bias)
        own = self.lock.streams.rounded if rounded else self.lock.streams.exact
        slot = self.lock.program.steps[index].outputs[0]
        if not self.lock.is_read(slot, index):
            return
        for slots, x in zip(own, xs, strict=True):
            slots[slot] = torch.matmul(x if convert is None else convert(x), matrix) + offset

    def _solved(self, name: str, weight: Array, plan: LayerPlan, spare: bool) -> QuantisedMatrix:
        assert self.shared is not None
        self.progress(f"round: {name}")
        try:
            return round_layer(
                weight, plan.form, plan.group, plan.search, self.shared.seen,
                lambda text: self.progress(f"round: {name}: {text}"), spare,
            )  # fmt: skip
        except InputError as error:
            raise InputError(error.what, where=f"{name}, {error.where}", mend=error.mend) from error

    def _look(
        self, step: Step, exact: list[Tensor], rounded: list[Tensor], plan: LayerPlan | None
    ) -> None:
        """Sums over the input, unless the layer before read the same.

        A router chooses in each stream for itself, so an expert's rows in one are not those in the
        other, and their products mean nothing.
        """
        slot, paired = step.inputs[0], step.linear not in self.routed
        wanted = plan is not None and plan.search in ("compensate", "learned")
        wanted = wanted and exact[0].shape[-1] <= MOMENT_WIDEST
        known = self.shared
        if (
            known is not None
            and known.slot == slot
            and (known.seen.moment is not None or not wanted)
        ):
            return
        rows = [self._rows(x, n) for n, x in enumerate(exact)]
        sums = InputSums.of(rows[0])
        for part in rows[1:]:
            sums = sums.plus(InputSums.of(part))
        self.shared = _Shared(slot, sums, Seen(sums.power / max(1, sums.rows)))
        if not wanted:
            return
        convert = self.plan.convert(self._statistics_of(sums))
        moment = cross = None
        for number, (x, x_rounded) in enumerate(zip(rows, rounded, strict=True)):
            y = x_rounded if convert is None else convert(x_rounded)
            wide = self._rows(y, number).astype(np.float64)
            moment = _plus(moment, wide.T @ wide)
            if paired and self.plan.asymmetric and (self.moved or convert is not None):
                cross = _plus(cross, wide.T @ x.astype(np.float64))
        count = max(1, sums.rows)
        seen = Seen(
            sums.power / count, None if moment is None else moment / count,
            None if cross is None else cross / count, sums.rows,
        )  # fmt: skip
        self.shared = replace(self.shared, seen=seen)

    def _statistics_of(self, sums: InputSums) -> LayerStatistics:
        none = np.zeros(0, np.float32)
        return LayerSums(sums, none, none.astype(np.float64)).statistics(None)

    def _note(self, name: str, exact: list[Tensor], weight: Array) -> None:
        assert self.shared is not None
        peak = np.zeros(weight.shape[1], np.float32)
        square = np.zeros(weight.shape[1])
        for number, x in enumerate(exact):
            rows = self._rows(x, number)
            for start in range(0, weight.shape[1], _COLUMNS):
                part = slice(start, start + _COLUMNS)
                y = rows @ weight[:, part]
                peak[part] = np.maximum(peak[part], np.abs(y).max(axis=0, initial=0.0))
                square[part] += np.square(y, dtype=np.float64).sum(axis=0)
        self.statistics[name] = LayerSums(self.shared.sums, peak, square).statistics(None)
        self.converters[name] = self.plan.convert(self.statistics[name])

    def _rows(self, x: Tensor, batch: int) -> Array:
        x = real_part(x, self.real[batch])
        rows = x.reshape(-1, x.shape[-1]).float().contiguous().numpy()
        if not np.isfinite(rows).all():
            raise InputError(
                "calibration met NaN or infinity",
                mend="the model overflows on this data; give other data",
            )
        return np.asarray(rows)

    # -- one block --------------------------------------------------------------------------------

    def _learns(self, block: Block) -> bool:
        plans = [self.plan.of(name) for name in block.linears]
        fits = 0 < len(plans) <= LARGEST_BLOCK
        return fits and any(p is not None and p.search == "learned" for p in plans)

    def _learned(self, block: Block) -> None:
        lock = self.lock
        start = [{**c, **r} for c, r in zip(lock.streams.common, lock.streams.rounded, strict=True)]
        steps = lock.program.steps[block.start : block.stop]
        held = [lock.constants(s) for s in steps]
        self._steps(block)
        results = [s for s in block.results if _is_real(lock.streams.exact[0].get(s))]
        if not results:  # an index of the largest, say: nothing to go down
            self.progress(f"round: {block.linears[0]} …: gives no real numbers, so nothing learned")
            return
        targets = [[_tensor(own[s]) for s in results] for own in lock.streams.exact]
        latents = {n: self._latent(n) for n in self.found if self._is_learned(n)}
        fixed = {n: self._fixed(n) for n in block.linears if n not in latents}

        def forward(number: int, linears: Mapping[str, nn.Module]) -> list[Tensor]:
            slots = dict(start[number])
            for step, constants in zip(steps, held, strict=True):
                if step.linear:
                    module = linears.get(step.linear) or fixed[step.linear]
                    slots[step.outputs[0]] = module(slots[step.inputs[0]])
                else:
                    call(step, {**slots, **constants}, slots)
            return [_tensor(slots[s]) for s in results]

        with torch.enable_grad():
            before, after = tune(latents, forward, targets, self.plan.learning)
        self.progress(f"round: {block.linears[0]} …: block error {before:.3g} -> {after:.3g}")
        self._take(latents, before, after)
        for number, own in enumerate(lock.streams.rounded):
            own.update(zip(results, forward(number, latents), strict=True))

    def _is_learned(self, name: str) -> bool:
        plan = self.plan.of(name)
        return plan is not None and plan.search == "learned"

    def _latent(self, name: str) -> LatentLinear:
        matrix, weight = self.found[name]
        bias = torch.from_numpy(_arrays(self.lock.linears[name])[1])
        return LatentLinear(weight, matrix, bias, self.converters[name])

    def _fixed(self, name: str) -> nn.Module:
        """A layer of the block that is not learned, as it stands in the rounded stream."""
        weight, bias = _arrays(self.lock.linears[name])
        if name in self.found:
            weight = _weights(self.found[name][0])
        return _Fixed(torch.from_numpy(weight), torch.from_numpy(bias), self.converters[name])

    def _take(self, latents: Mapping[str, LatentLinear], before: float, after: float) -> None:
        errors = {"block_error_before": before, "block_error": after}
        for name, module in latents.items():
            matrix, weight = self.found[name]
            if after < before:
                codes, scale = module.result()
                matrix = replace(matrix, codes=codes, scale=scale, choice="learned")
            matrix = replace(matrix, diagnostics={**matrix.diagnostics, **errors})
            self.found[name] = (matrix, weight)


class _Fixed(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor, convert: Convert | None) -> None:
        super().__init__()
        self.weight, self.bias, self.convert = weight, bias, convert

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return torch.matmul(x if self.convert is None else self.convert(x), self.weight) + self.bias


def _weights(matrix: QuantisedMatrix) -> Array:
    """The dequantised matrix, one array in memory."""
    return rounding.dequantise(matrix.codes, matrix.scale, matrix.group)


def _is_real(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value


def _plus(held: Doubles | None, more: Doubles) -> Doubles:
    if held is None:
        return more
    held += more
    return held


def _arrays(node: ir.Node) -> tuple[Array, Array]:
    """Weight and bias of a fixed linear, float32."""
    made = []
    for value in node.inputs[1:3]:
        assert value is not None
        if value.const_value is None:
            raise InputError("a fixed linear whose weight is no constant", where=str(node.name))
        array = np.ascontiguousarray(value.const_value.numpy(), np.float32)
        made.append(array if array.flags.writeable else array.copy())
        stored.release(stored.numbers(value))
    return made[0], made[1]


def _release(node: ir.Node) -> None:
    tensor = node.inputs[1].const_value if node.inputs[1] is not None else None
    release = getattr(tensor, "release", None)
    if release is not None:
        release()
