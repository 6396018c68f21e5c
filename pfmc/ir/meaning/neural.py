"""Matrix products, normalisations, softmax, convolution, number formats, and our own operators."""

from __future__ import annotations

import math

import onnx_ir as ir

from pfmc.errors import InputError
from pfmc.ir import vocabulary
from pfmc.ir.meaning.attributes import (
    Array,
    Arrays,
    Maker,
    Run,
    describe,
    integer,
    real,
    sequence,
    text,
)


def _matmul(node: ir.Node, xp: Arrays) -> Run:
    return xp.matmul


def _gemm(node: ir.Node, xp: Arrays) -> Run:
    alpha, beta = real(node, "alpha", 1.0), real(node, "beta", 1.0)
    flip_a, flip_b = integer(node, "transA", 0), integer(node, "transB", 0)

    def run(a: Array, b: Array, c: Array | None = None) -> Array:
        a, b = a.T if flip_a else a, b.T if flip_b else b
        y = xp.matmul(a, b) if alpha == 1.0 else xp.matmul(a, b) * alpha
        if c is None:
            return y
        return y + (c if beta == 1.0 else c * beta)

    return run


def _einsum(node: ir.Node, xp: Arrays) -> Run:
    equation = text(node, "equation", "").replace(" ", "")
    return lambda *inputs: xp.einsum(equation, *inputs)


def _softmax(node: ir.Node, xp: Arrays) -> Run:
    axis = integer(node, "axis", -1)
    return lambda x: xp.softmax(x, axis)


def _log_softmax(node: ir.Node, xp: Arrays) -> Run:
    axis = integer(node, "axis", -1)
    return lambda x: xp.log_softmax(x, axis)


def _layer_norm(node: ir.Node, xp: Arrays) -> Run:
    axis, epsilon = integer(node, "axis", -1), real(node, "epsilon", 1e-5)
    alone = len(node.outputs) == 1

    def run(x: Array, scale: Array, bias: Array | None = None) -> Array | tuple[Array, ...]:
        rank = -axis if axis < 0 else len(x.shape) - axis
        y = xp.layer_norm(x, scale, bias, rank, epsilon)
        if alone:
            return y
        axes = tuple(range(len(x.shape) - rank, len(x.shape)))
        mean = xp.mean(x, axes, True)
        variance = xp.mean((x - mean) * (x - mean), axes, True)
        return y, mean, 1 / xp.sqrt(variance + epsilon)

    return run


def _rms_norm(node: ir.Node, xp: Arrays) -> Run:
    axis, epsilon = integer(node, "axis", -1), real(node, "epsilon", 1e-5)

    def run(x: Array, scale: Array) -> Array:
        return xp.rms_norm(x, scale, -axis if axis < 0 else len(x.shape) - axis, epsilon)

    return run


def _channels(x: Array, parameter: Array, xp: Arrays) -> Array:
    return xp.reshape(parameter, [-1] + [1] * (len(x.shape) - 2))


def _instance_norm(node: ir.Node, xp: Arrays) -> Run:
    epsilon = real(node, "epsilon", 1e-5)

    def run(x: Array, scale: Array, bias: Array) -> Array:
        axes = tuple(range(2, len(x.shape)))
        centred = x - xp.mean(x, axes, True)
        spread = xp.sqrt(xp.mean(centred * centred, axes, True) + epsilon)
        return centred / spread * _channels(x, scale, xp) + _channels(x, bias, xp)

    return run


def _batch_norm(node: ir.Node, xp: Arrays) -> Run:
    epsilon = real(node, "epsilon", 1e-5)
    if integer(node, "training_mode", 0):
        raise InputError("BatchNormalization in training mode", where=describe(node))

    def run(x: Array, scale: Array, bias: Array, mean: Array, variance: Array) -> Array:
        gain = scale / xp.sqrt(variance + epsilon)
        return (x - _channels(x, mean, xp)) * _channels(x, gain, xp) + _channels(x, bias, xp)

    return run


def _global_average_pool(node: ir.Node, xp: Arrays) -> Run:
    return lambda x: xp.mean(x, tuple(range(2, len(x.shape))), True)


def _conv(node: ir.Node, xp: Arrays) -> Run:
    stride, dilation = sequence(node, "strides"), sequence(node, "dilations")
    group, pads = integer(node, "group", 1), sequence(node, "pads")
    auto = text(node, "auto_pad", "NOTSET")

    def run(x: Array, weight: Array, bias: Array | None = None) -> Array:
        rank = len(x.shape) - 2
        step, spread = stride or [1] * rank, dilation or [1] * rank
        widths = pads or [0] * (2 * rank)
        if auto.startswith("SAME"):
            widths = _same(list(x.shape[2:]), list(weight.shape[2:]), step, spread, auto)
        if any(widths):
            sides = [(widths[d], widths[d + rank]) for d in range(rank)]
            x = xp.pad(x, [(0, 0), (0, 0), *sides], "constant", 0)
        y = xp.convolve(x, weight, step, spread, group)
        return y if bias is None else y + _channels(x, bias, xp)

    return run


