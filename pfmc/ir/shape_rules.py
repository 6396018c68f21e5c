"""How each operator makes shapes of shapes, and short integer vectors of such vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from math import prod
from typing import TYPE_CHECKING, TypeAlias

import onnx_ir as ir

from pfmc.ir import matcher
from pfmc.ir.lengths import (
    Dim,
    Dims,
    Poly,
    add,
    broadcast,
    divide,
    multiply,
    product,
    same,
    symbol,
)

if TYPE_CHECKING:
    from pfmc.ir.shapes import Shapes

Found: TypeAlias = Sequence[Dims | None] | None
Content: TypeAlias = "Callable[[Shapes, ir.Node], Dims | None]"
Rule: TypeAlias = "Callable[[Shapes, ir.Node], Found]"


def _like(position: int) -> Rule:
    def rule(shapes: Shapes, node: ir.Node) -> Found:
        shape = shapes.shape(node.inputs[position])
        return None if shape is None else [shape]

    return rule


def _elementwise(shapes: Shapes, node: ir.Node) -> Found:
    known = [shapes.shape(v) for v in node.inputs if v is not None]
    ready = [s for s in known if s is not None]
    if len(ready) != len(known) or not ready:
        return None
    return [broadcast(ready)]


def _shape(shapes: Shapes, node: ir.Node) -> Found:
    content = _shape_content(shapes, node)
    return None if content is None else [(len(content),)]


def _shape_content(shapes: Shapes, node: ir.Node) -> Dims | None:
    dims = shapes.shape(node.inputs[0])
    if dims is None:
        return None
    end = matcher.attribute(node, "end")
    return dims[matcher.attribute(node, "start", 0) : len(dims) if end is None else end]


def _matmul(shapes: Shapes, node: ir.Node) -> Found:
    a, b = shapes.shape(node.inputs[0]), shapes.shape(node.inputs[1])
    if a is None or b is None or len(a) < 2 or len(b) < 2:
        return None
    lead = broadcast([a[:-2], b[:-2]]) if len(a) > 2 or len(b) > 2 else ()
    return None if lead is None else [(*lead, a[-2], b[-1])]


def _gemm(shapes: Shapes, node: ir.Node) -> Found:
    a, b = shapes.shape(node.inputs[0]), shapes.shape(node.inputs[1])
    if a is None or b is None:
        return None
    rows = a[1] if matcher.attribute(node, "transA", 0) else a[0]
    return [(rows, b[0] if matcher.attribute(node, "transB", 0) else b[1])]


def _transpose(shapes: Shapes, node: ir.Node) -> Found:
    dims = shapes.shape(node.inputs[0])
    if dims is None:
        return None
    perm = matcher.attribute(node, "perm") or tuple(reversed(range(len(dims))))
    return [tuple(dims[p] for p in perm)]


def _reshape(shapes: Shapes, node: ir.Node) -> Found:
    target = shapes.content(node.inputs[1])
    dims = shapes.shape(node.inputs[0])
    if target is None:
        return None
    keep = not matcher.attribute(node, "allowzero", 0)
    if dims is None:
        return None if any(d in (-1, 0) for d in target) else [target]
    found = [dims[i] if d == 0 and keep and i < len(dims) else d for i, d in enumerate(target)]
    if -1 in found:
        given = tuple(d for d in found if d != -1)
        few = _are_few(dims) and _are_few(given)
        rest = divide(product(dims), product(given)) if few and 0 not in given else None
        name = f"{node.outputs[0].name}[{found.index(-1)}]"
        found[found.index(-1)] = symbol(name) if rest is None else rest
    return [tuple(found)]


_MOST_TERMS = 256


def _are_few(dims: Dims) -> bool:
    """Whether the product of `dims`, each a sum of terms, can be written out."""
    return prod(len(d.terms) for d in dims if isinstance(d, Poly)) <= _MOST_TERMS


def _expand(shapes: Shapes, node: ir.Node) -> Found:
    dims, target = shapes.shape(node.inputs[0]), shapes.content(node.inputs[1])
    return None if dims is None or target is None else [broadcast([dims, target])]


def _axes(node: ir.Node) -> tuple[int, ...] | None:
    if (given := matcher.attribute(node, "axes")) is not None:
        return tuple(given)
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        return matcher.integers(node.inputs[1])
    return None


def _unsqueeze(shapes: Shapes, node: ir.Node) -> Found:
    dims, axes = shapes.shape(node.inputs[0]), _axes(node)
    if dims is None or axes is None:
        return None
    rank = len(dims) + len(axes)
    places = {a % rank for a in axes}
    if len(places) != len(axes):
        raise ValueError(f"axes {list(axes)} name one twice")
    rest = iter(dims)
    return [tuple(1 if i in places else next(rest) for i in range(rank))]


def _squeeze(shapes: Shapes, node: ir.Node) -> Found:
    dims, axes = shapes.shape(node.inputs[0]), _axes(node)
    if dims is None:
        return None
    if axes is None:
        if any(isinstance(d, Poly) for d in dims):
            return None
        return [tuple(d for d in dims if d != 1)]
    if any(not -len(dims) <= a < len(dims) for a in axes):
        raise ValueError(f"axes {list(axes)[:8]} of {len(dims)}")
    places = {a % len(dims) for a in axes}
    return [tuple(d for i, d in enumerate(dims) if i not in places)]


def _concat(shapes: Shapes, node: ir.Node) -> Found:
    known = [shapes.shape(v) for v in node.inputs]
    ready = [s for s in known if s is not None]
    if len(ready) != len(known):
        return None
    axis = matcher.attribute(node, "axis") % len(ready[0])
    total = reduce(add, (s[axis] for s in ready))
    return [(*ready[0][:axis], total, *ready[0][axis + 1 :])]


def _gather(shapes: Shapes, node: ir.Node) -> Found:
    dims, places = shapes.shape(node.inputs[0]), shapes.shape(node.inputs[1])
    if dims is None or places is None:
        return None
    axis = matcher.attribute(node, "axis", 0) % len(dims)
    return [(*dims[:axis], *places, *dims[axis + 1 :])]


def _gather_nd(shapes: Shapes, node: ir.Node) -> Found:
    dims, places = shapes.shape(node.inputs[0]), shapes.shape(node.inputs[1])
    if dims is None or places is None or matcher.attribute(node, "batch_dims", 0):
        return None
    depth = places[-1]
    return [(*places[:-1], *dims[depth:])] if isinstance(depth, int) else None


def _tile(shapes: Shapes, node: ir.Node) -> Found:
    dims, times = shapes.shape(node.inputs[0]), shapes.content(node.inputs[1])
    if dims is None or times is None or len(dims) != len(times):
        return None
    return [tuple(multiply(d, n) for d, n in zip(dims, times, strict=True))]


def _pad(shapes: Shapes, node: ir.Node) -> Found:
    dims, pads = shapes.shape(node.inputs[0]), shapes.content(node.inputs[1])
    axes = matcher.integers(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] else None
    if dims is None or pads is None:
        return None
    places = [a % len(dims) for a in (range(len(dims)) if axes is None else axes)]
    found = list(dims)
    for i, axis in enumerate(places):
        found[axis] = add(found[axis], add(pads[i], pads[i + len(places)]))
    return [tuple(found)]


def _top_k(shapes: Shapes, node: ir.Node) -> Found:
    dims, count = shapes.shape(node.inputs[0]), shapes.content(node.inputs[1])
    if dims is None or count is None:
        return None
    axis = matcher.attribute(node, "axis", -1) % len(dims)
    return [(*dims[:axis], count[0], *dims[axis + 1 :])] * 2


def _flatten(shapes: Shapes, node: ir.Node) -> Found:
    dims, axis = shapes.shape(node.inputs[0]), matcher.attribute(node, "axis", 1)
    if dims is None or not _are_few(dims):
        return None
    return [(product(dims[:axis]), product(dims[axis:]))]


def _gather_content(shapes: Shapes, node: ir.Node) -> Dims | None:
    content, places = shapes.content(node.inputs[0]), matcher.integers(node.inputs[1])
    if (
        content is None
        or places is None
        or any(not -len(content) <= p < len(content) for p in places)
    ):
        return None
    return tuple(content[p] for p in places)


def _slice_parts(node: ir.Node) -> list[tuple[int, int, int, int]] | None:
    """(axis, start, end, step) of a Slice with constant parts."""
    parts = [matcher.integers(v) if v is not None else None for v in node.inputs[1:]]
    if len(parts) < 2 or parts[0] is None or parts[1] is None:
        return None
    count = len(parts[0])
    axes = parts[2] if len(parts) > 2 else tuple(range(count))
    steps = parts[3] if len(parts) > 3 else (1,) * count
    if axes is None or steps is None:
        return None
    return list(zip(axes, parts[0], parts[1], steps, strict=True))


def _slice(shapes: Shapes, node: ir.Node) -> Found:
    dims = shapes.shape(node.inputs[0])
    if dims is None:
        return None
    result = list(dims)
    for axis, start, end in _slice_bounds(shapes, node):
        if axis >= len(dims):
            return None
        result[axis] = _slice_length(dims[axis], start, end) or symbol(
            f"{node.outputs[0].name}[{axis}]"
        )
    return [tuple(result)]


def _slice_bounds(shapes: Shapes, node: ir.Node) -> list[tuple[int, Dim | None, Dim | None]]:
    rank = len(shapes.shape(node.inputs[0]) or ())
    starts, ends = shapes.content(node.inputs[1]), shapes.content(node.inputs[2])
    axes = matcher.integers(node.inputs[3]) if len(node.inputs) > 3 else None
    steps = matcher.integers(node.inputs[4]) if len(node.inputs) > 4 else None
    if axes is None:
        axes = tuple(range(len(starts or ends or ())))
        if len(node.inputs) > 3 or not axes:
            axes = tuple(range(rank))
            starts = ends = None
    stepped = len(node.inputs) > 4 and node.inputs[4] is not None
    plain = not stepped or (steps is not None and all(s == 1 for s in steps))
    return [
        (
            axis % rank if rank else axis,
            starts[i] if starts is not None and plain else None,
            ends[i] if ends is not None and plain else None,
        )
        for i, axis in enumerate(axes)
    ]


_FAR = 1 << 30


def _slice_length(dim: Dim, start: Dim | None, end: Dim | None) -> Dim | None:
    if start is None or end is None:
        return None
    if isinstance(dim, int) and isinstance(start, int) and isinstance(end, int):
        return len(range(dim)[slice(start, end)]) or None
    if isinstance(end, int) and end >= _FAR:
        end = dim
    if multiply(dim, -1) == start and end == dim:
        return dim
    if isinstance(dim, Poly) and (start, end) in ((0, -1), (1, dim)):  # no dimension is 0
        return add(dim, -1)
    if start == 0 and end == dim:
        return dim
    if start == 0 and isinstance(end, Poly) and all(factor > 0 for _, factor in end.terms):
        return end  # a table cut to the sequence; a longer sequence does not run in the source
    return None


def _slice_content(shapes: Shapes, node: ir.Node) -> Dims | None:
    content, parts = shapes.content(node.inputs[0]), _slice_parts(node)
    if content is None or parts is None or len(parts) != 1:
        return None
    _, start, end, step = parts[0]
    return content[slice(start, end, step)]


def _split(shapes: Shapes, node: ir.Node) -> Found:
    dims = shapes.shape(node.inputs[0])
    if dims is None:
        return None
    axis = matcher.attribute(node, "axis", 0) % len(dims)
    sizes: Sequence[Dim | None] | None = (
        shapes.content(node.inputs[1]) if len(node.inputs) > 1 else None
    )
    if matcher.attribute(node, "num_outputs", len(node.outputs)) != len(node.outputs):
        raise ValueError(f"{len(node.outputs)} outputs of a split into another number of parts")
    if sizes is None:
        sizes = _even_parts(dims[axis], len(node.outputs))
    return [None if n is None else (*dims[:axis], n, *dims[axis + 1 :]) for n in sizes]


def _even_parts(length: Dim, count: int) -> list[Dim | None]:
    """The lengths of `count` parts; the last is shorter where they cannot be equal."""
    if not isinstance(length, int):
        return [divide(length, count)] * count
    part = -(-length // count)
    return [max(0, min(part, length - i * part)) for i in range(count)]


def _reduce(shapes: Shapes, node: ir.Node) -> Found:
    dims, axes = shapes.shape(node.inputs[0]), _axes(node)
    if dims is None or axes is None:
        return None
    if not axes and not matcher.attribute(node, "noop_with_empty_axes", 0):
        axes = tuple(range(len(dims)))
    places, keep = {a % len(dims) for a in axes}, matcher.attribute(node, "keepdims", 1) == 1
    if keep:
        return [tuple(1 if i in places else d for i, d in enumerate(dims))]
    return [tuple(d for i, d in enumerate(dims) if i not in places)]


def _linear(shapes: Shapes, node: ir.Node) -> Found:
    x, weight = shapes.shape(node.inputs[0]), shapes.shape(node.inputs[1])
    return None if x is None or weight is None else [(*x[:-1], weight[-1])]


def _attention(shapes: Shapes, node: ir.Node) -> Found:
    q, v = shapes.shape(node.inputs[0]), shapes.shape(node.inputs[2])
    return [(*q[:-1], v[-1])] if q is not None and v is not None and len(q) == 4 else None


def _range(shapes: Shapes, node: ir.Node) -> Found:
    start, end, step = (shapes.content(v) for v in node.inputs)
    if start is None or end is None or step != (1,):
        return None
    return [(add(end[0], multiply(start[0], -1)),)]


def _filled(shapes: Shapes, node: ir.Node) -> Found:
    content = shapes.content(node.inputs[0])
    return None if content is None else [content]


def _filled_content(shapes: Shapes, node: ir.Node) -> Dims | None:
    dims = shapes.shape(node.outputs[0])
    value = matcher.attribute(node, "value")
    if dims is None or len(dims) != 1 or not isinstance(dims[0], int) or value is None:
        return None
    if dims[0] > _LONGEST:
        return None
    return (int(value.numpy().reshape(-1)[0]),) * dims[0] if value.dtype.is_integer() else None


_LONGEST = 1024
"""Longer vectors are no shapes: their contents are not followed."""


def _same_content(shapes: Shapes, node: ir.Node) -> Dims | None:
    return shapes.content(node.inputs[0])


def _negative_content(shapes: Shapes, node: ir.Node) -> Dims | None:
    content = shapes.content(node.inputs[0])
    return None if content is None else tuple(multiply(d, -1) for d in content)


def _cast_content(shapes: Shapes, node: ir.Node) -> Dims | None:
    to = ir.DataType(matcher.attribute(node, "to"))
    return shapes.content(node.inputs[0]) if to in (ir.DataType.INT64, ir.DataType.INT32) else None


def _reshape_content(shapes: Shapes, node: ir.Node) -> Dims | None:
    dims = shapes.shape(node.outputs[0])
    content = shapes.content(node.inputs[0])
    fits = dims is not None and content is not None and dims in ((), (len(content),))
    return content if fits else None


def _squeeze_content(shapes: Shapes, node: ir.Node) -> Dims | None:
    dims = shapes.shape(node.outputs[0])
    return shapes.content(node.inputs[0]) if dims is not None and len(dims) <= 1 else None


def _concat_content(shapes: Shapes, node: ir.Node) -> Dims | None:
    parts = [shapes.content(v) for v in node.inputs]
    ready = [p for p in parts if p is not None]
    if len(ready) < len(parts) or sum(map(len, ready)) > _LONGEST:
        return None
    return tuple(d for p in ready for d in p)


def _arithmetic(operation: Callable[[Dim, Dim], Dim | None]) -> Content:
    def content(shapes: Shapes, node: ir.Node) -> Dims | None:
        a, b = shapes.content(node.inputs[0]), shapes.content(node.inputs[1])
        if a is None or b is None or (len(a) != len(b) and 1 not in (len(a), len(b))):
            return None
        length = max(len(a), len(b))
        a, b = a * (length // len(a)), b * (length // len(b))
        found = [operation(x, y) for x, y in zip(a, b, strict=True)]
        return tuple(d for d in found if d is not None) if None not in found else None

    return content


def _subtract(a: Dim, b: Dim) -> Dim:
    return add(a, multiply(b, -1))


def _where_content(shapes: Shapes, node: ir.Node) -> Dims | None:
    """``Where(Equal(a, b), c, d)`` of contents: a length is never negative."""
    test = matcher.producer(node.inputs[0], "Equal")
    if test is None:
        return None
    parts = [shapes.content(v) for v in (*test.inputs, *node.inputs[1:])]
    ready = [p for p in parts if p is not None]
    if len(ready) != 4:
        return None
    length = max(len(p) for p in ready)
    if any(len(p) not in (1, length) for p in ready):
        return None
    a, b, c, d = (p * (length // len(p)) for p in ready)
    equal = [same(x, y) for x, y in zip(a, b, strict=True)]
    if None in equal:
        return None
    return tuple(x if s else y for s, x, y in zip(equal, c, d, strict=True))


def _rules() -> dict[str, Rule]:
    alike = (
        "Cast CastLike Identity Sqrt Reciprocal Neg Tanh Sigmoid Erf Exp Log Abs Not Softmax Cos "
        "Sin Relu Gelu Swish IsNaN IsInf Dropout LayerNormalization RMSNormalization Rotary Clip "
        "Round Floor Ceil LogSoftmax Quantise QuantiseToken CumSum Trilu Softplus HardSwish "
        "ScatterElements ScatterND Sign Elu Selu LeakyRelu Mish HardSigmoid BitwiseNot EyeLike"
    )
    both = (
        "Add Sub Mul Div Pow Max Min And Or Xor Equal Greater GreaterOrEqual Less LessOrEqual "
        "Where SwiGLU Mod PRelu BitwiseAnd BitwiseOr BitwiseXor"
    )
    return {
        **dict.fromkeys(alike.split(), _like(0)),
        **dict.fromkeys(both.split(), _elementwise),
        **dict.fromkeys(["ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2"], _reduce),
        "SidePath": _like(1),
        "Trim": _like(0),
        "GatherElements": _like(1),
        "Pad": _pad,
        "Tile": _tile,
        "TopK": _top_k,
        "Shape": _shape,
        "MatMul": _matmul,
        "Gemm": _gemm,
        "Transpose": _transpose,
        "Reshape": _reshape,
        "Expand": _expand,
        "Unsqueeze": _unsqueeze,
        "Squeeze": _squeeze,
        "Concat": _concat,
        "Flatten": _flatten,
        "Gather": _gather,
        "GatherND": _gather_nd,
        "Slice": _slice,
        "Split": _split,
        "FixedLinear": _linear,
        "QuantisedLinear": _linear,
        "Attention": _attention,
        "Range": _range,
        "ConstantOfShape": _filled,
    }


RULES = _rules()
"""Operator -> the rule that gives the shapes of its outputs."""
CONTENTS: dict[str, Content] = {
    "Shape": _shape_content,
    "Gather": _gather_content,
    "Slice": _slice_content,
    "Unsqueeze": _squeeze_content,
    "Squeeze": _squeeze_content,
    "Reshape": _reshape_content,
    "Identity": _same_content,
    "Cast": _cast_content,
    "Concat": _concat_content,
    "Add": _arithmetic(add),
    "Sub": _arithmetic(_subtract),
    "Mul": _arithmetic(multiply),
    "Div": _arithmetic(divide),
    "Neg": _negative_content,
    "Where": _where_content,
    "ConstantOfShape": _filled_content,
}
"""Operator -> the rule that gives the integers of its first output."""
