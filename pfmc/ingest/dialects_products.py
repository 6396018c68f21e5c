"""Lowers the products of com.microsoft: fused, packed and looked up by tables."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pfmc.ingest.dialects_packed import BITS, PackedTable, PackedWeight, TableWeight
from pfmc.ingest.lowering import Lowering, rank
from pfmc.ir import provenance


def fused_mat_mul(low: Lowering) -> None:
    """alpha * op(A) @ op(B), op transposing the last two axes, or the batch, if asked."""
    operands = []
    for index, name in enumerate(("A", "B")):
        value = low.need(index, name)
        last, batch = low.integer(f"trans{name}"), low.integer(f"transBatch{name}")
        operands.append(_turned(low, value, bool(last), bool(batch)))
    product = low.build.op("MatMul", operands)
    alpha = low.number("alpha", 1.0)
    if alpha != 1.0:
        product = low.build.op("Mul", [product, low.scalar(alpha, operands[0])])
    low.done(product)


def _turned(low: Lowering, value: ir.Value, last: bool, batch: bool) -> ir.Value:
    """The last two axes swapped; with `batch` the axis before them first moves inwards.

    ``transBatch`` reads ``[d1, ..., dn, M, K]`` as stored ``[M, d1, ..., dn, K]``: the first axis
    belongs behind the others (ORT FusedMatMul, matmul_helper.h).
    """
    if not last and not batch:
        return value
    axes = rank(value)
    if axes is None or axes < 2:
        raise low.refuse("the rank of a transposed operand is unknown")
    perm = list(range(axes))
    if batch:
        perm = [*perm[1:-1], 0, axes - 1]
    if last:
        perm = [*perm[:-2], perm[-1], perm[-2]]
    return low.transpose(value, perm) if perm != list(range(axes)) else value


_ACTIVATIONS: dict[str, tuple[tuple[str, str, float], ...]] = {
    "Relu": (),
    "Tanh": (),
    "Sigmoid": (),
    "Softplus": (),
    "Softsign": (),
    "LeakyRelu": (("alpha", "activation_alpha", 0.01),),
    "Elu": (("alpha", "activation_alpha", 1.0),),
    "HardSigmoid": (("alpha", "activation_alpha", 0.2), ("beta", "activation_beta", 0.5)),
}
"""Activation of a fused operator -> attribute, the fused operator's name of it, default."""


def _activate(low: Lowering, value: ir.Value, given: dict[str, float]) -> ir.Value:
    kind = low.word("activation", "")
    if not kind:
        return value
    if kind not in _ACTIVATIONS:
        raise low.refuse(f"the activation {kind!r} is not supported")
    attributes = {name: given.get(name, default) for name, _, default in _ACTIVATIONS[kind]}
    if kind == "Softsign":
        size = low.build.op("Add", [low.build.op("Abs", [value]), low.scalar(1.0, value)])
        return low.build.op("Div", [value, size])
    return low.build.op(kind, [value], attributes)


def fused_gemm(low: Lowering) -> None:
    """Gemm, then the activation."""
    kinds = {"transA": int, "transB": int, "alpha": float, "beta": float}
    found = low.node.attributes
    attributes = {n: kind(found[n].value) for n, kind in kinds.items() if n in found}
    operands = [low.need(0, "A"), low.need(1, "B"), low.input(2)]
    product = low.build.op("Gemm", operands, attributes)
    extra = {
        name: low.number(own, default)
        for name, own, default in _ACTIVATIONS.get(low.word("activation", ""), ())
    }
    low.done(_activate(low, product, extra))


def fused_conv(low: Lowering) -> None:
    """Conv, plus Z if there is one, then the activation."""
    names = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
    found = low.node.attributes
    attributes = {n: found[n].value for n in names if n in found}
    operands = [low.need(0, "X"), low.need(1, "W"), low.input(2)]
    value = low.build.op("Conv", operands, attributes)
    value = low.add(value, low.input(3))
    numbers = list(found["activation_params"].as_floats()) if "activation_params" in found else []
    wanted = [name for name, _, _ in _ACTIVATIONS.get(low.word("activation", ""), ())]
    low.done(_activate(low, value, dict(zip(wanted, numbers, strict=False))))


def mat_mul_n_bits(low: Lowering) -> None:
    """MatMul with the dequantised weight, plus the bias; it stays packed until somebody reads it.

    The activations are not quantised: accuracy_level is the runtime's leave, not the model's.
    """
    packed = _packed(low)
    source = low.need(1, "B")
    name = (source.name or "").removesuffix("_Q4").removesuffix("_quant")
    weight = low.build.initialiser(
        ir.LazyTensor(packed, packed.dtype, ir.Shape([packed.inputs, packed.outputs])),
        low.build.unique(name or "weight"),
        provenance.weight(source).removesuffix("_Q4") or name,
    )
    low.done(low.add(low.build.op("MatMul", [low.need(0, "A"), weight]), low.input(5)))


