"""Lowers integer arithmetic to real arithmetic on the same numbers, standard and com.microsoft.

Codes that activations are rounded to stay rounded: ``Clip(Round(x / s) + z)`` is what ONNX Runtime
computes, so the result equals its own but for float32 sums of products. Integer weights become
``DequantizeLinear`` of constants, which folding makes lazy matrices.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from pfmc.ingest.dialects_heads import self_attention
from pfmc.ingest.dialects_norms import embed
from pfmc.ingest.lowering import Lowering, last_dim, rank
from pfmc.ir import provenance

_RANGES = {
    ir.DataType.UINT8: (0, 255), ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT16: (0, 65535), ir.DataType.INT16: (-32768, 32767),
}  # fmt: skip
_LONG = (ir.DataType.UINT16, ir.DataType.INT16, ir.DataType.INT32)
_FLOAT = {"to": int(ir.DataType.FLOAT)}


def _constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and not value.is_graph_input()


def _float(low: Lowering, value: ir.Value, like: ir.Value) -> ir.Value:
    kind = like.dtype if like.dtype is not None else ir.DataType.FLOAT
    return low.build.op("Cast", [value], {"to": int(kind)})


def _check_halves(low: Lowering, kind: ir.DataType | None, scale: ir.Value) -> None:
    if kind in _LONG and scale.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        raise low.refuse(f"floats of 16 bits hold no codes of type {kind}", "use a float32 scale")


def _spread(low: Lowering, value: ir.Value, at: ir.Value, axis: int) -> ir.Value:
    """A scale or zero point of one axis in a shape that broadcasts against `at`."""
    size = value.const_value.size if value.const_value is not None else None
    if rank(value) == 0 or size == 1:
        return low.reshape(value, ()) if rank(value) else value
    axes = rank(at)
    if rank(value) != 1 or axes is None:
        raise low.refuse("the rank of the operand or its scale is unknown")
    if not -axes <= axis < axes:
        raise low.refuse(f"scales or zero points along axis {axis} of {axes}")
    return low.reshape(value, [-1 if i == axis % axes else 1 for i in range(axes)])


def real(
    low: Lowering, codes: ir.Value, scale: ir.Value, zero: ir.Value | None, axis: int = 1
) -> ir.Value:
    """``(codes - zero) * scale``; of constants a ``DequantizeLinear``, which folds lazily."""
    if _constant(codes) and _constant(scale) and (zero is None or _constant(zero)):
        return _stored(low, codes, scale, zero, axis)
    _check_halves(low, codes.dtype, scale)
    number = _float(low, codes, scale)
    if zero is not None:
        zero = _spread(low, zero, codes, axis)
        number = low.build.op("Sub", [number, _float(low, zero, scale)])
    return low.build.op("Mul", [number, _spread(low, scale, codes, axis)])


def _stored(
    low: Lowering, codes: ir.Value, scale: ir.Value, zero: ir.Value | None, axis: int
) -> ir.Value:
    """A constant, dequantised; scale and zero point as scalars, or each as wide as the other."""
    parts = [v for v in (scale, zero) if v is not None]
    width = max(low.tensor(v, "scale or zero point").size for v in parts)
    dims = low.tensor(codes, "codes").shape.numpy()
    if width > 1 and not (-len(dims) <= axis < len(dims) and dims[axis] == width):
        raise low.refuse(f"{width} scales or zero points for axis {axis} of {list(dims)}")
    wide = [_as_wide(low, v, width) for v in parts]
    return low.build.op("DequantizeLinear", [codes, *wide], {} if width == 1 else {"axis": axis})


def _as_wide(low: Lowering, value: ir.Value, width: int) -> ir.Value:
    """A constant of one number as a scalar, or repeated `width` times; another as it is."""
    array = low.array(value, "scale or zero point")
    if array.shape == (width,) and width > 1:
        return value
    flat = array.reshape(-1) if array.size == width > 1 else array.reshape(())
    return low.build.constant(np.broadcast_to(flat, () if width == 1 else (width,)).copy())


def rounded(
    low: Lowering, value: ir.Value, scale: ir.Value, zero: ir.Value | None,
    kind: ir.DataType, axis: int = 1,
) -> ir.Value:  # fmt: skip
    """``Clip(Round(value / scale) + zero)`` as `kind`: half to even, as ONNX Runtime rounds."""
    if kind not in _RANGES:
        raise low.refuse(f"codes of type {kind} are not supported")
    _check_halves(low, kind, scale)
    code = low.build.op("Div", [value, _spread(low, scale, value, axis)])
    code = low.build.op("Round", [code])
    if zero is not None:
        code = low.build.op("Add", [code, _float(low, _spread(low, zero, value, axis), scale)])
    bounds = [low.scalar(float(n), scale) for n in _RANGES[kind]]
    return low.build.op("Cast", [low.build.op("Clip", [code, *bounds])], {"to": int(kind)})


def _kind_of(low: Lowering, zero: ir.Value | None) -> ir.DataType:
    if zero is not None and zero.dtype is not None:
        return zero.dtype
    given = low.integer("output_dtype")
    return ir.DataType(given) if given else ir.DataType.UINT8


def dequantise_linear(low: Lowering) -> None:
    """(x - zero point) * scale; of constants the standard operator, which folds."""
    if low.node.domain == "" and (_constant(low.input(0)) or low.integer("block_size")):
        return
    codes, scale = low.need(0, "x"), low.need(1, "x_scale")
    zero, kinds = low.input(2), (*_RANGES, ir.DataType.INT32)
    kind = codes.dtype if codes.dtype is not None or zero is None else zero.dtype
    if low.node.domain == "" and (kind not in kinds or low.integer("output_dtype")):
        return
    low.done(real(low, codes, scale, zero, low.integer("axis", 1)))


def quantise_linear(low: Lowering) -> None:
    """Clip(Round(x / scale) + zero point)."""
    value, scale, zero = low.need(0, "x"), low.need(1, "y_scale"), low.input(2)
    kind = _kind_of(low, zero)
    standard = low.node.domain == ""
    if standard and (kind not in _RANGES or low.integer("block_size") or low.integer("precision")):
        return
    if standard and (rank(scale) is None or (rank(scale) and rank(value) is None)):
        return
    if value.dtype is not None and value.dtype != scale.dtype:
        value = _float(low, value, scale)
    low.done(rounded(low, value, scale, zero, kind, low.integer("axis", 1)))


def _dynamic(low: Lowering, value: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Codes (as floats), scale and zero point (as a float) of DynamicQuantizeLinear."""
    nothing = low.scalar(0.0, value)
    whole = {"keepdims": 0}
    peak = low.build.op("Max", [low.build.op("ReduceMax", [value], whole), nothing])
    deep = low.build.op("Min", [low.build.op("ReduceMin", [value], whole), nothing])
    span = low.build.op("Sub", [peak, deep])
    step = low.build.op("Div", [span, low.scalar(255.0, value)])
    flat = low.build.op("Equal", [span, nothing])
    scale = low.build.op("Where", [flat, low.scalar(1.0, value), step])
    bounds = [nothing, low.scalar(255.0, value)]
    start = low.build.op("Div", [low.build.op("Neg", [deep]), scale])
    zero = low.build.op("Round", [low.build.op("Clip", [start, *bounds])])
    code = low.build.op("Round", [low.build.op("Div", [value, scale])])
    code = low.build.op("Clip", [low.build.op("Add", [code, zero]), *bounds])
    return code, scale, zero