def _same(
    sides: list[int], kernel: list[int], step: list[int], spread: list[int], auto: str
) -> list[int]:
    """Padding of auto_pad SAME_UPPER and SAME_LOWER: all starts, then all ends."""
    starts, ends = [], []
    for n, k, s, d in zip(sides, kernel, step, spread, strict=True):
        total = max((math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0)
        small = total // 2
        starts.append(total - small if auto == "SAME_LOWER" else small)
        ends.append(small if auto == "SAME_LOWER" else total - small)
    return starts + ends


def _stretch(scale: Array, x: Array, axis: int, block: int, xp: Arrays) -> Array:
    """`scale` (scalar, per axis or per block) in a shape that broadcasts against `x`."""
    if len(scale.shape) == 0 or (len(scale.shape) == 1 and scale.shape[0] == 1 and not block):
        return xp.reshape(scale, [])
    axis %= len(x.shape)
    if len(scale.shape) == 1 and not block:
        return xp.reshape(scale, [-1 if d == axis else 1 for d in range(len(x.shape))])
    grown = xp.repeat(scale, block, axis)
    return grown[(*[slice(None)] * axis, slice(x.shape[axis]))]


def _dequantize(node: ir.Node, xp: Arrays) -> Run:
    axis, block = integer(node, "axis", 1), integer(node, "block_size", 0)

    def run(x: Array, scale: Array, zero: Array | None = None) -> Array:
        wide = xp.astype(x, scale.dtype)
        if zero is not None:
            wide = wide - _stretch(xp.astype(zero, scale.dtype), x, axis, block, xp)
        return wide * _stretch(scale, x, axis, block, xp)

    return run


def _quantize(node: ir.Node, xp: Arrays) -> Run:
    axis, block = integer(node, "axis", 1), integer(node, "block_size", 0)
    kind = ir.DataType(integer(node, "output_dtype", 0))
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    if kind is ir.DataType.UNDEFINED:
        kind = (zero_point.dtype if zero_point is not None else None) or ir.DataType.UINT8
    if kind not in _RANGES:
        raise InputError(f"QuantizeLinear to {kind} is not supported", where=describe(node))
    low, high = _RANGES[kind]

    def run(x: Array, scale: Array, zero: Array | None = None) -> Array:
        code = xp.round(x / _stretch(scale, x, axis, block, xp))
        if zero is not None:
            code = code + _stretch(xp.astype(zero, x.dtype), x, axis, block, xp)
        bounds = (xp.full((), v, x.dtype, x) for v in (low, high))
        code = xp.maximum(code, next(bounds))
        return xp.astype(xp.minimum(code, next(bounds)), xp.dtype(kind))

    return run


_RANGES: dict[ir.DataType, tuple[int, int]] = {
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT16: (0, 65535),
    ir.DataType.INT16: (-32768, 32767),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.INT4: (-8, 7),
    ir.DataType.UINT2: (0, 3),
    ir.DataType.INT2: (-2, 1),
}


def _fixed_linear(node: ir.Node, xp: Arrays) -> Run:
    return xp.linear


def _quantised_linear(node: ir.Node, xp: Arrays) -> Run:
    dequantize = _dequantize(node, xp)
    return lambda x, codes, scale, bias: xp.linear(x, dequantize(codes, scale), bias)


def _quantise(node: ir.Node, xp: Arrays) -> Run:
    top = real(node, "top", 127.0)
    return lambda x, scale: xp.quantise(x, scale, top)


def _quantise_token(node: ir.Node, xp: Arrays) -> Run:
    top = real(node, "top", 127.0)

    def run(x: Array) -> Array:
        peak = xp.max(xp.abs(x), (-1,), True)
        return xp.quantise(x, xp.maximum(peak, xp.full((), 1e-30, x.dtype, x)) / top, top)

    return run


def _rotary(node: ir.Node, xp: Arrays) -> Run:
    if integer(node, vocabulary.INTERLEAVED, 0):
        return lambda x, cos, sin: x * cos + _neighbours(x, xp) * sin

    def run(x: Array, cos: Array, sin: Array) -> Array:
        half = x.shape[-1] // 2
        turned = xp.concat([-x[..., half:], x[..., :half]], -1)
        return x * cos + turned * sin

    return run


def _neighbours(x: Array, xp: Arrays) -> Array:
    """Every pair ``(a, b)`` of neighbours along the last axis as ``(-b, a)``."""
    pairs = xp.reshape(x, [*x.shape[:-1], x.shape[-1] // 2, 2])
    return xp.reshape(xp.concat([-pairs[..., 1:], pairs[..., :1]], -1), list(x.shape))


def _swiglu(node: ir.Node, xp: Arrays) -> Run:
    return lambda gate, up: xp.silu(gate) * up


def _side_path(node: ir.Node, xp: Arrays) -> Run:
    return lambda x, y, down, up: y + xp.matmul(xp.matmul(x, down), up)


def _trim(node: ir.Node, xp: Arrays) -> Run:
    return lambda y, gain, offset: y * gain + offset


NEURAL: dict[tuple[str, str], Maker] = {
    ("", "BatchNormalization"): _batch_norm,
    ("", "Conv"): _conv,
    ("", "DequantizeLinear"): _dequantize,
    ("", "Einsum"): _einsum,
    ("", "Gemm"): _gemm,
    ("", "GlobalAveragePool"): _global_average_pool,
    ("", "InstanceNormalization"): _instance_norm,
    ("", "LayerNormalization"): _layer_norm,
    ("", "LogSoftmax"): _log_softmax,
    ("", "MatMul"): _matmul,
    ("", "QuantizeLinear"): _quantize,
    ("", "RMSNormalization"): _rms_norm,
    ("", "SimplifiedLayerNormalization"): _rms_norm,
    ("", "Softmax"): _softmax,
    ("pfmc", "FixedLinear"): _fixed_linear,
    ("pfmc", "Quantise"): _quantise,
    ("pfmc", "QuantiseToken"): _quantise_token,
    ("pfmc", "QuantisedLinear"): _quantised_linear,
    ("pfmc", "Rotary"): _rotary,
    ("pfmc", "SidePath"): _side_path,
    ("pfmc", "SwiGLU"): _swiglu,
    ("pfmc", "Trim"): _trim,
}
