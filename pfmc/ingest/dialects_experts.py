"""Lowers mixtures of experts of com.microsoft: rows sent to gathered weights.

The weights of an expert are gathered from their stack for every row, the form that
`pfmc.passes.experts.GatheredExperts` turns into one fixed linear for each expert.
Meaning: onnxruntime docs/ContribOperators.md (MoE, QMoE), measured on its CPU kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from pfmc.ingest.dialects_packed import BITS, PackedStack
from pfmc.ingest.lowering import Lowering, last_dim, rank

_NOTHING = "ONNX Runtime's CPU provider does not run it"


@dataclass(frozen=True)
class _Layer:
    """One product of the experts: weights ``[experts, out, in]``, biases ``[experts, out]``."""

    weight: ir.Value
    bias: ir.Value | None


def mixture(low: Lowering) -> None:
    """Softmax, TopK, and for every chosen expert its two products with gathered weights."""
    low.forbid(fc3_experts_weights=6, fc3_experts_bias=7)
    probabilities = low.build.op("Softmax", [low.need(1, "router_probs")], {"axis": -1})
    values, chosen = _best(low, probabilities)
    if low.integer("normalize_routing_weights"):
        values = _normalised(low, values)
    layers = _Layer(low.need(2, "fc1"), low.input(3)), _Layer(low.need(4, "fc2"), low.input(5))
    _send(low, values, chosen, layers)


def quantised_mixture(low: Lowering) -> None:
    """As MoE with unpacked weights; the weights of the chosen experts always sum to one."""
    low.forbid(fc3_experts_weights=8, fc3_scales=9, fc3_experts_bias=10, fc3_zero_points=13)
    low.forbid(fc1_global_scale=15, fc2_global_scale=16, fc1_act_scale=17, fc2_act_scale=18)
    if low.word("quant_type", "int") != "int":
        raise low.refuse(f"codes that are no integers: {_NOTHING}")
    if low.integer("weights_prepacked", -1) == 1:
        raise low.refuse("weights prepacked for another provider")
    bits = low.integer("expert_weight_bits", 4)
    first = _unpacked(low, 2, 3, 11, low.integer("fc1_expert_weight_bits", bits), "fc1")
    second = _unpacked(low, 5, 6, 12, low.integer("fc2_expert_weight_bits", bits), "fc2")
    probs, mixing = low.need(1, "router_probs"), low.input(14)
    values, chosen = _best(low, probs)
    if mixing is None:
        values = low.build.op("Softmax", [values], {"axis": -1})
    else:
        values = low.build.op("GatherElements", [mixing, chosen], {"axis": -1})
        if low.integer("normalize_routing_weights"):
            values = _normalised(low, values)
    _send(low, values, chosen, (_Layer(first, low.input(4)), _Layer(second, low.input(7))))


def _best(low: Lowering, scores: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The k largest scores of every row, and whose they are."""
    count = low.ints(low.positive_or("k", 1))
    found = low.build.ops("TopK", [scores, count], {"axis": -1}, outputs=2)
    return found[0], found[1]


def _normalised(low: Lowering, values: ir.Value) -> ir.Value:
    total = low.build.op("ReduceSum", [values, low.ints(-1)], {"keepdims": 1})
    return low.build.op("Div", [values, total])


