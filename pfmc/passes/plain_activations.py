"""Writes rarer activations and gated units by the elementwise operators of the fabric.

The formulas are those of the operators' definitions (onnx docs/Operators.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from pfmc.ir import matcher
from pfmc.ir.shapes import Shapes

Spelling: TypeAlias = list[ir.Node] | str


class _Pen:
    """Writes the new nodes of one old one."""

    def __init__(self, node: ir.Node) -> None:
        x = node.inputs[0]
        assert x is not None
        self.node, self.x, self.new = node, x, list[ir.Node]()
        self.dtype = x.dtype.numpy() if x.dtype is not None else np.dtype(np.float32)

    def op(self, op_type: str, *inputs: ir.Value | None, **options: object) -> ir.Value:
        """The output of a new node."""
        self.new.append(matcher.fresh(op_type, inputs, options))
        output = self.new[-1].outputs[0]
        if self.x.dtype is not None and op_type not in ("Greater", "Less"):
            output.type = ir.TensorType(self.x.dtype)
        return output

    def number(self, value: float) -> ir.Value:
        """A scalar constant of the type of the input."""
        graph = self.node.graph
        assert graph is not None
        stem = f"{self.node.outputs[0].name}:number"
        return matcher.add_array(graph, stem, np.asarray(value, self.dtype))

    def real(self, name: str, default: float) -> float:
        """A float attribute of the old node."""
        return float(matcher.attribute(self.node, name, default))


def _celu(pen: _Pen) -> None:
    """``max(x, 0) + min(alpha * (exp(x / alpha) - 1), 0)``, which is ``alpha * Elu(x / alpha)``."""
    alpha = pen.number(pen.real("alpha", 1.0))
    pen.op("Mul", pen.op("Elu", pen.op("Div", pen.x, alpha)), alpha)


def _hard_swish(pen: _Pen) -> None:
    pen.op("Mul", pen.x, pen.op("HardSigmoid", pen.x, alpha=1 / 6, beta=0.5))


def _mish(pen: _Pen) -> None:
    pen.op("Mul", pen.x, pen.op("Tanh", pen.op("Softplus", pen.x)))


def _prelu(pen: _Pen) -> None:
    """``x`` where it is positive, else ``slope * x``."""
    negative = pen.op("Less", pen.x, pen.number(0.0))
    pen.op("Where", negative, pen.op("Mul", pen.x, pen.node.inputs[1]), pen.x)


def _reduce_log_sum(pen: _Pen) -> None:
    options = {n: matcher.attribute(pen.node, n) for n in ("keepdims", "noop_with_empty_axes")}
    given = {n: v for n, v in options.items() if v is not None}
    pen.op("Log", pen.op("ReduceSum", *pen.node.inputs, **given))


def _selu(pen: _Pen) -> None:
    """Klambauer et al. 2017 (arXiv:1706.02515); the defaults are the operator's."""
    alpha, gamma = pen.real("alpha", 1.67326319217681884765625), pen.real("gamma", 1.05070102214813)
    pen.op("Mul", pen.op("Elu", pen.x, alpha=alpha), pen.number(gamma))


def _shrink(pen: _Pen) -> None:
    """``x + bias`` below ``-lambd``, ``x - bias`` above ``lambd``, else zero."""
    lambd, bias = pen.real("lambd", 0.5), pen.number(pen.real("bias", 0.0))
    above = pen.op("Greater", pen.x, pen.number(lambd))
    below = pen.op("Less", pen.x, pen.number(-lambd))
    rest = pen.op("Where", below, pen.op("Add", pen.x, bias), pen.number(0.0))
    pen.op("Where", above, pen.op("Sub", pen.x, bias), rest)


def _softsign(pen: _Pen) -> None:
    pen.op("Div", pen.x, pen.op("Add", pen.op("Abs", pen.x), pen.number(1.0)))


def _thresholded_relu(pen: _Pen) -> None:
    passes = pen.op("Greater", pen.x, pen.number(pen.real("alpha", 1.0)))
    pen.op("Where", passes, pen.x, pen.number(0.0))


def _spell(write: Callable[[_Pen], None]) -> Callable[[ir.Node, Shapes], Spelling]:
    def spell(node: ir.Node, known: Shapes) -> Spelling:
        if node.inputs[0] is None or node.inputs[0].dtype is None:
            return "an input of unknown type"
        if not node.inputs[0].dtype.is_floating_point():
            return "integers"
        pen = _Pen(node)
        write(pen)
        return pen.new

    return spell


SPELL: dict[str, Callable[[ir.Node, Shapes], Spelling]] = {
    "Celu": _spell(_celu),
    "HardSwish": _spell(_hard_swish),
    "Mish": _spell(_mish),
    "PRelu": _spell(_prelu),
    "ReduceLogSum": _spell(_reduce_log_sum),
    "Selu": _spell(_selu),
    "Shrink": _spell(_shrink),
    "Softsign": _spell(_softsign),
    "ThresholdedRelu": _spell(_thresholded_relu),
}
"""Operator -> how it is written; a text instead of nodes says why it is not."""
