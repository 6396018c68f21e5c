"""Sound little models, and odd ones, that fuzzing starts from."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CORPUS = Path(__file__).parent / "corpus"
ZOO = Path(__file__).resolve().parents[3] / "shared" / "zoo"
F32, I64 = TensorProto.FLOAT, TensorProto.INT64


@functools.cache
def small() -> tuple[bytes, ...]:
    """Models made here and those of the corpus; a few kilobytes each."""
    made = [linear(), old(), block(), quantised(), memory(), contrib(), functions(), branches()]
    kept = [p.read_bytes() for p in sorted(CORPUS.glob("*.onnx"))]
    return (*(m.SerializeToString(deterministic=True) for m in made), *kept)


@functools.cache
def everything() -> tuple[bytes, ...]:
    """`small`, one node model of onnx for each operator and a part of the zoo."""
    from onnx.backend.test.case.node import collect_testcases

    by_kind: dict[tuple[str, ...], bytes] = {}
    for case in collect_testcases(None):
        kinds = tuple(n.op_type for n in case.model.graph.node)
        data = case.model.SerializeToString(deterministic=True)
        if len(data) < 20_000:
            by_kind.setdefault(kinds, data)
    zoo = [p.read_bytes() for p in sorted(ZOO.glob("*_t*.onnx"))[::3]]
    return (*small() * 12, *by_kind.values(), *zoo)


def _value(name: str, dims: list[int | str], kind: int = F32) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, dims)


def _weight(name: str, *dims: int) -> onnx.TensorProto:
    size = int(np.prod(dims))
    return numpy_helper.from_array(np.linspace(-1, 1, size, dtype=np.float32).reshape(dims), name)


def _ints(name: str, *values: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def _model(
    nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto], held: list[onnx.TensorProto], opset: int = 20,
) -> onnx.ModelProto:  # fmt: skip
    graph = helper.make_graph(nodes, "g", inputs, outputs, held)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10, producer_name="seed")


def linear() -> onnx.ModelProto:
    """Two linears, one with external weights; a Constant and an Identity."""
    outside = _weight("w1", 8, 8)
    outside.ClearField("raw_data")
    outside.data_location = TensorProto.EXTERNAL
    for key, text in (("location", "weights.bin"), ("offset", "0"), ("length", "256")):
        outside.external_data.add(key=key, value=text)
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], name="/l1/MatMul"),
        helper.make_node("Constant", [], ["half"], value_float=0.5),
        helper.make_node("Mul", ["a", "half"], ["b"]),
        helper.make_node("Identity", ["b"], ["c"]),
        helper.make_node("Gemm", ["c", "w2", "b2"], ["y"], transB=1, name="/l2/Gemm"),
    ]
    ends = [_value("x", ["batch", 8])], [_value("y", ["batch", 4])]
    return _model(nodes, *ends, [outside, _weight("w2", 4, 8), _weight("b2", 4)])


def old() -> onnx.ModelProto:
    """Opset 9: axes, bounds and pads as attributes."""
    nodes = [
        helper.make_node("Unsqueeze", ["x"], ["a"], axes=[0]),
        helper.make_node("Slice", ["a"], ["b"], axes=[2], starts=[0], ends=[6]),
        helper.make_node("Pad", ["b"], ["c"], pads=[0, 0, 1, 0, 0, 1], mode="constant"),
        helper.make_node("Clip", ["c"], ["d"], min=-1.0, max=1.0),
        helper.make_node("Softmax", ["d"], ["e"], axis=1),
        helper.make_node("Dropout", ["e"], ["f"], ratio=0.1),
        helper.make_node("Squeeze", ["f"], ["g"], axes=[0]),
        helper.make_node("ReduceSum", ["g"], ["h"], axes=[1], keepdims=0),
        helper.make_node("TopK", ["h"], ["y", "i"], axis=0, k=2),
    ]
    ends = [_value("x", [4, 8])], [_value("y", ["n"]), _value("i", ["n"], I64)]
    return _model(nodes, *ends, [], 9)


def block() -> onnx.ModelProto:
    """A decomposed encoder layer with dynamic shapes."""
    make, nodes = helper.make_node, []
    for name in "qkv":
        nodes += [
            make("MatMul", ["n", f"w{name}"], [f"{name}0"], name=f"/attn/{name}/MatMul"),
            make("Add", [f"{name}0", "b"], [f"{name}1"]),
            make("Reshape", [f"{name}1", "heads"], [f"{name}2"]),
            make("Transpose", [f"{name}2"], [name], perm=[0, 2, 3, 1] if name == "k" else
                 [0, 2, 1, 3]),
        ]  # fmt: skip
    nodes = [
        make("Gather", ["table", "ids"], ["x"]),
        make("LayerNormalization", ["x", "g", "b"], ["n"], axis=-1, epsilon=1e-5),
        make("Shape", ["ids"], ["shape"]),
        make("Gather", ["shape", "one"], ["length"]),
        make("Concat", ["first", "length", "rest"], ["heads"], axis=0),
        *nodes,
        make("MatMul", ["q", "k"], ["s0"]),
        make("Div", ["s0", "scale"], ["s1"]),
        make("Softmax", ["s1"], ["s2"], axis=-1),
        make("MatMul", ["s2", "v"], ["o0"]),
        make("Transpose", ["o0"], ["o1"], perm=[0, 2, 1, 3]),
        make("Reshape", ["o1", "flat"], ["o2"]),
        make("MatMul", ["o2", "wo"], ["o3"], name="/attn/o/MatMul"),
        make("Add", ["o3", "x"], ["r"]),
        make("Pow", ["r", "two"], ["p"]),
        make("ReduceMean", ["p", "last"], ["m"], keepdims=1),
        make("Sqrt", ["m"], ["d"]),
        make("Div", ["r", "d"], ["rn"]),
        make("Sigmoid", ["rn"], ["sg"]),
        make("Mul", ["rn", "sg"], ["silu"]),
        make("Where", ["mask", "silu", "low"], ["y"]),
    ]
    held = [
        _weight("table", 16, 8), *(_weight(f"w{n}", 8, 8) for n in "qkvo"), _weight("g", 8),
        _weight("b", 8), _ints("one", 1), _ints("first", 0), _ints("rest", 2, 4),
        _ints("flat", 0, -1, 8), _ints("last", -1),
        numpy_helper.from_array(np.array(2, np.float32), "scale"),
        numpy_helper.from_array(np.array(2, np.float32), "two"),
        numpy_helper.from_array(np.array([-np.inf], np.float32), "low"),
    ]  # fmt: skip
    inputs = [_value("ids", ["batch", "seq"], I64), _value("mask", ["batch", "seq", 1], 9)]
    return _model(nodes, inputs, [_value("y", ["batch", "seq", 8])], held)


def quantised() -> onnx.ModelProto:
    """Weights as int8 per column, int4 in blocks; a cast to half and back."""
    make = helper.make_node
    narrow = helper.make_tensor("w4", TensorProto.INT4, [8, 8], bytes(range(32)), raw=True)
    nodes = [
        make("DequantizeLinear", ["w8", "s8", "z8"], ["wa"], axis=1),
        make("MatMul", ["x", "wa"], ["a"]),
        make("DequantizeLinear", ["w4", "s4"], ["wb"], axis=0, block_size=4),
        make("MatMul", ["a", "wb"], ["b"]),
        make("Cast", ["b"], ["h"], to=TensorProto.FLOAT16),
        make("Cast", ["h"], ["y"], to=F32),
    ]
    held = [
        numpy_helper.from_array(np.arange(-32, 32, dtype=np.int8).reshape(8, 8), "w8"),
        _weight("s8", 8), numpy_helper.from_array(np.zeros(8, np.int8), "z8"), narrow,
        _weight("s4", 2, 8),
    ]  # fmt: skip
    return _model(nodes, [_value("x", [2, 8])], [_value("y", [2, 8])], held, 21)


def memory() -> onnx.ModelProto:
    """A decoder's attention with KV memory and rotary tables, opset 24."""
    make = helper.make_node
    nodes = [
        *(make("MatMul", ["x", f"w{n}"], [f"{n}0"], name=f"/layers.0/{n}/MatMul") for n in "qkv"),
        *(make("Reshape", [f"{n}0", "heads"], [f"{n}1"]) for n in "qkv"),
        *(make("Transpose", [f"{n}1"], [f"{n}2"], perm=[0, 2, 1, 3]) for n in "qkv"),
        make("RotaryEmbedding", ["q2", "cos", "sin", "position_ids"], ["q3"]),
        make("RotaryEmbedding", ["k2", "cos", "sin", "position_ids"], ["k3"]),
        make("Attention", ["q3", "k3", "v2", "", "past_key", "past_value"],
             ["o", "present_key", "present_value"], is_causal=1, scale=0.5),
        make("Transpose", ["o"], ["o1"], perm=[0, 2, 1, 3]),
        make("Reshape", ["o1", "flat"], ["o2"]),
        make("RMSNormalization", ["o2", "g"], ["n"], axis=-1),
        make("MatMul", ["n", "wo"], ["y"]),
    ]  # fmt: skip
    kv: list[int | str] = ["batch", 2, "past", 4]
    inputs = [
        _value("x", ["batch", "seq", 8]), _value("position_ids", ["batch", "seq"], I64),
        _value("past_key", kv), _value("past_value", kv),
    ]  # fmt: skip
    total: list[int | str] = ["batch", 2, "total", 4]
    outputs = [_value("y", ["batch", "seq", 8]), _value("present_key", total),
               _value("present_value", total)]  # fmt: skip
    held = [
        *(_weight(f"w{n}", 8, 8) for n in "qkvo"), _weight("cos", 32, 2), _weight("sin", 32, 2),
        _weight("g", 8), _ints("heads", 0, -1, 2, 4), _ints("flat", 0, -1, 8),
    ]  # fmt: skip
    return _model(nodes, inputs, outputs, held, 24)