def dynamic_quantise_linear(low: Lowering) -> None:
    """Scale and zero point from the least and the largest number, then Clip(Round(x / scale))."""
    code, scale, zero = _dynamic(low, low.need(0, "x"))
    byte = {"to": int(ir.DataType.UINT8)}
    low.done(low.build.op("Cast", [code], byte), scale, low.build.op("Cast", [zero], byte))


def mat_mul_integer(low: Lowering) -> None:
    """MatMul of real numbers: with the scales behind it if they are found, else of the codes."""
    product = _Scaled.find(low)
    if product is not None:
        product.write(low)
        return
    left = _offset(low, low.need(0, "A"), low.input(2), left=True)
    right = _offset(low, low.need(1, "B"), low.input(3), left=False)
    whole = {"to": int(ir.DataType.INT32)}
    low.done(low.build.op("Cast", [low.build.op("MatMul", [left, right])], whole))


def _offset(low: Lowering, codes: ir.Value, zero: ir.Value | None, *, left: bool) -> ir.Value:
    """``codes - zero`` as float32; a zero point of several numbers belongs to rows or columns."""
    if not left and _constant(codes) and (zero is None or _constant(zero)):
        count = 1 if zero is None or zero.const_value is None else zero.const_value.size
        ones = low.build.constant(np.ones(() if count == 1 else count, np.float32))
        return _stored(low, codes, ones, zero, -1)
    number = low.build.op("Cast", [codes], _FLOAT)
    if zero is None:
        return number
    zero = low.build.op("Cast", [zero], _FLOAT)
    if left and rank(zero) == 1 and (zero.shape is None or zero.shape[0] != 1):
        zero = low.build.op("Unsqueeze", [zero, low.ints(1)])
    return low.build.op("Sub", [number, zero])