def _unpacked(
    low: Lowering, codes_at: int, scales_at: int, zeros_at: int, bits: int, name: str
) -> ir.Value:
    """The stack ``[experts, out, in]`` that packed codes stand for, a lazy constant."""
    codes, scales = (low.tensor(low.input(i), name) for i in (codes_at, scales_at))
    zeros = low.tensor(low.input(zeros_at), name) if low.input(zeros_at) is not None else None
    dims, block = [int(n) for n in codes.shape.numpy()], low.integer("block_size")
    if bits not in BITS or codes.dtype != ir.DataType.UINT8 or len(dims) != 3:
        raise low.refuse(f"{name}: {bits} bits of {codes.dtype} are not supported")
    if not all(dims) or (zeros is not None and zeros.dtype != ir.DataType.UINT8):
        raise low.refuse(f"{name}: no codes at all, or zero points that are not uint8")
    experts, rows, columns = dims[0], dims[1], dims[2] * 8 // bits
    blocks = columns // block if block > 0 else 1
    if block > 0 and columns % block:
        raise low.refuse(f"{name}: blocks of {block} do not divide {columns}")
    if scales.size != experts * rows * blocks:
        raise low.refuse(f"{name}: the scales do not have one number for each block")
    lines = (experts * rows, blocks) if block > 0 else (experts, rows)
    if zeros is not None and zeros.size != lines[0] * -(-lines[1] * bits // 8):
        raise low.refuse(f"{name}: the zero points do not have one number for each block")
    source = low.need(codes_at, name)
    read = PackedStack(codes, scales, zeros, (experts, rows, columns), bits, max(block, 0))
    title = f"{source.name}_real"
    return low.lazy(source, read, scales.dtype, (experts, rows, columns), title)


def _send(low: Lowering, values: ir.Value, chosen: ir.Value, layers: tuple[_Layer, _Layer]) -> None:
    """Every row through its experts, weighted and summed."""
    low.zero("use_sparse_mixer")
    source = low.need(0, "input")
    for layer, name in zip(layers, ("fc1", "fc2"), strict=True):
        low.tensor(layer.weight, name)
    width = last_dim(layers[0].weight)
    if width is None or rank(source) not in (2, 3):
        raise low.refuse("the shapes of the input and the weights are unknown")
    count = low.positive_or("k", 1)
    rows = low.reshape(source, (-1, width))
    if count > 1:  # every row once for each of its experts
        copies = low.build.op("Unsqueeze", [rows, low.ints(1)])
        one = low.ints(1)
        shape = low.build.op("Concat", [one, low.ints(count), one], {"axis": 0})
        rows = low.reshape(low.build.op("Expand", [copies, shape]), (-1, width))
    which = low.reshape(chosen, (-1,))
    hidden = _activated(low, _product(low, rows, which, layers[0]), layers[0])
    result = _product(low, hidden, which, layers[1])
    weights = low.reshape(values, (-1, 1))
    result = low.build.op("Mul", [result, weights])
    if count > 1:
        result = low.reshape(result, (-1, count, width))
        result = low.build.op("ReduceSum", [result, low.ints(1)], {"keepdims": 0})
    if rank(source) == 3:
        result = low.build.op("Reshape", [result, low.build.op("Shape", [source])])
    low.done(result)


def _product(low: Lowering, rows: ir.Value, which: ir.Value, layer: _Layer) -> ir.Value:
    """Row r times the matrix of expert ``which[r]``, plus its bias."""
    chosen = low.build.op("Gather", [layer.weight, which], {"axis": 0})
    column = low.build.op("Unsqueeze", [rows, low.ints(2)])
    product = low.build.op("MatMul", [chosen, column])
    flat = low.build.op("Squeeze", [product, low.ints(2)])
    if layer.bias is None:
        return flat
    return low.build.op("Add", [flat, low.build.op("Gather", [layer.bias, which], {"axis": 0})])


def _activated(low: Lowering, value: ir.Value, layer: _Layer) -> ir.Value:
    kind = low.word("activation_type", "relu")
    match kind:
        case "relu":
            return low.build.op("Relu", [value])
        case "identity":
            return value
        case "gelu":  # the CPU kernels compute its tanh form
            return low.build.op("Gelu", [value], {"approximate": "tanh"})
        case "silu":
            return low.build.op("Mul", [value, low.build.op("Sigmoid", [value])])
        case "swiglu":
            return _swiglu(low, value, layer)
    raise low.refuse(f"the activation {kind!r} is not known")


def _swiglu(low: Lowering, value: ir.Value, layer: _Layer) -> ir.Value:
    """``G * sigmoid(alpha * G) * (L + beta)`` of neighbours G and L, both limited."""
    shape = layer.weight.shape
    rows = shape[1] if shape is not None else None
    if low.integer("swiglu_fusion") != 1 or not isinstance(rows, int) or rows % 2:
        raise low.refuse(f"SwiGLU that is not interleaved (swiglu_fusion = 1): {_NOTHING}")
    pairs = low.reshape(value, (-1, rows // 2, 2))
    parts = low.build.ops("Split", [pairs], {"axis": 2, "num_outputs": 2}, outputs=2)
    gate, line = (low.build.op("Squeeze", [part, low.ints(2)]) for part in parts)
    if "swiglu_limit" in low.node.attributes:
        limit = low.scalar(low.number("swiglu_limit", 0.0), value)
        lowest = low.scalar(-low.number("swiglu_limit", 0.0), value)
        gate = low.build.op("Min", [gate, limit])
        line = low.build.op("Clip", [line, lowest, limit])
    alpha, beta = low.number("activation_alpha", 1.0), low.number("activation_beta", 0.0)
    scaled = gate if alpha == 1.0 else low.build.op("Mul", [gate, low.scalar(alpha, value)])
    active = low.build.op("Mul", [gate, low.build.op("Sigmoid", [scaled])])
    moved = line if beta == 0.0 else low.build.op("Add", [line, low.scalar(beta, value)])
    return low.build.op("Mul", [active, moved])