def contrib() -> onnx.ModelProto:
    """Operators of ONNX Runtime's own domain."""
    make = functools.partial(helper.make_node, domain="com.microsoft")
    packed = numpy_helper.from_array(np.arange(128, dtype=np.uint8).reshape(8, 1, 16), "wn")
    nodes = [
        make("MultiHeadAttention", ["x", "x", "x"], ["h"], num_heads=2),
        make("SkipLayerNormalization", ["h", "x", "g", "b"], ["n", "", "", "r"], epsilon=1e-5),
        helper.make_node("SimplifiedLayerNormalization", ["r", "g"], ["m"], axis=-1),
        helper.make_node("Concat", ["n", "m", "n", "m"], ["wide"], axis=-1),
        make("MatMulNBits", ["wide", "wn", "sn"], ["q"], K=32, N=8, bits=4, block_size=32),
        make("FastGelu", ["q", "b"], ["f"]),
        make("GroupQueryAttention",
             ["f", "m", "n", "past_key", "past_value", "len", "all", "cos", "sin"],
             ["y", "present_key", "present_value"], num_heads=2, kv_num_heads=2, do_rotary=1),
        make("BiasGelu", ["y", "b"], ["z"]),
    ]  # fmt: skip
    held = [
        _weight("g", 8), _weight("b", 8), packed, _weight("sn", 8), _weight("cos", 32, 2),
        _weight("sin", 32, 2), numpy_helper.from_array(np.array([4, 4], np.int32), "len"),
        numpy_helper.from_array(np.array(5, np.int32), "all"),
    ]  # fmt: skip
    kv: list[int | str] = [2, 2, "past", 4]
    inputs = [_value("x", [2, 5, 8]), _value("past_key", kv), _value("past_value", kv)]
    total: list[int | str] = [2, 2, "total", 4]
    outputs = [_value("z", [2, 5, 8]), _value("present_key", total), _value("present_value", total)]
    return _model(nodes, inputs, outputs, held)