def _packed(low: Lowering) -> PackedWeight:
    inputs, outputs = low.positive("K"), low.positive("N")
    bits, block = low.integer("bits", 4), low.positive("block_size")
    if bits not in BITS or block < 16 or block & (block - 1):
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
    if zeros is not None and not (zeros.dtype == codes.dtype or zeros.dtype.is_floating_point()):
        raise low.refuse("zero points must be uint8 or floating-point")
    return PackedWeight(
        codes, scales, zeros, inputs=inputs, outputs=outputs, bits=bits, block=block,
        groups=_groups(low, inputs, blocks),
    )  # fmt: skip


def _groups(low: Lowering, inputs: int, blocks: int) -> np.ndarray | None:
    if low.input(4) is None:
        return None
    if low.input(3) is not None:  # ONNX Runtime 1.31 reads the codes as if there were none
        raise low.refuse("g_idx together with zero points, which ONNX Runtime passes over")
    groups = low.array(low.input(4), "g_idx").reshape(-1).astype(np.int64)[:inputs]
    if len(groups) != inputs or groups.min() < 0 or groups.max() >= blocks:
        raise low.refuse("g_idx does not name a block for every input")
    return groups


def mat_mul_bnb4(low: Lowering) -> None:
    """MatMul with the weight that NF4 or FP4 codes stand for."""
    inputs, outputs, block = (low.positive(n) for n in ("K", "N", "block_size"))
    if low.integer("training_mode") or not low.integer("transB", 1):
        raise low.refuse("transB = 0 is for training")
    kind = low.integer("quant_type")
    codes, peaks = low.tensor(low.input(1), "B"), low.tensor(low.input(2), "absmax")
    count = inputs * outputs
    if codes.dtype != ir.DataType.UINT8 or not peaks.dtype.is_floating_point():
        raise low.refuse("codes must be uint8 and factors floating-point")
    if kind not in (0, 1) or codes.size != -(-count // 2) or peaks.size != -(-count // block):
        raise low.refuse("codes or factors do not have the declared size or type")
    source = low.need(1, "B")
    read = TableWeight(codes, peaks, inputs, outputs, block, kind == 1)
    name = (source.name or "").removesuffix("_Bnb4")
    weight = low.lazy(source, read, peaks.dtype, (inputs, outputs), name)
    low.done(low.build.op("MatMul", [low.need(0, "A"), weight]))


def _zeros_fit(
    codes: ir.TensorProtocol, zeros: ir.TensorProtocol, wanted: list[int], bits: int
) -> bool:
    """Whether the zero points are of the type of the codes and as many as blocks, packed alike."""
    if codes.dtype == ir.DataType.UINT8:
        wanted = [*wanted[:-1], -(-wanted[-1] * bits // 8)]
    return zeros.dtype == codes.dtype and [int(n) for n in zeros.shape.numpy()] == wanted


def gather_block_quantised(low: Lowering) -> None:
    """Gather from the dequantised table, which stays packed until somebody reads it."""
    codes, scales = low.tensor(low.input(0), "data"), low.tensor(low.input(2), "scales")
    zeros = low.tensor(low.input(3), "zero_points") if low.input(3) is not None else None
    bits, block = low.integer("bits", 4), low.integer("block_size", 128)
    kinds = (ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4)
    if codes.dtype not in kinds or bits not in BITS or block < 16:
        raise low.refuse(f"{codes.dtype} codes of {bits} bits in blocks of {block}")
    shape = [int(n) for n in codes.shape.numpy()]
    if codes.dtype == ir.DataType.UINT8:
        shape[-1] *= 8 // bits
    axis = low.integer("quantize_axis", 1)
    if not -len(shape) <= axis < len(shape):
        raise low.refuse(f"quantize_axis = {axis} of a table of {len(shape)} axes")
    axis %= len(shape)
    wanted = [-(-n // block) if i == axis else n for i, n in enumerate(shape)]
    if [int(n) for n in scales.shape.numpy()] != wanted:
        raise low.refuse("the scales do not have one number for each block")
    if zeros is not None and not _zeros_fit(codes, zeros, wanted, bits):
        raise low.refuse("the zero points do not have one number for each block")
    source = low.need(0, "data")
    read = PackedTable(codes, scales, zeros, tuple(shape), axis, bits, block)
    table = low.lazy(source, read, scales.dtype, shape, f"{source.name}_real")
    attributes = {"axis": low.integer("gather_axis", 0)}
    low.done(low.build.op("Gather", [table, low.need(1, "indices")], attributes))
