"""Runs a model step by step over all its calibration data at once, in two streams.

One stream is the float model, the other reads what the layers rounded so far make of the same
data. Each step runs for every batch before the next one starts, so one fixed linear's weight is
in memory at a time, and what a layer reads in both streams is known when it is its turn. Steps
that no fixed linear has touched run once for both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from pfmc.distill.program import Builder, Program, Step
from pfmc.distill.tensors import TorchArrays
from pfmc.errors import UsageError
from pfmc.ir.meaning import Run

Slots = dict[int, object]
BLOCK_LINEARS = 8
"""Fixed linears up to which parts of one numbered layer make one block."""
LARGEST_BLOCK = 16
"""Fixed linears above which a piece of the graph is no block: it is rounded layer by layer."""

_NUMBERED = re.compile(r"^(.*?\d+)(\.|/|$)")


@dataclass(frozen=True)
class Block:
    """Steps ``[start, stop)``: from where one value carries everything to the next such place.

    Attributes:
        linears: the fixed linears inside, in order.
        results: slots that later steps read, or the graph's outputs.
    """

    start: int
    stop: int
    linears: tuple[str, ...]
    results: tuple[int, ...]


@dataclass
class Streams:
    """What is alive of each batch: common values, and those of the two streams."""

    common: list[Slots]
    exact: list[Slots] = field(default_factory=list)
    rounded: list[Slots] = field(default_factory=list)

    def of(self, batch: int, rounded: bool) -> Mapping[int, object]:
        """What the steps of one stream may read."""
        own = (self.rounded if rounded else self.exact)[batch]
        return {**self.common[batch], **own}


def _no_linear(_: ir.Node) -> Run:
    def refuse(*_: object) -> None:
        raise AssertionError("a fixed linear is run by who solves it")

    return refuse


class Lockstep:
    """The program of a CANONICAL model and the state of its data.

    Args:
        model: at stage CANONICAL.
        batches: graph inputs by name, one mapping a batch.

    Attributes:
        program: its steps; linears: its fixed linears by name.
        streams: what is alive now.
        blocks: the program's blocks in order.
    """

    def __init__(self, model: ir.Model, batches: Iterable[Mapping[str, np.ndarray]]) -> None:
        self.arrays = TorchArrays("cpu", torch.float32)
        self.program: Program = Builder(model, self.arrays, _no_linear).build()
        self.linears = self.program.linears
        self._types = {str(v.name): v.dtype for v in model.graph.inputs}
        self.streams = Streams([self._fed(feeds) for feeds in batches])
        count = len(self.streams.common)
        if not count:
            raise UsageError("there is no calibration data to round on")
        self.streams.exact = [{} for _ in range(count)]
        self.streams.rounded = [{} for _ in range(count)]
        self.touched = _touched(self.program.steps)
        self._last = _last_reads(self.program)
        self.blocks = _blocks(self.program, self.touched, self._last)
        for slot in self.blocks[-1].results:
            self._last[slot] = len(self.program.steps)

    def _fed(self, feeds: Mapping[str, np.ndarray]) -> Slots:
        slots: Slots = {-1: None}
        for name, slot in self.program.inputs.items():
            if name not in feeds:
                raise UsageError(f"input {name!r} is missing from the calibration data")
            dtype = self._types.get(name)
            wanted = None if dtype is None else self.arrays.dtype(dtype)
            value = torch.as_tensor(np.asarray(feeds[name]))
            slots[slot] = value.to(wanted or value.dtype)
        return slots

    # -- one step -------------------------------------------------------------------------------

    def constants(self, step: Step) -> Slots:
        """The constants that `step` reads, made for this step alone."""
        found: Slots = {}
        for slot in step.inputs:
            if slot in self.program.host:
                found[slot] = self.program.host[slot]
            elif slot in self.program.device:
                found[slot] = self.arrays.asarray(self.program.device[slot])
        return found

    def run(self, index: int) -> None:
        """Runs step `index`, no fixed linear, for every batch, and forgets what it read last."""
        step = self.program.steps[index]
        held = self.constants(step)
        both = step.outputs and any(slot in self.touched for slot in step.outputs)
        for batch in range(len(self.streams.common)):
            if not both:
                call(step, {**held, **self.streams.common[batch]}, self.streams.common[batch])
                continue
            for own, rounded in ((self.streams.exact, False), (self.streams.rounded, True)):
                call(step, {**held, **self.streams.of(batch, rounded)}, own[batch])
        self.forget(index)

    def read(self, index: int, rounded: bool) -> list[Tensor]:
        """What fixed linear step `index` reads of every batch."""
        slot = self.program.steps[index].inputs[0]
        found = [self.streams.of(b, rounded)[slot] for b in range(len(self.streams.common))]
        return [x for x in found if isinstance(x, Tensor)]

    def write(self, index: int, values: list[Tensor], rounded: bool) -> None:
        """Sets what fixed linear step `index` gives for every batch."""
        slot = self.program.steps[index].outputs[0]
        own = self.streams.rounded if rounded else self.streams.exact
        for slots, value in zip(own, values, strict=True):
            slots[slot] = value

    def drop_results(self) -> None:
        """Says that nobody wants what the last block gives."""
        for slot in self.blocks[-1].results:
            self._last.pop(slot, None)

    def is_read(self, slot: int, index: int) -> bool:
        """Whether a step after `index` reads `slot`, or it is a result of the last block."""
        return self._last.get(slot, -1) > index

    def forget(self, index: int) -> None:
        """Lets go of the values and constants that no step after `index` reads."""
        step = self.program.steps[index]
        for slot in (*step.inputs, *step.outputs):
            if slot >= 0 and self._last.get(slot, -1) <= index:
                self.program.device.pop(slot, None)  # an embedding table, say
                for part in (self.streams.common, self.streams.exact, self.streams.rounded):
                    for slots in part:
                        slots.pop(slot, None)


def call(step: Step, slots: Mapping[int, object], into: Slots) -> None:
    """``into[outputs] = run(slots[inputs])``."""
    with np.errstate(all="ignore"):
        result = step.run(*(slots[i] for i in step.inputs))
    if len(step.outputs) == 1:
        into[step.outputs[0]] = result[0] if type(result) is tuple else result
        return
    for slot, value in zip(step.outputs, result, strict=False):
        if slot >= 0:
            into[slot] = value


# -- blocks ----------------------------------------------------------------------------------------


def _touched(steps: list[Step]) -> frozenset[int]:
    """Slots whose value depends on some fixed linear."""
    found: set[int] = set()
    for step in steps:
        if step.linear or any(slot in found for slot in step.inputs):
            found.update(slot for slot in step.outputs if slot >= 0)
    return frozenset(found)


def _last_reads(program: Program) -> dict[int, int]:
    """Slot -> the last step that reads it; graph outputs are read after the end."""
    last: dict[int, int] = {}
    for index, step in enumerate(program.steps):
        for slot in step.inputs:
            last[slot] = index
    return last


def _blocks(program: Program, touched: frozenset[int], last: Mapping[int, int]) -> list[Block]:
    steps, ends = program.steps, []
    alive: set[int] = set()
    pending = False
    for index, step in enumerate(steps):
        alive = {s for s in alive if last.get(s, -1) > index}
        alive |= {s for s in step.outputs if s in touched and last.get(s, -1) > index}
        pending = pending or bool(step.linear)
        if pending and len(alive) == 1:
            ends.append((index + 1, tuple(alive)))
            pending = False
    begun = ends[-1][0] if ends else 0
    written = {s for step in steps[begun:] for s in step.outputs}
    outputs = tuple(s for s in program.outputs.values() if s in written)
    ends.append((len(steps), outputs))
    return _merged(steps, ends)


def _merged(steps: list[Step], ends: list[tuple[int, tuple[int, ...]]]) -> list[Block]:
    """Pieces of one numbered layer joined up to `BLOCK_LINEARS`."""
    blocks: list[Block] = []
    start = 0
    for stop, results in ends:
        names = tuple(s.linear for s in steps[start:stop] if s.linear)
        piece = Block(start, stop, names, results)
        before = blocks[-1] if blocks else None
        if before is not None and (not names or _together(before, piece)):
            joined = (*before.linears, *names)
            blocks[-1] = Block(before.start, stop, joined, results or before.results)
        else:
            blocks.append(piece)
        start = stop
    return blocks


def _together(before: Block, piece: Block) -> bool:
    if len(before.linears) + len(piece.linears) > BLOCK_LINEARS:
        return False
    scopes = {m[1] if (m := _NUMBERED.match(n)) else n for n in (*before.linears, *piece.linears)}
    return len(scopes) == 1