def functions() -> onnx.ModelProto:
    """Local functions, one calling the other, with attributes passed on."""
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
    slope = helper.make_node("LeakyRelu", ["a"], ["b"])
    reference = slope.attribute.add(name="alpha", type=onnx.AttributeProto.FLOAT)
    reference.ref_attr_name = "slope"
    call = helper.make_node("Inner", ["t"], ["b"], domain="local")
    passed = call.attribute.add(name="slope", type=onnx.AttributeProto.FLOAT)
    passed.ref_attr_name = "slope"
    body = [helper.make_node("MatMul", ["a", "w"], ["t"]), call]
    model = _model(
        [helper.make_node("Outer", ["x", "w1"], ["h"], domain="local", slope=0.1),
         helper.make_node("Outer", ["h", "w2"], ["y"], domain="local", slope=0.2)],
        [_value("x", [2, 8])], [_value("y", [2, 8])], [_weight("w1", 8, 8), _weight("w2", 8, 8)],
    )  # fmt: skip
    model.opset_import.add(domain="local", version=1)
    for name, inputs, nodes in (("Inner", ["a"], [slope]), ("Outer", ["a", "w"], body)):
        model.functions.append(
            helper.make_function("local", name, inputs, ["b"], nodes, imports, ["slope"])
        )
    return model


def branches() -> onnx.ModelProto:
    """Control flow, two deep, and a sparse initialiser."""
    inner = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["r"])], "then", [], [_value("r", [2, 8])]
    )
    deep = helper.make_graph(
        [helper.make_node("If", ["c"], ["s"], then_branch=inner, else_branch=inner)],
        "else", [], [_value("s", [2, 8])],
    )  # fmt: skip
    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=deep)]
    inputs = [_value("x", [2, 8]), _value("c", [], TensorProto.BOOL)]
    return _model(nodes, inputs, [_value("y", [2, 8])], [])
