"""Lowers com.microsoft operators (onnxruntime-genai exports, fused models) to standard ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from pfmc.ingest import attention
from pfmc.ingest.lowering import Lowering, last_dim, rank
from pfmc.ingest.rewrite import Builder
from pfmc.ir import provenance, vocabulary

CONTRIB = "com.microsoft"


def _rms_norm(low: Lowering) -> None:
    """SimplifiedLayerNormalization is RMSNormalization under its old name."""
    operands = [low.need(0, "X"), low.need(1, "scale")]
    low.done(_rms(low, operands[0], operands[1], low.integer("axis", -1)))


def _rms(low: Lowering, value: ir.Value, scale: ir.Value, axis: int = -1) -> ir.Value:
    attributes = {"axis": axis, "epsilon": low.number("epsilon", 1e-5), "stash_type": 1}
    return low.build.op("RMSNormalization", [value, scale], attributes)


def _skip_rms_norm(low: Lowering) -> None:
    """SkipSimplifiedLayerNormalization: RMSNorm(input + skip + bias), and the sum."""
    total = low.add(low.add(low.need(0, "input"), low.need(1, "skip")), low.input(3))
    low.done(_rms(low, total, low.need(2, "gamma")), None, None, total)


def _skip_layer_norm(low: Lowering) -> None:
    """SkipLayerNormalization: LayerNorm(input + skip + bias), and the sum."""
    total = low.add(low.add(low.need(0, "input"), low.need(1, "skip")), low.input(4))
    low.done(_layer_norm(low, total, low.need(2, "gamma"), low.input(3), 1e-12), None, None, total)


def _layer_norm(
    low: Lowering, value: ir.Value, gamma: ir.Value, beta: ir.Value | None, epsilon: float
) -> ir.Value:
    operands = [value, gamma] if beta is None else [value, gamma, beta]
    attributes = {"axis": -1, "epsilon": low.number("epsilon", epsilon)}
    return low.build.op("LayerNormalization", operands, attributes)


def _embed_layer_norm(low: Lowering) -> None:
    """EmbedLayerNormalization: LayerNorm(word + position + segment)."""
    ids, words, places = low.need(0, "input_ids"), low.need(2, "word"), low.need(3, "position")
    total = low.build.op("Gather", [words, ids])
    positions = low.input(8)
    if positions is None:
        zero, one = (low.build.constant(np.array(v, dtype=np.int64)) for v in (0, 1))
        steps = low.build.op("Squeeze", [low.size(ids, 1), low.ints(0)])
        positions = low.build.op("Range", [zero, steps, one])
    total = low.add(total, low.build.op("Gather", [places, positions]))
    if low.input(1) is not None:
        kinds = low.need(4, "segment_embedding")
        total = low.add(total, low.build.op("Gather", [kinds, low.input(1)]))
    gamma, beta = low.need(5, "gamma"), low.input(6)
    low.done(_layer_norm(low, total, gamma, beta, 1e-12), None, total)


def _gelu(approximate: str) -> Callable[[Lowering], None]:
    def lower_gelu(low: Lowering) -> None:
        value = low.add(low.need(0, "X"), low.input(1))
        low.done(low.build.op("Gelu", [value], {"approximate": approximate}))

    return lower_gelu


def _quick_gelu(low: Lowering) -> None:
    """QuickGelu: x * sigmoid(alpha * x)."""
    value = low.need(0, "X")
    dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
    alpha = low.build.constant(np.array(low.number("alpha", 1.702), dtype=dtype))
    gate = low.build.op("Sigmoid", [low.build.op("Mul", [value, alpha])])
    low.done(low.build.op("Mul", [value, gate]))


def _fused_mat_mul(low: Lowering) -> None:
    """FusedMatMul: alpha * op(A) @ op(B), op transposing the last two axes if asked."""
    low.zero("transBatchA", "transBatchB")
    operands = []
    for index, name in enumerate(("transA", "transB")):
        value = low.need(index, name[-1])
        if low.integer(name):
            value = _swap_last(low, value)
        operands.append(value)
    product = low.build.op("MatMul", operands)
    alpha = low.number("alpha", 1.0)
    if alpha != 1.0:
        dtype = operands[0].dtype.numpy() if operands[0].dtype else np.dtype(np.float32)
        product = low.build.op("Mul", [product, low.build.constant(np.array(alpha, dtype=dtype))])
    low.done(product)


def _swap_last(low: Lowering, value: ir.Value) -> ir.Value:
    axes = rank(value)
    if axes is None or axes < 2:
        raise low.refuse("the rank of a transposed operand is unknown")
    return low.transpose(value, [*range(axes - 2), axes - 1, axes - 2])


def _mat_mul_n_bits(low: Lowering) -> None:
    """MatMulNBits: A @ dequantised(B) + bias; the weight stays packed until somebody reads it."""
    low.forbid(g_idx=4)
    packed = _packed(low)
    source = low.need(1, "B")
    name = (source.name or "").removesuffix("_Q4").removesuffix("_quant")
    weight = low.build.initialiser(
        ir.LazyTensor(packed, packed.dtype, ir.Shape([packed.inputs, packed.outputs])),
        low.build.unique(name or "weight"),
        provenance.weight(source).removesuffix("_Q4") or name,
    )
    low.done(low.add(low.build.op("MatMul", [low.need(0, "A"), weight]), low.input(5)))


class PackedWeight:
    """The weight of a MatMulNBits as a function that unpacks it to ``[inputs, outputs]`` floats.

    ``w[k, n] = (q[n, k] - zero[n, k // block]) * scale[n, k // block]``; low bits first; measured
    bit-exact against ONNX Runtime 1.31.

    Args:
        codes: uint8 ``[outputs, blocks, block * bits / 8]``.
        scales: ``[outputs * blocks]``, its type is the result's.
        zeros: uint8, packed per row, or floats ``[outputs * blocks]``, or None for mid-range.
    """

    def __init__(
        self,
        codes: ir.TensorProtocol,
        scales: ir.TensorProtocol,
        zeros: ir.TensorProtocol | None,
        *,
        inputs: int,
        outputs: int,
        bits: int,
        block: int,
    ) -> None:
        self.codes, self.scales, self.zeros = codes, scales, zeros
        self.inputs, self.outputs, self.bits, self.block = inputs, outputs, bits, block
        self.blocks = -(-inputs // block)
        self.dtype = scales.dtype

    def __call__(self) -> ir.TensorProtocol:
        """The dequantised weight; nothing is kept."""
        scales = self.scales.numpy().reshape(self.outputs, self.blocks, 1)
        codes = unpack(self.codes.numpy().reshape(self.outputs, -1), self.bits)
        codes = codes.reshape(self.outputs, self.blocks, self.block).astype(scales.dtype)
        full = (codes - self._zero_points().astype(scales.dtype)) * scales
        full = full.reshape(self.outputs, -1)[:, : self.inputs]
        return ir.Tensor(np.ascontiguousarray(full.T), dtype=self.dtype)

    def _zero_points(self) -> np.ndarray:
        if self.zeros is None:
            return np.array(1 << (self.bits - 1))
        zeros = self.zeros.numpy()
        if zeros.dtype == np.uint8:
            zeros = unpack(zeros.reshape(self.outputs, -1), self.bits)[:, : self.blocks]
        return zeros.reshape(self.outputs, self.blocks, 1)


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """``uint8[rows, n]`` of `bits`-bit numbers, low bits first, to ``uint8[rows, 8 n / bits]``."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    spread = (packed[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
    return spread.reshape(len(packed), -1)


def _packed(low: Lowering) -> PackedWeight:
    inputs, outputs = low.positive("K"), low.positive("N")
    bits, block = low.integer("bits", 4), low.positive("block_size")
    if bits not in (2, 4, 8) or block < 16 or block & (block - 1):
        raise low.refuse(f"{bits} bits in blocks of {block} are not supported")
    tensors = [v.const_value if v is not None else None for v in map(low.input, (1, 2, 3))]
    codes, scales, zeros = tensors
    if codes is None or scales is None or (low.input(3) is not None and zeros is None):
        raise low.refuse("codes, scales and zero points must be constants")
    blocks = -(-inputs // block)
    row = -(-blocks * bits // 8)
    zero_sizes = (outputs * row, outputs * blocks)
    sizes_fit = codes.size == outputs * blocks * block * bits // 8
    zeros_fit = zeros is None or zeros.size == zero_sizes[zeros.dtype.is_floating_point()]
    if not sizes_fit or scales.size != outputs * blocks or not zeros_fit:
        raise low.refuse("codes, scales or zero points do not have the declared size")
    if codes.dtype != ir.DataType.UINT8 or not scales.dtype.is_floating_point():
        raise low.refuse("codes must be uint8 and scales floating-point")
    return PackedWeight(
        codes, scales, zeros, inputs=inputs, outputs=outputs, bits=bits, block=block
    )


LOWERINGS: dict[tuple[str, str], Callable[[Lowering], None]] = {
    ("", "SimplifiedLayerNormalization"): _rms_norm,
    (CONTRIB, "SimplifiedLayerNormalization"): _rms_norm,
    (CONTRIB, "SkipSimplifiedLayerNormalization"): _skip_rms_norm,
    (CONTRIB, "SkipLayerNormalization"): _skip_layer_norm,
    (CONTRIB, "EmbedLayerNormalization"): _embed_layer_norm,
    (CONTRIB, "GroupQueryAttention"): attention.group_query_attention,
    (CONTRIB, "Attention"): attention.fused_attention,
    (CONTRIB, "MultiHeadAttention"): attention.multi_head_attention,
    (CONTRIB, "RotaryEmbedding"): attention.rotary_embedding,
    (CONTRIB, "MatMulNBits"): _mat_mul_n_bits,
    (CONTRIB, "FusedMatMul"): _fused_mat_mul,
    (CONTRIB, "Gelu"): _gelu("none"),
    (CONTRIB, "BiasGelu"): _gelu("none"),
    (CONTRIB, "FastGelu"): _gelu("tanh"),
    (CONTRIB, "QuickGelu"): _quick_gelu,
}
"""Operator outside the standard -> its lowering; the guard accepts exactly these."""


def lower(model: ir.Model) -> None:
    """Replaces every dialect node of `model` by standard operators and ``pfmc::Rotary``."""
    graph = model.graph
    found = [n for n in graph if (n.domain, n.op_type) in LOWERINGS]
    if not found:
        return
    builder = Builder(graph)
    shared: dict[tuple[object, ...], tuple[ir.Value, ir.Value]] = {}
    for node in found:
        builder.at(node)
        LOWERINGS[node.domain, node.op_type](Lowering(node, builder, shared))
    graph.opset_imports.pop(CONTRIB, None)
    vocabulary.install(model)


__all__ = ["LOWERINGS", "PackedWeight", "last_dim", "lower", "unpack"]
