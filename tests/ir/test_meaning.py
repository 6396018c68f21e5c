"""Every operator's meaning, on numpy and on torch, against ONNX Runtime on random shapes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from pfmc.distill.tensors import TORCH
from pfmc.errors import InputError, InternalError
from pfmc.ir import meaning, vocabulary

examples = settings(max_examples=20, deadline=None, derandomize=True)

F, I, B = np.float32, np.int64, np.bool_  # noqa: E741


def one_node(
    op_type: str, inputs: Sequence[np.ndarray | None], outputs: int, attributes: dict[str, Any]
) -> ir.Model:
    """A model of one node whose inputs i0, i1, … are graph inputs."""
    names = ["" if x is None else f"i{n}" for n, x in enumerate(inputs)]
    domain = vocabulary.DOMAIN if op_type in vocabulary.OPERATORS else ""
    node = helper.make_node(
        op_type, names, [f"o{n}" for n in range(outputs)], domain=domain, **attributes
    )
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for n, x in zip(names, inputs, strict=True)
            if x is not None
        ],
        [helper.make_empty_tensor_value_info(f"o{n}") for n in range(outputs)],
    )
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", vocabulary.OPSET)], ir_version=11
    )
    model = ir.from_proto(proto)
    vocabulary.install(model)
    return model


def oracle(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What ONNX Runtime computes."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    content = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(content, options).run(None, feeds)


def check(
    op_type: str,
    *inputs: np.ndarray | None,
    outputs: int = 1,
    want: Sequence[np.ndarray] | None = None,
    tolerance: float = 2e-5,
    **attributes: Any,
) -> None:
    """Asserts that numpy and torch compute what ONNX Runtime does, types and shapes included."""
    model = one_node(op_type, inputs, outputs, attributes)
    node = model.graph[0]
    if want is None:
        want = oracle(model, {f"i{n}": x for n, x in enumerate(inputs) if x is not None})
    run = meaning.compile_node(node)
    host = meaning.HOST_INPUTS.get(op_type, frozenset())
    tensors = [x if x is None or n in host else TORCH.asarray(x) for n, x in enumerate(inputs)]
    torched = meaning.make(node, TORCH)(*tensors)
    torched = torched if isinstance(torched, tuple) else (torched,)
    with np.errstate(all="ignore"):
        numbered = run(list(inputs))
    for name, got in (("numpy", numbered), ("torch", torched)):
        assert len(got) == outputs
        for g, w in zip(got, want, strict=True):
            g = np.asarray(g)
            assert g.dtype == w.dtype, name
            assert g.shape == w.shape, name
            np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance, err_msg=name)


def reals(shape: Sequence[int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=tuple(shape)).astype(F)


def whole(shape: Sequence[int], low: int, high: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, tuple(shape)).astype(I)


shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4)
seeds = st.integers(0, 1000)


@st.composite
def broadcastable(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    full = draw(shapes)
    other = [draw(st.sampled_from([1, n])) for n in full]
    return full, other[draw(st.integers(0, len(other) - 1)) :]


@examples
@given(
    pair=broadcastable(),
    op=st.sampled_from(["Add", "Sub", "Mul", "Div", "Min", "Max", "Mod"]),
    kind=st.sampled_from([F, I, np.int32]),
    seed=seeds,
)
def test_arithmetic(pair: tuple[list[int], list[int]], op: str, kind: type, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(-9, 9, s) for s in pair)
    b[b == 0] = 3
    a, b = (x.astype(kind) for x in (a, b))
    check(op, a, b, **({"fmod": int(kind is F)} if op == "Mod" else {}))


def test_integer_division_truncates_and_mod_follows_the_divisor() -> None:
    a, b = np.array([7, -7, 7, -7], I), np.array([2, 2, -2, -2], I)
    check("Div", a, b, want=[np.array([3, -3, -3, 3], I)])
    check("Mod", a, b, want=[np.array([1, 1, -1, -1], I)])
    check("Mod", a, b, fmod=1, want=[np.array([1, -1, 1, -1], I)])


@examples
@given(pair=broadcastable(), seed=seeds)
def test_comparison_logic_and_where(pair: tuple[list[int], list[int]], seed: int) -> None:
    a, b = whole(pair[0], 0, 3, seed), whole(pair[1], 0, 3, seed + 1)
    for op in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"):
        check(op, a, b)
    for op in ("And", "Or", "Xor"):
        check(op, a > 1, b > 1)
    check("Not", a > 1)
    check("Where", a > 1, a.astype(F), b.astype(F))


UNARY = [
    "Abs",
    "Ceil",
    "Cos",
    "Elu",
    "Erf",
    "Exp",
    "Floor",
    "HardSigmoid",
    "LeakyRelu",
    "Neg",
    "Reciprocal",
    "Relu",
    "Round",
    "Sigmoid",
    "Sign",
    "Sin",
    "Softplus",
    "Tan",
    "Tanh",
    "Gelu",
    "Swish",
    "Identity",
]


@pytest.mark.parametrize("op", UNARY)
def test_unary(op: str) -> None:
    x = np.concatenate([reals((40,)) * 3, np.array([0.5, 1.5, -0.5, 2.5], F)])
    want = [x / (1 + np.exp(-x))] if op == "Swish" else None
    check(op, x, want=want)


def test_unary_with_settings() -> None:
    x = reals((3, 5))
    check("Gelu", x, approximate="tanh")
    check("Swish", x, alpha=1.702, want=[x / (1 + np.exp(-1.702 * x)).astype(F)])
    check("Sqrt", np.abs(x))
    check("Log", np.abs(x))
    check("Pow", x, np.array(2, F))
    check("Pow", np.abs(x), np.array([0.5, 1, 2, 3, -1], F))
    check("Clip", x, np.array(-0.5, F), np.array(0.5, F))
    check("Clip", x, None, np.array(0.5, F))
    odd = np.array([np.nan, np.inf, -np.inf, 0.0], F)
    check("IsNaN", odd)
    check("IsInf", odd, detect_negative=0)
    check("Sum", x, x, x)
    check("Mean", x, x + 1)
    check("Max", x, x - 1, x * 2)


KINDS = ["FLOAT", "FLOAT16", "DOUBLE", "INT64", "INT32", "INT8", "UINT8", "BOOL"]


@examples
@given(source=st.sampled_from(KINDS), to=st.sampled_from([*KINDS, "BFLOAT16"]))
def test_cast(source: str, to: str) -> None:
    x = np.array([0, 1, 2.75, 3.5, 100], F).astype(ir.DataType[source].numpy())
    if to == "BFLOAT16":
        node = one_node("Cast", [x], 1, {"to": ir.DataType.BFLOAT16.value}).graph[0]
        got = meaning.compile_node(node)([x])[0]
        assert got.dtype == ir.DataType.BFLOAT16.numpy()
        np.testing.assert_array_equal(
            got.astype(F), meaning.make(node, TORCH)(TORCH.asarray(x)).float().numpy()
        )
    else:
        check("Cast", x, to=ir.DataType[to].value)


def test_cast_truncates_towards_zero_and_refuses_narrow_formats() -> None:
    check("Cast", np.array([-1.9, 1.9], F), to=7, want=[np.array([-1, 1], I)])
    node = one_node("Cast", [reals((1,))], 1, {"to": ir.DataType.FLOAT8E4M3FN.value}).graph[0]
    with pytest.raises(InputError, match="FLOAT8E4M3FN"):
        meaning.compile_node(node)


@pytest.mark.parametrize("axes", [[1, 1], [0, -4], [4], [-5]])
@pytest.mark.parametrize("op", ["Unsqueeze", "Squeeze"])
def test_axes_named_twice_or_out_of_range(op: str, axes: list[int]) -> None:
    """Found by the fuzzer: the iterator over the sides ran dry."""
    x = np.ones((1,) * (4 if op == "Squeeze" else 4 - len(axes)), np.float32)
    node = ir.node(op, [ir.Value(name="x"), ir.Value(name="axes")])
    with pytest.raises(InputError, match="at axes"):
        meaning.compile_node(node)([x, np.array(axes, I)])


@examples
@given(shape=shapes, data=st.data())
def test_shaping(shape: list[int], data: st.DataObject) -> None:
    x, rank = reals(shape), len(shape)
    order = data.draw(st.permutations(range(rank)))
    axis = data.draw(st.integers(-rank, rank - 1))
    check("Transpose", x, perm=list(order))
    check("Reshape", x, np.array([0, -1] if rank > 1 else [-1], I))
    check("Flatten", x, axis=axis)
    check("Unsqueeze", x, np.array(sorted({0, axis % rank, rank}), I))
    check("Squeeze", reals([1, *shape, 1]), np.array([0, -1], I))
    check("Expand", x, np.array([2, *shape], I))
    check("Tile", x, np.array([data.draw(st.integers(1, 2)) for _ in shape], I))
    check("Concat", x, x + 1, axis=axis)
    check(
        "Shape", x, start=data.draw(st.integers(-rank, rank)), end=data.draw(st.integers(0, rank))
    )
    check("Size", x)
    check("Pad", x, np.array([1] * rank + [2] * rank, I), np.array(0.5, F))
    check("CumSum", x, np.array(axis, I), exclusive=rank % 2, reverse=shape[0] % 2)


bounds = st.integers(-7, 7)
steps = st.sampled_from([1, 2, 3, -1, -2])


@examples
@given(n=st.integers(1, 5), start=bounds, end=bounds, step=steps, axis=st.integers(-2, 1))
def test_slice(n: int, start: int, end: int, step: int, axis: int) -> None:
    x = reals((n, n + 1))
    check("Slice", x, *(np.array([v], I) for v in (start, end, axis, step)))


def test_slice_to_the_far_end() -> None:
    x, far = np.arange(5, dtype=F), np.iinfo(I).max
    check("Slice", x, *(np.array([v], I) for v in (1, far, 0, 2)), want=[x[1::2]])
    check("Slice", x, *(np.array([v], I) for v in (-1, -far, 0, -1)), want=[x[::-1]])


@examples
@given(n=st.integers(2, 9), parts=st.integers(1, 4))
def test_split(n: int, parts: int) -> None:
    x = reals((2, n))
    check("Split", x, np.array([1, n - 1], I), axis=1, outputs=2)
    if (parts - 1) * -(-n // parts) < n:
        check("Split", x, axis=-1, num_outputs=parts, outputs=parts)


@examples
@given(shape=st.lists(st.integers(1, 4), min_size=2, max_size=3), k=st.integers(-3, 3), seed=seeds)
def test_triangle_and_range(shape: list[int], k: int, seed: int) -> None:
    check("Trilu", reals(shape, seed), np.array(k, I), upper=seed % 2)
    check("Range", np.array(k, I), np.array(7, I), np.array(2, I))
    check("Range", np.array(k, F), np.array(1.5, F), np.array(0.5, F))
    check("ConstantOfShape", np.array(shape, I), value=helper.make_tensor("v", 7, [1], [5]))


@examples
@given(shape=shapes, data=st.data(), seed=seeds)
def test_selecting(shape: list[int], data: st.DataObject, seed: int) -> None:
    x, rank = reals(shape, seed), len(shape)
    axis = data.draw(st.integers(-rank, rank - 1))
    n = shape[axis]
    check("Gather", x, whole((2, 3), -n, n, seed), axis=axis)
    check("Gather", x, np.array(n - 1, I), axis=axis)
    check("GatherElements", x, whole(shape, -n, n, seed), axis=axis)
    depth = data.draw(st.integers(1, rank))
    columns = [whole((2, 2, 1), 0, shape[d], seed + d) for d in range(depth)]
    places = np.concatenate(columns, -1)
    check("GatherND", x, places)
    check("ScatterND", x, places[:1, :1], reals((1, 1, *shape[depth:]), seed))
    check("ArgMax", x, axis=axis, keepdims=seed % 2)
    check("TopK", x, np.array([1], I), axis=axis, largest=seed % 2, outputs=2)
    check("ScatterElements", x, np.zeros([1] * rank, I), np.full([1] * rank, 9, F), axis=axis)


def test_selecting_by_batch_and_one_hot() -> None:
    check("GatherND", reals((2, 3, 4)), whole((2, 5, 1), 0, 3), batch_dims=1)
    check("OneHot", np.array([1, -1, 0], I), np.array(3, I), np.array([0, 1], F))
    check("NonZero", np.array([[1, 0], [3, 4]], F))
    check("ScatterElements", np.zeros(3, F), np.array([1, 1], I), np.ones(2, F), reduction="add")


REDUCTIONS = ["L1", "L2", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"]


@examples
@given(op=st.sampled_from(REDUCTIONS), shape=shapes, keep=st.integers(0, 1), data=st.data())
def test_reductions(op: str, shape: list[int], keep: int, data: st.DataObject) -> None:
    axes = data.draw(st.lists(st.integers(0, len(shape) - 1), unique=True, min_size=1))
    check(f"Reduce{op}", reals(shape), np.array(axes, I), keepdims=keep)
    check(f"Reduce{op}", reals(shape), keepdims=keep)


@examples
@given(shape=shapes, data=st.data(), seed=seeds)
def test_normalisations(shape: list[int], data: st.DataObject, seed: int) -> None:
    x, rank = reals([*shape, 8], seed), len(shape) + 1
    axis = data.draw(st.integers(-rank, -1))
    scale, bias = reals(x.shape[axis:], seed + 1), reals(x.shape[axis:], seed + 2)
    check("LayerNormalization", x, scale, bias, axis=axis, epsilon=1e-5)
    check("RMSNormalization", x, scale, axis=axis, epsilon=1e-6)
    check("Softmax", x, axis=axis)
    check("LogSoftmax", x, axis=axis)


def test_normalisation_details() -> None:
    x, scale, bias = reals((2, 3, 8)), reals((8,), 1), reals((8,), 2)
    check("LayerNormalization", x, scale, bias, outputs=3)
    check("LayerNormalization", x, scale)
    check("InstanceNormalization", x, scale[:3], bias[:3])
    check("BatchNormalization", x, scale[:3], bias[:3], bias[3:6], np.abs(scale[3:6]))
    check("GlobalAveragePool", x)


@examples
@given(
    lead=st.lists(st.integers(1, 3), max_size=2),
    sizes=st.tuples(*[st.integers(1, 6)] * 3),
    flags=st.tuples(st.booleans(), st.booleans()),
)
def test_products(lead: list[int], sizes: tuple[int, int, int], flags: tuple[bool, bool]) -> None:
    m, k, n = sizes
    check("MatMul", reals((*lead, m, k)), reals((*lead[-1:], k, n), 1))
    check("MatMul", reals((k,)), reals((*lead, k, n), 1))
    a, b = reals((k, m) if flags[0] else (m, k)), reals((n, k) if flags[1] else (k, n), 1)
    check("Gemm", a, b, reals((n,), 2), transA=int(flags[0]), transB=int(flags[1]))
    check(
        "Gemm",
        a,
        b,
        reals((m, 1), 2),
        transA=int(flags[0]),
        transB=int(flags[1]),
        alpha=0.5,
        beta=2.0,
    )
    check("Einsum", reals((*sizes,)), reals((n, k), 1), equation="mkn, nk -> mk")


@examples
@given(
    rank=st.integers(1, 2),
    group=st.sampled_from([1, 2]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    pads=st.integers(0, 2),
)
def test_convolution(rank: int, group: int, stride: int, dilation: int, pads: int) -> None:
    check(
        "Conv",
        reals((2, 4, *[9] * rank)),
        reals((6, 4 // group, *[3] * rank), 1),
        reals((6,), 2),
        group=group,
        strides=[stride] * rank,
        dilations=[dilation] * rank,
        pads=[pads] * rank + [1] * rank,
    )


def test_convolution_with_automatic_padding() -> None:
    for auto in ("SAME_UPPER", "SAME_LOWER", "VALID"):
        check("Conv", reals((1, 2, 6)), reals((2, 2, 4), 1), strides=[2], auto_pad=auto)


# -- attention --------------------------------------------------------------------------------


@settings(examples, max_examples=60)
@given(
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1)]),
    rows=st.integers(1, 4),
    past=st.integers(0, 3),
    causal=st.booleans(),
    mask=st.sampled_from(["none", "bool", "float", "rows"]),
    scale=st.sampled_from([None, 0.3]),
    softcap=st.sampled_from([0.0, 2.0]),
    flat=st.booleans(),
    seed=seeds,
)
def test_attention(
    heads: tuple[int, int],
    rows: int,
    past: int,
    causal: bool,
    mask: str,
    scale: float | None,
    softcap: float,
    flat: bool,
    seed: int,
) -> None:
    (hq, hkv), width, batch = heads, 4, 2
    q, k, v = (reals((batch, h, rows, width), seed + i) for i, h in enumerate((hq, hkv, hkv)))
    attributes: dict[str, Any] = {"is_causal": int(causal), "softcap": softcap}
    if scale is not None:
        attributes["scale"] = scale
    if flat:
        q, k, v = (x.transpose(0, 2, 1, 3).reshape(batch, rows, -1) for x in (q, k, v))
        attributes |= {"q_num_heads": hq, "kv_num_heads": hkv}
    rng = np.random.default_rng(seed)
    bias = {
        "none": None,
        "bool": rng.random((rows, past + rows)) < 0.7,
        "float": rng.normal(size=(batch, 1, rows, past + rows)).astype(F),
        "rows": rng.random((batch, hq, rows, past + rows)) < 0.7,
    }[mask]
    if bias is not None and bias.dtype == B:
        bias[..., 0] = True  # ONNX Runtime and the reference differ on rows that see nothing
    memory = [reals((batch, hkv, past, width), seed + i) for i in (7, 8)] if past else []
    inputs = [q, k, v, bias, *memory] if memory or bias is not None else [q, k, v]
    check("Attention", *inputs, outputs=3 if past else 1, tolerance=1e-4, **attributes)


def test_attention_of_a_query_that_sees_nothing_is_zero() -> None:
    q, k, v = (reals((1, 1, 2, 4), i) for i in range(3))
    mask = np.array([[False, False], [True, True]])
    for extra in ({}, {"softcap": 1.0}):
        node = one_node("Attention", [q, k, v, mask], 1, extra).graph[0]
        (got,) = meaning.compile_node(node)([q, k, v, mask])
        torched = meaning.make(node, TORCH)(*(TORCH.asarray(x) for x in (q, k, v, mask)))
        torched = torched[0] if isinstance(torched, tuple) else torched
        assert np.all(got[0, 0, 0] == 0)
        np.testing.assert_allclose(torched.numpy(), got, atol=1e-6)


def test_attention_in_three_dimensions_needs_head_counts() -> None:
    x = reals((1, 2, 4))
    with pytest.raises(InputError, match="head counts"):
        meaning.compile_node(one_node("Attention", [x, x, x], 1, {}).graph[0])([x, x, x])


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("flat", [False, True])
def test_rotary_embedding(interleaved: int, flat: bool) -> None:
    x = reals((2, 3, 5, 8))
    cos, sin = reals((9, 4), 1), reals((9, 4), 2)
    positions = whole((2, 5), 0, 9)
    attributes: dict[str, Any] = {"interleaved": interleaved}
    if flat:
        x, attributes["num_heads"] = x.transpose(0, 2, 1, 3).reshape(2, 5, 24).copy(), 3
    check("RotaryEmbedding", x, cos, sin, positions, **attributes)
    check("RotaryEmbedding", x, cos[positions], sin[positions], **attributes)


# -- number formats and our own operators -----------------------------------------------------


@examples
@given(block=st.sampled_from([0, 2, 4]), seed=seeds)
def test_number_formats(block: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(-8, 8, (8, 3)).astype(np.int8)
    scale = rng.uniform(0.1, 1, (8 // block, 3) if block else (3,)).astype(F)
    attributes = {"axis": 0, "block_size": block} if block else {"axis": 1}
    check("DequantizeLinear", codes, scale, **attributes)
    check("DequantizeLinear", codes, scale, np.ones(scale.shape, np.int8), **attributes)
    check(
        "QuantizeLinear", reals((8, 3), seed), scale, np.zeros(scale.shape, np.int8), **attributes
    )
    check("QuantizeLinear", reals((8, 3), seed), np.array(0.1, F), np.array(128, np.uint8))


@examples
@given(shape=shapes, top=st.sampled_from([1.0, 7.0, 127.0]), seed=seeds)
def test_quantise(shape: list[int], top: float, seed: int) -> None:
    x = reals([*shape, 8], seed)
    check("Quantise", x, np.array(0.05, F), top=top)
    check("QuantiseToken", x, top=top)


def test_quantise_rounds_half_to_even_and_clips() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 9.0, -9.0], F)
    check("Quantise", x, np.array(1, F), top=7.0, want=[np.array([0, 2, 2, 0, -2, 7, -7], F)])


@examples
@given(lead=st.lists(st.integers(1, 3), min_size=1, max_size=3), block=st.sampled_from([0, 2, 5]))
def test_linears(lead: list[int], block: int) -> None:
    x, bias = reals((*lead, 10)), reals((3,), 1)
    check("FixedLinear", x, reals((10, 3), 2), bias)
    codes = whole((10, 3), -7, 8).astype(np.int8)
    scale = np.abs(reals((10 // block, 3) if block else (3,), 3))
    axis = 0 if block else 1
    check("QuantisedLinear", x, codes, scale, bias, axis=axis, block_size=block, tolerance=1e-4)


def test_quantised_linear_with_a_ragged_last_block() -> None:
    x, codes = reals((2, 5)), whole((5, 3), -7, 8).astype(np.int8)
    scale = np.abs(reals((2, 3), 1))
    weight = codes * np.repeat(scale, 4, axis=0)[:5]
    check(
        "QuantisedLinear", x, codes, scale, np.zeros(3, F), axis=0, block_size=4, want=[x @ weight]
    )


def test_side_path() -> None:
    x, y, down, up = reals((2, 3, 6)), reals((2, 3, 5), 1), reals((6, 2), 2), reals((2, 5), 3)
    check("SidePath", x, y, down, up, want=[y + x @ down @ up], tolerance=1e-4)


def test_rotary_and_swiglu() -> None:
    x = reals((2, 3, 5, 8))
    check("Rotary", x, reals((2, 1, 5, 8), 1), reals((2, 1, 5, 8), 2))
    check("SwiGLU", x, reals(x.shape, 1))


# -- the door ---------------------------------------------------------------------------------


def test_importing_the_meanings_does_not_import_torch() -> None:
    code = "import sys, pfmc.ir.meaning; print('torch' in sys.modules, 'scipy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_unknown_operators_are_counted_and_refused() -> None:
    model = one_node("Abs", [reals((2,))], 1, {})
    model.graph[0].op_type = "Abss"
    assert meaning.unsupported(model) == {("", "Abss"): 1}
    with pytest.raises(InputError, match=r"(?s)Abss.*did you mean 'Abs'"):
        meaning.compile_node(model.graph[0])


def test_foreign_arrays_are_refused() -> None:
    node = one_node("Abs", [reals((2,))], 1, {}).graph[0]
    with pytest.raises(InternalError, match="list"):
        meaning.compile_node(node)([[1.0, 2.0]])


def chain() -> ir.Model:
    """``y = relu(x) + c; z = y * w`` where the w branch needs an operator that is unknown."""
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Add", ["r", "c"], ["y"]),
        helper.make_node("Bernoulli", ["x"], ["w"]),
        helper.make_node("Mul", ["y", "w"], ["z"]),
    ]
    info = helper.make_tensor_value_info("x", 1, [2])
    graph = helper.make_graph(
        nodes,
        "g",
        [info],
        [helper.make_empty_tensor_value_info("z")],
        [onnx.numpy_helper.from_array(np.array([1, 2], F), "c")],
    )
    return ir.from_proto(helper.make_model(graph, ir_version=11))


def test_evaluate_runs_only_what_is_asked_for() -> None:
    x = np.array([-1, 3], F)
    model = chain()
    np.testing.assert_array_equal(meaning.evaluate(model, {"x": x}, ["y"])[0], [1, 5])
    np.testing.assert_array_equal(meaning.evaluate(list(model.graph), {"r": x}, ["y"])[0], [0, 5])
    z, r = meaning.evaluate(model.graph, {"x": x, "w": x}, ["z", "r"])
    np.testing.assert_array_equal(z, [-1, 15])
    np.testing.assert_array_equal(r, [0, 3])


def test_evaluate_says_what_is_wrong() -> None:
    with pytest.raises(InputError, match="Bernoulli"):
        meaning.evaluate(chain(), {"x": np.zeros(2, F)}, ["z"])
    with pytest.raises(InputError, match=r"(?s)'x' is unbound.*Relu"):
        meaning.evaluate(chain(), {}, ["y"])
    with pytest.raises(InputError, match="'nothing' is unbound"):
        meaning.evaluate(chain(), {}, ["nothing"])