class _Scaled:
    """``Mul(Cast(MatMulInteger(A, B)), Mul(a_scale, b_scale))`` as quantise_dynamic writes it."""

    def __init__(self, end: ir.Node, left: ir.Value, right: ir.Value) -> None:
        self.end, self.left, self.right = end, left, right

    @classmethod
    def find(cls, low: Lowering) -> _Scaled | None:
        """The chain behind the node, if its weight and the weight's scale are constants."""
        codes, weight = low.need(0, "A"), low.need(1, "B")
        maker = codes.producer()
        cast = _only_reader(low.node.outputs[0], "Cast")
        end = _only_reader(cast.outputs[0], "Mul") if cast is not None else None
        if end is None or cast is None or not _constant(weight) or rank(weight) != 2:
            return None
        if cast.attributes.get_int("to", 0) != ir.DataType.FLOAT or maker is None:
            return None
        other = next((v for v in end.inputs if v is not cast.outputs[0]), None)
        scales = other.producer() if other is not None else None
        if scales is None or scales.op_type != "Mul":
            return None
        right = [v for v in scales.inputs if v is not None and _constant(v)]
        left = [v for v in scales.inputs if v is not None and not _constant(v)]
        if len(left) != 1 or len(right) != 1 or _is_vector(left[0]):
            return None
        if rank(right[0]) not in (0, 1) or _is_vector(low.input(2)):
            return None
        return cls(end, left[0], right[0])

    def write(self, low: Lowering) -> None:
        """``MatMul((A - zero) * a_scale, DequantizeLinear(B))`` in place of the chain."""
        codes = real(low, low.need(0, "A"), self.left, low.input(2))
        weight = _stored(low, low.need(1, "B"), self.right, low.input(3), 1)
        low.build.at(self.end)
        product = low.build.op("MatMul", [codes, weight])
        maker = product.producer()
        assert maker is not None
        provenance.union_sources(maker, [low.node])
        low.build.replace(self.end, [product])


def _is_vector(value: ir.Value | None) -> bool:
    return value is not None and bool(rank(value)) and last_dim(value) != 1


