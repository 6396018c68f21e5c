"""A graph as a flat list of steps over numbered slots: what the student runs, made once.

Values live in one of two places. *Host* values (numpy) are those that depend on input shapes and
small constants alone: shape arithmetic, position ranges, causal masks. All others are *device*
values (torch). Host values are the same for the same input shapes, so the student remembers them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from pfmc.errors import InputError
from pfmc.ir import meaning, vocabulary
from pfmc.ir.meaning import Arrays, Run

SMALL = 4096
"""Elements up to which a constant may take part in host arithmetic and folding."""


@dataclass(frozen=True)
class Step:
    """One call: ``slots[outputs] = run(*slots[inputs])``.

    Attributes:
        run: the operator, or a conversion.
        inputs: slots read, -1 for an absent input (slot -1 is always None).
        outputs: slots written, -1 for an unused output.
        host: whether the results are host values.
        linear: layer name of a fixed linear, else "".
    """

    run: Run
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    host: bool = False
    linear: str = ""


@dataclass
class Program:
    """The steps of a model and what its slots hold before the first step.

    Attributes:
        steps: in order of execution.
        count: number of slots.
        inputs: graph input name to slot.
        outputs: graph output name to slot.
        device: constants on the device, slot to array.
        host: constants on the host, slot to array.
        linears: fixed-linear nodes by layer name.
        memorable: whether host values depend on input shapes alone.
    """

    steps: list[Step] = field(default_factory=list)
    count: int = 0
    inputs: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)
    device: dict[int, np.ndarray] = field(default_factory=dict)
    host: dict[int, np.ndarray] = field(default_factory=dict)
    linears: dict[str, ir.Node] = field(default_factory=dict)
    memorable: bool = True


class Builder:
    """Walks a graph once and lays its steps out.

    Args:
        model: at any stage; its functions other than ``pfmc`` ones must have been inlined.
        arrays: the library of the device values.
        linear: makes the run of a fixed linear from its node.
    """

    def __init__(self, model: ir.Model, arrays: Arrays, linear: Callable[[ir.Node], Run]) -> None:
        self.model, self.arrays, self.linear = model, arrays, linear
        self.program = Program()
        self.slots: dict[tuple[ir.Value, bool], int] = {}
        self.constants: dict[ir.Value, np.ndarray] = {}
        self.on_host: set[ir.Value] = set()

    def build(self) -> Program:
        """The program of the model."""
        graph, program = self.model.graph, self.program
        missing = meaning.unsupported(self.model)
        if missing:
            names = ", ".join(f"{d or 'ai.onnx'}::{op} ({n})" for (d, op), n in missing.items())
            raise InputError(f"operators without a meaning here: {names}")
        for value in graph.inputs:
            program.inputs[value.name or ""] = self._new(value, False)
        for node in graph:
            self._node(node)
        for value in graph.outputs:
            program.outputs[value.name or ""] = self._device(value)
        return program

    # -- slots --------------------------------------------------------------------------------

    def _new(self, value: ir.Value, host: bool) -> int:
        slot = self.program.count
        self.program.count += 1
        self.slots[value, host] = slot
        return slot

    def _constant(self, value: ir.Value) -> np.ndarray | None:
        if value in self.constants:
            return self.constants[value]
        if value.const_value is None or value.producer() is not None or value.is_graph_input():
            return None
        self.constants[value] = value.const_value.numpy()
        return self.constants[value]

    def _host(self, value: ir.Value) -> int:
        """The slot of `value` where an operator reads integers: host if it can be."""
        known = self._constant(value)
        if known is None and value not in self.on_host:
            self.program.memorable = False  # a shape that depends on data
            return self._device(value)
        if (value, True) not in self.slots:
            assert known is not None
            self.program.host[self._new(value, True)] = known
        return self.slots[value, True]

    def _device(self, value: ir.Value) -> int:
        """The slot of `value` on the device, brought there if need be."""
        if (value, False) in self.slots:
            return self.slots[value, False]
        known = self._constant(value)
        if known is not None:
            slot = self._new(value, False)
            self.program.device[slot] = known
            return slot
        if value not in self.on_host:
            raise InputError(f"value {value.name!r} is read before it is written")
        source, slot = self.slots[value, True], self._new(value, False)
        self.program.steps.append(Step(self.arrays.asarray, (source,), (slot,), host=True))
        return slot

    # -- nodes --------------------------------------------------------------------------------

    def _node(self, node: ir.Node) -> None:
        if node.domain == vocabulary.DOMAIN and node.op_type in vocabulary.LINEARS:
            return self._fixed_linear(node)
        if node.op_type == "NonZero":
            self.program.memorable = False
        inputs = [v for v in node.inputs if v is not None]
        if node.op_type == "Constant":
            self.constants[node.outputs[0]] = meaning.constant_value(node)
        elif node.op_type == "Identity" and self._constant(inputs[0]) is not None:
            self.constants[node.outputs[0]] = self._constant(inputs[0])  # type: ignore[assignment]
        elif node.op_type in ("Shape", "Size"):
            self._shape(node, inputs[0])
        elif all(self._small(v) for v in inputs):
            self._fold(node)
        elif all(v in self.on_host or self._small(v) for v in inputs):
            self._emit(node, host=True)
        else:
            self._emit(node, host=False)
        return None

    def _small(self, value: ir.Value) -> bool:
        if value in self.constants:
            return self.constants[value].size <= SMALL
        tensor = value.const_value
        return tensor is not None and tensor.size <= SMALL and self._constant(value) is not None

    def _shape(self, node: ir.Node, value: ir.Value) -> None:
        known = self._constant(value)
        run = meaning.make(node)
        if known is not None:
            self.constants[node.outputs[0]] = run(known)
            return
        slot = self.slots[value, True] if value in self.on_host else self._device(value)
        self.on_host.add(node.outputs[0])
        out = self._new(node.outputs[0], True)
        self.program.steps.append(Step(run, (slot,), (out,), host=True))

    def _fold(self, node: ir.Node) -> None:
        inputs = [None if v is None else self._constant(v) for v in node.inputs]
        with np.errstate(all="ignore"):
            results = meaning.compile_node(node)(inputs)
        for value, array in zip(node.outputs, results, strict=False):
            self.constants[value] = np.asarray(array)

    def _emit(self, node: ir.Node, host: bool) -> None:
        reads = meaning.HOST_INPUTS.get(node.op_type, frozenset()) if not node.domain else ()
        inputs = tuple(
            -1 if v is None else (self._host(v) if host or i in reads else self._device(v))
            for i, v in enumerate(node.inputs)
        )
        outputs = []
        for value in node.outputs:
            if host:
                self.on_host.add(value)
            outputs.append(self._new(value, host))
        run = meaning.make(node) if host else meaning.make(node, self.arrays)
        self.program.steps.append(Step(run, inputs, tuple(outputs), host=host))

    def _fixed_linear(self, node: ir.Node) -> None:
        x = node.inputs[0]
        assert x is not None
        name = node.name or node.outputs[0].name or ""
        if name in self.program.linears:
            raise InputError(f"two fixed linears are named {name!r}", where=name)
        self.program.linears[name] = node
        source = self._device(x)
        out = self._new(node.outputs[0], False)
        self.program.steps.append(Step(self.linear(node), (source,), (out,), linear=name))


Frees = tuple[int, ...]


def schedule(
    steps: list[Step], keep: set[int]
) -> list[tuple[Run, tuple[int, ...], tuple[int, ...] | int, Frees]]:
    """The steps as plain tuples, each with the slots that nobody reads after it.

    Args:
        steps: in order of execution.
        keep: slots that must survive (inputs, outputs, constants, host values).
    """
    last: dict[int, int] = {}
    for position, step in enumerate(steps):
        for slot in (*step.inputs, *step.outputs):
            last[slot] = position
    plan: list[Any] = []
    for position, step in enumerate(steps):
        dead = tuple(
            slot
            for slot in dict.fromkeys((*step.inputs, *step.outputs))
            if slot >= 0 and last[slot] == position and slot not in keep
        )
        outputs = step.outputs[0] if len(step.outputs) == 1 else step.outputs
        plan.append((step.run, step.inputs, outputs, dead))
    return plan
