"""Lowers norms, embeddings, activations and other elementwise operators of com.microsoft."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from pfmc.ingest.lowering import Lowering, last_dim, rank


def rms(low: Lowering, value: ir.Value, scale: ir.Value, axis: int = -1) -> ir.Value:
    """RMSNormalization with the node's epsilon."""
    attributes = {"axis": axis, "epsilon": low.number("epsilon", 1e-5), "stash_type": 1}
    return low.build.op("RMSNormalization", [value, scale], attributes)


def layer_norm(
    low: Lowering, value: ir.Value, gamma: ir.Value, beta: ir.Value | None, epsilon: float
) -> ir.Value:
    """LayerNormalization over the last axis with the node's epsilon, else `epsilon`."""
    operands = [value, gamma] if beta is None else [value, gamma, beta]
    attributes = {"axis": -1, "epsilon": low.number("epsilon", epsilon)}
    return low.build.op("LayerNormalization", operands, attributes)


def _mean(low: Lowering, value: ir.Value, axis: int = -1) -> ir.Value:
    return low.build.op("ReduceMean", [value, low.ints(axis)], {"keepdims": 1})


def _inverse_root(low: Lowering, square: ir.Value, epsilon: float) -> ir.Value:
    """``1 / sqrt(mean(square) + epsilon)`` over the last axis."""
    mean = _mean(low, square)
    total = low.build.op("Add", [mean, low.scalar(low.number("epsilon", epsilon), mean)])
    return low.build.op("Reciprocal", [low.build.op("Sqrt", [total])])


def rms_norm(low: Lowering) -> None:
    """RMSNormalization; the inverse deviation, if used, from its formula."""
    value, axis = low.need(0, "X"), low.integer("axis", -1)
    deviation = None
    if low.used(1):
        if axis not in (-1, (rank(value) or 0) - 1):
            raise low.refuse("the inverse deviation over several axes is not supported")
        deviation = _inverse_root(low, low.build.op("Mul", [value, value]), 1e-5)
    low.done(rms(low, value, low.need(1, "scale"), axis), deviation)


def skip_rms_norm(low: Lowering) -> None:
    """Add and RMSNormalization, and the sum; mean and deviation, never written, are refused."""
    total = low.add(low.add(low.need(0, "input"), low.need(1, "skip")), low.input(3))
    low.done(rms(low, total, low.need(2, "gamma")), None, None, total)


def skip_layer_norm(low: Lowering) -> None:
    """Add and LayerNormalization, and the sum; mean and deviation, never written, are refused."""
    total = low.add(low.add(low.need(0, "input"), low.need(1, "skip")), low.input(4))
    low.done(layer_norm(low, total, low.need(2, "gamma"), low.input(3), 1e-12), None, None, total)


def embed_layer_norm(low: Lowering) -> None:
    """Gather of words, positions and segments, their sum, LayerNormalization; mask_index."""
    tables = [low.need(2, "word"), low.need(3, "position"), low.input(4)]
    gamma, beta = low.need(5, "gamma"), low.input(6)
    embed(low, tables, gamma, beta, mask=7, positions=8)


def embed(
    low: Lowering, tables: list[ir.Value | None], gamma: ir.Value, beta: ir.Value | None, *,
    mask: int, positions: int = -1,
) -> None:  # fmt: skip
    """The common part of the float and the quantised embedding, inputs by index."""
    words, places, kinds = tables
    ids = low.need(0, "input_ids")
    where = low.input(positions) if positions >= 0 else None
    if where is None:
        zero, one = (low.build.constant(np.array(v, dtype=np.int64)) for v in (0, 1))
        where = low.build.op("Range", [zero, low.number_of(low.size(ids, 1)), one])
    total = low.build.op("Gather", [words, ids])
    total = low.add(total, low.build.op("Gather", [places, where]))
    if low.input(1) is not None:
        if kinds is None:
            raise low.refuse("the input 'segment_embedding' is missing")
        total = low.add(total, low.build.op("Gather", [kinds, low.input(1)]))
    count = _words(low, ids, low.input(mask)) if low.used(1) else None
    low.done(layer_norm(low, total, gamma, beta, 1e-12), count, total)


