"""Operators that work element by element: arithmetic, comparison, logic, activations, casts."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from pfmc.errors import InputError
from pfmc.ir.meaning.attributes import (
    Array,
    Arrays,
    Maker,
    Run,
    attribute,
    describe,
    integer,
    real,
    text,
)


def _plain(function: Callable[..., Array]) -> Maker:
    return lambda node, xp: function


def _method(name: str) -> Maker:
    return lambda node, xp: getattr(xp, name)


def _fold(name: str) -> Maker:
    def make(node: ir.Node, xp: Arrays) -> Run:
        combine = getattr(xp, name)
        if len(node.inputs) == 2:
            return combine  # type: ignore[no-any-return]
        return lambda *inputs: functools.reduce(combine, inputs)

    return make


def _sum(node: ir.Node, xp: Arrays) -> Run:
    return lambda *inputs: functools.reduce(operator.add, inputs)


def _average(node: ir.Node, xp: Arrays) -> Run:
    return lambda *inputs: functools.reduce(operator.add, inputs) / len(inputs)


def _divide(node: ir.Node, xp: Arrays) -> Run:
    def run(a: Array, b: Array) -> Array:
        return a / b if xp.is_float(a) else xp.divide_integers(a, b)

    return run


def _modulo(node: ir.Node, xp: Arrays) -> Run:
    return xp.fmod if integer(node, "fmod", 0) else xp.remainder


def _power(node: ir.Node, xp: Arrays) -> Run:
    def run(x: Array, exponent: Array) -> Array:
        if xp.name != "numpy" and isinstance(exponent, (np.ndarray, np.generic)):
            exponent = exponent.item() if exponent.size == 1 else xp.asarray(np.asarray(exponent))
        if isinstance(exponent, (int, float)):
            return xp.astype(xp.pow(x, exponent), x.dtype)
        if not xp.is_float(x) and xp.is_float(exponent):
            return xp.astype(xp.pow(xp.astype(x, exponent.dtype), exponent), x.dtype)
        return xp.astype(xp.pow(x, exponent), x.dtype)

    return run


def _clip(node: ir.Node, xp: Arrays) -> Run:
    low, high = attribute(node, "min"), attribute(node, "max")  # before opset 11

    def run(x: Array, lowest: Array | None = low, highest: Array | None = high) -> Array:
        if lowest is not None:
            x = xp.maximum(x, _like(xp, lowest, x))
        return x if highest is None else xp.minimum(x, _like(xp, highest, x))

    return run


def _like(xp: Arrays, bound: Array, x: Array) -> Array:
    return xp.full((), bound, x.dtype, x) if isinstance(bound, float) else bound


_NARROW = re.compile(r"float[468](?!\d)|int[24]$")  # conversions that saturate in ways of their own


def _cast(node: ir.Node, xp: Arrays) -> Run:
    kind = ir.DataType(integer(node, "to", 1))
    if kind not in _CASTS:
        raise InputError(f"Cast to {kind} has no meaning here", where=describe(node))
    dtype = xp.dtype(kind)
    return lambda x: xp.astype(x, dtype)


def _cast_like(node: ir.Node, xp: Arrays) -> Run:
    def run(x: Array, like: Array) -> Array:
        if _NARROW.search(str(like.dtype)):
            raise InputError(f"CastLike to {like.dtype} has no meaning here", where=describe(node))
        return xp.astype(x, like.dtype)

    return run


def _is_infinite(node: ir.Node, xp: Arrays) -> Run:
    if not integer(node, "detect_negative", 1):
        return lambda x: xp.isinf(x) & (x > 0)
    if not integer(node, "detect_positive", 1):
        return lambda x: xp.isinf(x) & (x < 0)
    return xp.isinf


def _dropout(node: ir.Node, xp: Arrays) -> Run:
    def run(x: Array, ratio: Array | None = None, training: Array | None = None) -> Any:
        if training is not None and bool(training.item()):
            raise InputError("Dropout in training mode", where=describe(node))
        if len(node.outputs) == 1:
            return x
        return x, xp.full(tuple(x.shape), True, xp.dtype(ir.DataType.BOOL), x)

    return run


def _gelu(node: ir.Node, xp: Arrays) -> Run:
    tanh = text(node, "approximate", "none") == "tanh"
    return lambda x: xp.gelu(x, tanh)


def _swish(node: ir.Node, xp: Arrays) -> Run:
    alpha = real(node, "alpha", 1.0)
    if alpha == 1.0:
        return xp.silu
    return lambda x: x * xp.sigmoid(x * alpha)


def _relu(node: ir.Node, xp: Arrays) -> Run:
    return lambda x: xp.maximum(x, xp.full((), 0, x.dtype, x))


def _leaky_relu(node: ir.Node, xp: Arrays) -> Run:
    alpha = real(node, "alpha", 0.01)
    return lambda x: xp.where(x < 0, x * alpha, x)


def _elu(node: ir.Node, xp: Arrays) -> Run:
    alpha = real(node, "alpha", 1.0)
    return lambda x: xp.where(x < 0, alpha * (xp.exp(x) - 1), x)


def _softplus(node: ir.Node, xp: Arrays) -> Run:
    def run(x: Array) -> Array:
        return xp.maximum(x, xp.full((), 0, x.dtype, x)) + xp.log(1 + xp.exp(-xp.abs(x)))

    return run


def _hard_sigmoid(node: ir.Node, xp: Arrays) -> Run:
    alpha, beta = real(node, "alpha", 0.2), real(node, "beta", 0.5)

    def run(x: Array) -> Array:
        zero, one = (xp.full((), v, x.dtype, x) for v in (0, 1))
        return xp.minimum(xp.maximum(x * alpha + beta, zero), one)

    return run


def _reciprocal(node: ir.Node, xp: Arrays) -> Run:
    return lambda x: 1 / x


def _identity(node: ir.Node, xp: Arrays) -> Run:
    return lambda x, *rest: x


_CASTS = frozenset(
    {
        ir.DataType.BFLOAT16,
        ir.DataType.BOOL,
        ir.DataType.DOUBLE,
        ir.DataType.FLOAT,
        ir.DataType.FLOAT16,
        ir.DataType.INT16,
        ir.DataType.INT32,
        ir.DataType.INT64,
        ir.DataType.INT8,
        ir.DataType.UINT16,
        ir.DataType.UINT32,
        ir.DataType.UINT64,
        ir.DataType.UINT8,
    }
)

ELEMENTWISE: dict[tuple[str, str], Maker] = {
    ("", "Abs"): _method("abs"),
    ("", "Add"): _plain(operator.add),
    ("", "And"): _plain(operator.and_),
    ("", "Cast"): _cast,
    ("", "CastLike"): _cast_like,
    ("", "Ceil"): _method("ceil"),
    ("", "Clip"): _clip,
    ("", "Cos"): _method("cos"),
    ("", "Div"): _divide,
    ("", "Dropout"): _dropout,
    ("", "Elu"): _elu,
    ("", "Equal"): _plain(operator.eq),
    ("", "Erf"): _method("erf"),
    ("", "Exp"): _method("exp"),
    ("", "Floor"): _method("floor"),
    ("", "Gelu"): _gelu,
    ("", "Greater"): _plain(operator.gt),
    ("", "GreaterOrEqual"): _plain(operator.ge),
    ("", "HardSigmoid"): _hard_sigmoid,
    ("", "Identity"): _identity,
    ("", "IsInf"): _is_infinite,
    ("", "IsNaN"): _method("isnan"),
    ("", "LeakyRelu"): _leaky_relu,
    ("", "Less"): _plain(operator.lt),
    ("", "LessOrEqual"): _plain(operator.le),
    ("", "Log"): _method("log"),
    ("", "Max"): _fold("maximum"),
    ("", "Mean"): _average,
    ("", "Min"): _fold("minimum"),
    ("", "Mod"): _modulo,
    ("", "Mul"): _plain(operator.mul),
    ("", "Neg"): _plain(operator.neg),
    ("", "Not"): _method("logical_not"),
    ("", "Or"): _plain(operator.or_),
    ("", "Pow"): _power,
    ("", "Reciprocal"): _reciprocal,
    ("", "Relu"): _relu,
    ("", "Round"): _method("round"),
    ("", "Sigmoid"): _method("sigmoid"),
    ("", "Sign"): _method("sign"),
    ("", "Sin"): _method("sin"),
    ("", "Softplus"): _softplus,
    ("", "Sqrt"): _method("sqrt"),
    ("", "Sub"): _plain(operator.sub),
    ("", "Sum"): _sum,
    ("", "Swish"): _swish,
    ("", "Tan"): _method("tan"),
    ("", "Tanh"): _method("tanh"),
    ("", "Where"): _method("where"),
    ("", "Xor"): _plain(operator.xor),
}