def _only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    uses = tuple(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.op_type != op_type:
        return None
    return uses[0].node


def _of_both(
    low: Lowering, at: int = 0, axes: tuple[int, int] = (1, 1)
) -> tuple[ir.Value, ir.Value]:
    """The real numbers of two operands (codes, scale, zero point; twice) from input `at` on."""
    left = real(low, low.need(at, "A"), low.need(at + 1, "A_scale"), low.input(at + 2), axes[0])
    right = real(
        low, low.need(at + 3, "B"), low.need(at + 4, "B_scale"), low.input(at + 5), axes[1]
    )
    return left, right


def _finish(low: Lowering, value: ir.Value, at: int, like: int = 0) -> None:
    """Rounds the result with the scale and zero point from input `at` on."""
    zero = low.input(at + 1)
    kind = zero.dtype if zero is not None else low.need(like, "A").dtype
    low.done(rounded(low, value, low.need(at, "scale"), zero, kind or ir.DataType.UINT8))


def linear_mat_mul(low: Lowering) -> None:
    """MatMul of the real numbers, then rounded to codes."""
    left, right = _of_both(low, axes=(-2, -1))
    _finish(low, low.build.op("MatMul", [left, right]), 6)


def two_operands(op_type: str) -> Callable[[Lowering], None]:
    """`op_type` of two dequantised operands, rounded to codes."""

    def lower_two(low: Lowering) -> None:
        _finish(low, low.build.op(op_type, list(_of_both(low))), 6)

    lower_two.__doc__ = f"{op_type} of the real numbers, then rounded to codes."
    return lower_two


def one_operand(op_type: str) -> Callable[[Lowering], None]:
    """`op_type` of a dequantised operand, rounded to codes."""

    def lower_one(low: Lowering) -> None:
        value = real(low, low.need(0, "X"), low.need(1, "X_scale"), low.input(2))
        attributes = {"alpha": low.number("alpha", 0.01)} if op_type == "LeakyRelu" else {}
        if op_type == "Softmax":
            attributes = _softmax_axis(low, rank(low.need(0, "X")))
        _finish(low, low.build.op(op_type, [value], attributes), 3)

    lower_one.__doc__ = f"{op_type} of the real numbers, then rounded to codes."
    return lower_one


def _softmax_axis(low: Lowering, axes: int | None) -> dict[str, float]:
    axis, old = low.integer("axis", -1), low.integer("opset", 13) < 13
    if old and axis != -1 and (axes is None or axis % axes != axes - 1):
        raise low.refuse("a softmax over several axes (opset below 13) is not supported")
    return {"axis": -1 if old else axis}


def linear_concat(low: Lowering) -> None:
    """Concat of the real numbers, then rounded to codes."""
    count, rest = divmod(len(low.node.inputs) - 2, 3)
    if count < 1 or rest:
        raise low.refuse(f"{len(low.node.inputs)} inputs are no whole triples")
    parts = []
    for i in range(count):
        codes, scale, zero = (low.need(2 + 3 * i + j, "input") for j in range(3))
        parts.append(real(low, codes, scale, zero))
    _finish(low, low.build.op("Concat", parts, {"axis": low.integer("axis")}), 0, like=2)


def linear_where(low: Lowering) -> None:
    """Where of the real numbers, then rounded to codes."""
    left, right = _of_both(low, 1)
    _finish(low, low.build.op("Where", [low.need(0, "condition"), left, right]), 7, like=1)


def linear_gemm(low: Lowering) -> None:
    """Gemm of the real numbers plus C in units of both scales; rounded to codes if asked."""
    scale, factor = low.need(1, "a_scale"), low.need(4, "b_scale")
    left = real(low, low.need(0, "A"), scale, low.input(2))
    columns = 0 if low.integer("transB") else 1
    right = real(low, low.need(3, "B"), factor, low.input(5), columns)
    alpha = low.number("alpha", 1.0)
    sides = {"transA": low.integer("transA"), "transB": low.integer("transB")}
    product = low.build.op("Gemm", [left, right], {**sides, "alpha": alpha})
    if (added := low.input(6)) is not None:
        unit = low.build.op("Mul", [low.build.op("Mul", [scale, factor]), low.scalar(alpha, scale)])
        term = low.build.op("Mul", [low.build.op("Cast", [added], _FLOAT), unit])
        product = low.build.op("Add", [product, term])
    if low.input(7) is None:
        low.done(product)
    else:
        _finish(low, product, 7)


def integer_to_float(low: Lowering) -> None:
    """MatMul of the real numbers, plus the bias."""
    left = real(low, low.need(0, "A"), low.need(2, "a_scale"), low.input(4), -1)
    right = real(low, low.need(1, "B"), low.need(3, "b_scale"), low.input(5), -1)
    low.done(low.add(low.build.op("MatMul", [left, right]), low.input(6)))


def dynamic_quantise_mat_mul(low: Lowering) -> None:
    """MatMul of A, rounded to 8 bits as DynamicQuantizeLinear does, with the real B; plus bias."""
    code, scale, zero = _dynamic(low, low.need(0, "A"))
    left = low.build.op("Mul", [low.build.op("Sub", [code, zero]), scale])
    right = real(low, low.need(1, "B"), low.need(2, "b_scale"), low.input(3), -1)
    low.done(low.add(low.build.op("MatMul", [left, right]), low.input(4)))


def mat_mul_integer_16(low: Lowering) -> None:
    """MatMul of the codes as real numbers."""
    parts = [_offset(low, low.need(i, n), None, left=True) for i, n in enumerate("AB")]
    whole = {"to": int(ir.DataType.INT32)}
    low.done(low.build.op("Cast", [low.build.op("MatMul", parts)], whole))


def quantised_attention(low: Lowering) -> None:
    """MatMul of the real joint projection, then Attention of heads."""
    low.zero("do_rotary", "past_present_share_buffer")
    source = real(low, low.need(0, "input"), low.need(3, "input_scale"), low.input(6))
    weights = real(low, low.need(1, "weight"), low.need(4, "weight_scale"), low.input(7))
    joint = low.add(low.build.op("MatMul", [source, weights]), low.input(2))
    self_attention(low, joint, mask=5, past=8)


def quantised_embed(low: Lowering) -> None:
    """As EmbedLayerNormalization, its tables, gamma and beta dequantised."""
    names = ("word", "position", "segment", "gamma", "beta")
    parts: list[ir.Value | None] = []
    for i, name in enumerate(names):
        if low.input(2 + i) is None:
            parts.append(None)
            continue
        codes, scale = low.need(2 + i, name), low.need(8 + i, f"{name}_scale")
        parts.append(real(low, codes, scale, low.input(13 + i)))
    gamma, beta = parts[3], parts[4]
    if gamma is None:
        raise low.refuse("the input 'gamma' is missing")
    embed(low, parts[:3], gamma, beta, mask=7)