def _words(low: Lowering, ids: ir.Value, mask: ir.Value | None) -> ir.Value:
    """mask_index ``[B]``: how many words the mask shows; zeros without one, as in ORT."""
    if mask is not None:
        return low.build.op("ReduceSum", [mask, low.ints(1)], {"keepdims": 0})
    zero = ir.tensor(np.zeros(1, np.int32))
    return low.build.op("ConstantOfShape", [low.size(ids, 0)], {"value": zero})


def gelu(approximate: str) -> Callable[[Lowering], None]:
    """Gelu of X, plus a bias if there is a second input."""

    def lower_gelu(low: Lowering) -> None:
        value = low.add(low.need(0, "X"), low.input(1))
        low.done(low.build.op("Gelu", [value], {"approximate": approximate}))

    form = "its tanh form" if approximate == "tanh" else "its exact form"
    lower_gelu.__doc__ = f"Gelu in {form}, of X plus the bias if there is one."
    return lower_gelu


def _sigmoid_product(low: Lowering, value: ir.Value, factor: ir.Value) -> ir.Value:
    """``value * sigmoid(factor * value)``."""
    gate = low.build.op("Sigmoid", [low.build.op("Mul", [value, factor])])
    return low.build.op("Mul", [value, gate])


def quick_gelu(low: Lowering) -> None:
    """x * sigmoid(alpha * x)."""
    value = low.need(0, "X")
    low.done(_sigmoid_product(low, value, low.scalar(low.number("alpha", 1.702), value)))


def scaled_silu(low: Lowering) -> None:
    """z * sigmoid(z) for z = scale * x."""
    value, scale = low.need(0, "X"), low.input(1)
    factor = scale if scale is not None else low.scalar(low.number("alpha", 1.0), value)
    scaled = low.build.op("Mul", [value, factor])
    low.done(low.build.op("Mul", [scaled, low.build.op("Sigmoid", [scaled])]))


def gated_add(low: Lowering) -> None:
    """X + Y * gate."""
    product = low.build.op("Mul", [low.need(1, "Y"), low.need(2, "gate")])
    low.done(low.build.op("Add", [low.need(0, "X"), product]))


def gated_rms_norm(low: Lowering) -> None:
    """RMSNormalization of groups of the scale's length, times silu or sigmoid of the gate."""
    value, scale, gate = low.need(0, "X"), low.need(1, "scale"), low.need(2, "gate")
    groups, width, axes = last_dim(scale), last_dim(value), rank(value)
    if groups is None or width is None or axes is None or width % groups:
        raise low.refuse("the shapes of the input and the scale are unknown")
    if width == groups:
        normed = rms(low, value, scale)
    else:
        split = low.reshape(value, (*[0] * (axes - 1), width // groups, groups))
        normed = low.reshape(rms(low, split, scale), (*[0] * (axes - 1), width))
    kind = low.word("activation", "silu")
    opened = low.build.op("Sigmoid", [gate])
    if kind in ("silu", "swish"):
        opened = low.build.op("Mul", [gate, opened])
    elif kind != "sigmoid":
        raise low.refuse(f"the activation {kind!r} is not known")
    low.done(low.build.op("Mul", [normed, opened]))


def branchwise_rms_norm(low: Lowering) -> None:
    """RMSNormalization of every branch by itself, times the scale."""
    value, scale, branches = low.need(0, "X"), low.input(1), low.integer("num_branches")
    axes, width = rank(value), last_dim(value)
    if axes is None or width is None or (branches and width % branches):
        raise low.refuse("the shape of the input is unknown")
    inner = width // branches if branches else width
    grouped = low.reshape(value, (*[0] * (axes - 1), branches, inner)) if branches else value
    root = _inverse_root(low, low.build.op("Mul", [grouped, grouped]), 1e-5)
    normed = low.build.op("Mul", [grouped, root])
    if scale is not None:
        if rank(scale) == 1 and last_dim(scale) != inner:
            scale = low.reshape(scale, (-1, inner))
        normed = low.build.op("Mul", [normed, scale])
    low.done(low.reshape(normed, (*[0] * (axes - 1), width)) if branches else normed)


def linear_attention_gate(low: Lowering) -> None:
    """decay_scale * softplus(a + dt_bias), and sigmoid(b)."""
    total = low.build.op("Add", [low.need(0, "a"), low.need(1, "dt_bias")])
    soft = low.build.op("Softplus", [total])
    beta = low.build.op("Sigmoid", [low.need(3, "b")]) if low.used(1) else None
    low.done(low.build.op("Mul", [soft, low.need(2, "decay_scale")]), beta)


def _streams(low: Lowering) -> tuple[ir.Value, bool]:
    """The streams as ``[..., C, H]``, and whether they came flat."""
    value, branches = low.need(0, "streams"), low.integer("num_branches")
    axes, width = rank(value), last_dim(value)
    if axes is None or width is None:
        raise low.refuse("the shape of the streams is unknown")
    if not branches:
        return value, False
    return low.reshape(value, (*[0] * (axes - 1), branches, width // branches)), True


def _mix(low: Lowering, mix: ir.Value, streams: ir.Value, flat: bool, axes: int) -> ir.Value:
    """A mix ``[..., C]``, ``[..., C, 1]``, ``[..., C, H]`` or flat, against ``[..., C, H]``."""
    if rank(mix) == axes:
        return mix
    if rank(mix) != axes - 1:
        raise low.refuse("the rank of the mix is unknown")
    width, branches = last_dim(streams), low.integer("num_branches")
    if flat and width and last_dim(mix) == branches * width and branches != branches * width:
        return low.reshape(mix, (*[0] * (axes - 2), branches, width))
    return low.build.op("Unsqueeze", [mix, low.ints(-1)])


def pre_mix(low: Lowering) -> None:
    """reduction_scale * sum over the streams of stream * mix."""
    streams, flat = _streams(low)
    axes = (rank(low.need(0, "streams")) or 0) + int(flat)
    mixed = low.build.op("Mul", [streams, _mix(low, low.need(1, "mix"), streams, flat, axes)])
    total = low.build.op("ReduceSum", [mixed, low.ints(-2)], {"keepdims": 0})
    factor = low.number("reduction_scale", 1.0)
    if factor != 1.0:
        total = low.build.op("Mul", [total, low.scalar(factor, total)])
    low.done(total)


def post_mix(low: Lowering) -> None:
    """The streams mixed by a matrix, plus mix * block_output."""
    streams, flat = _streams(low)
    axes = (rank(low.need(0, "streams")) or 0) + int(flat)
    block = low.build.op("Unsqueeze", [low.need(1, "block_output"), low.ints(-2)])
    added = low.build.op("Mul", [_mix(low, low.need(2, "mix"), streams, flat, axes), block])
    matrix = low.input(3)
    if matrix is not None:
        perm = [*range(axes - 2), axes - 1, axes - 2]
        streams = low.build.op("MatMul", [low.transpose(matrix, perm), streams])
    total = low.build.op("Add", [streams, added])
    width = last_dim(low.need(0, "streams")) or 0
    low.done(low.reshape(total, (*[0] * (axes - 2), width)) if flat else total)


def engram_gate(low: Lowering) -> None:
    """sigmoid(sign(d) * sqrt(max(|d|, 1e-6))) * value, d the product of normed key and query."""
    key, query, value = (low.need(i, n) for i, n in enumerate(("key", "query", "value")))
    width = last_dim(key)
    if width is None:
        raise low.refuse("the width of the keys is unknown")
    normed = [_scaled_rms(low, key, low.need(3, "key scale")),
              _scaled_rms(low, query, low.need(4, "query scale"))]  # fmt: skip
    product = low.build.op("Mul", normed)
    dot = low.build.op("ReduceSum", [product, low.ints(-1)], {"keepdims": 1})
    dot = low.build.op("Div", [dot, low.scalar(width**0.5, key)])
    size = low.build.op("Max", [low.build.op("Abs", [dot]), low.scalar(1e-6, key)])
    root = low.build.op("Mul", [low.build.op("Sign", [dot]), low.build.op("Sqrt", [size])])
    gate = low.build.op("Sigmoid", [root])
    gated = low.build.op("Mul", [gate, low.build.op("Unsqueeze", [value, low.ints(2)])])
    after = _scaled_rms(low, gated, low.need(5, "conv_norm_scale")) if low.used(1) else None
    low.done(gated, after)


def _scaled_rms(low: Lowering, value: ir.Value, scale: ir.Value) -> ir.Value:
    root = _inverse_root(low, low.build.op("Mul", [value, value]), 1e-5)
    return low.build.op("Mul", [low.build.op("Mul", [value, root]), scale])
