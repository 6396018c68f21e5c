"""How fuzzing damages a model: its bytes, or its graph."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, TensorProto, helper, numpy_helper

Mutation = Callable[[random.Random, onnx.ModelProto, Sequence[bytes]], None]

NUMBERS = (0, 1, -1, 2, 3, 7, 8, 16, 255, 2**31 - 1, -(2**31), 2**31, 2**40, 2**62, 2**63 - 1,
           -(2**63))  # fmt: skip
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e30, float("inf"), float("-inf"), float("nan"))
NAMES = ("", " ", "x", "y", "a", "../../etc/passwd", "x\n;$(touch z)", "n" * 70_000, "ü\u202e☃",
         "2", "٣", "-1", "past + 1", "past_key_values.0.key", "\x00", "unk__0", "</script>",
         "value_0", "pfmc")  # fmt: skip
DOMAINS = ("", "ai.onnx", "com.microsoft", "pfmc", "local", "ai.onnx.ml", "ai.onnx.preview", "?")
OPERATORS = (
    "Add", "Attention", "BatchNormalization", "Cast", "CastLike", "Clip", "Concat", "Constant",
    "ConstantOfShape", "Conv", "CumSum", "DequantizeLinear", "Div", "Dropout", "Einsum", "Equal",
    "Expand", "FixedLinear", "Flatten", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm",
    "GroupQueryAttention", "Identity", "If", "LayerNormalization", "Loop", "MatMul", "MatMulNBits",
    "Max", "Mean", "Mod", "MoE", "MultiHeadAttention", "NonZero", "OneHot", "Pad", "Pow",
    "QuantizeLinear", "RMSNormalization", "RandomNormal", "Range", "ReduceMax", "ReduceMean",
    "ReduceSum", "Relu", "Reshape", "RotaryEmbedding", "ScatterElements", "ScatterND", "Shape",
    "Size", "SkipLayerNormalization", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub",
    "SwiGLU", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Where", "Xor",
)  # fmt: skip
LOCATIONS = ("weights.bin", "../weights.bin", "/etc/passwd", "", "missing.bin", ".", "a/b",
             "weights.bin\x00", "model.onnx", "~", "C:\\x")  # fmt: skip


def damaged(rng: random.Random, seed: bytes, others: Sequence[bytes]) -> bytes:
    """`seed` after one to five damages of its graph, then perhaps of its bytes."""
    data = seed
    if rng.random() < 0.85:
        model = onnx.ModelProto()
        try:
            model.ParseFromString(seed)
            for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5))):
                rng.choice(STRUCTURAL)(rng, model, others)
            data = model.SerializeToString()
        except (DecodeError, ValueError, TypeError, IndexError, UnicodeError):
            data = seed  # a seed that is no model, or a damage that does not fit it
    if data is seed or rng.random() < 0.1:
        for _ in range(rng.choice((1, 1, 2, 4, 8))):
            data = _bytes(rng, data)
    return data


def _bytes(rng: random.Random, data: bytes) -> bytes:
    if not data:
        return rng.randbytes(rng.randrange(64))
    at, length = rng.randrange(len(data)), rng.randrange(1, 32)
    kind = rng.randrange(7)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + rng.randbytes(length) + data[at + length :]
    if kind == 2:
        return data[:at]
    if kind == 3:
        return data[:at] + data[at + length :]
    if kind == 4:
        return data[:at] + data[at : at + length] * rng.choice((2, 2, 50)) + data[at:]
    if kind == 5:  # a length or a number of the largest size
        return data[:at] + b"\xff" * rng.choice((1, 4, 9)) + b"\x01" + data[at:]
    return data[at:] + data[:at]


# -- the graph -----------------------------------------------------------------------------------


def _node(rng: random.Random, model: onnx.ModelProto) -> onnx.NodeProto:
    bodies = [model.graph.node, *(f.node for f in model.functions)]
    return rng.choice(rng.choice([b for b in bodies if b]))


def _tensor(rng: random.Random, model: onnx.ModelProto) -> onnx.TensorProto:
    held = list(model.graph.initializer)
    held += [a.t for n in model.graph.node for a in n.attribute if a.HasField("t")]
    return rng.choice(held)


def _info(rng: random.Random, model: onnx.ModelProto) -> onnx.ValueInfoProto:
    graph = model.graph
    return rng.choice([*graph.input, *graph.output, *graph.value_info])


def _names(model: onnx.ModelProto) -> list[str]:
    graph = model.graph
    made = [o for n in graph.node for o in n.output]
    return [*made, *(v.name for v in graph.input), *(t.name for t in graph.initializer)]


def _some_name(rng: random.Random, model: onnx.ModelProto) -> str:
    return rng.choice(NAMES) if rng.random() < 0.2 else rng.choice(_names(model))


def rename_node(rng: random.Random, model: onnx.ModelProto, _: Sequence[bytes]) -> None:
    _node(rng, model).name = rng.choice(NAMES)


def rename_everywhere(rng: random.Random, model: onnx.ModelProto, _: Sequence[bytes]) -> None:
    old, new = rng.choice(_names(model)), rng.choice(NAMES)
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [new if n == old else n for n in names]
    for thing in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        thing.name = new if thing.name == old else thing.name


def rewire(rng: random.Random, model: onnx.ModelProto, _: Sequence[bytes]) -> None:
    node = _node(rng, model)
    names = rng.choice([n for n in (node.input, node.output) if n])
    names[rng.randrange(len(names))] = _some_name(rng, model)


def resize_ends(rng: random.Random, model: onnx.ModelProto, _: Sequence[bytes]) -> None:
    node = _node(rng, model)
    names = rng.choice((node.input, node.output))
    if names and rng.random() < 0.5:
        del names[rng.randrange(len(names))]
    else:
        names.append(rng.choice((_some_name(rng, model), f"new{rng.randrange(9)}")))


def drop(rng: random.Random, model: onnx.ModelProto, _: Sequence[bytes]) -> None:
    graph = model.graph
    lists = [graph.node, graph.initializer, graph.input, graph.output, model.opset_import,
             model.functions, *(n.attribute for n in graph.node)]  # fmt: skip
    chosen = rng.choice([x for x in lists if x])
    del chosen[rng.randrange(len(chosen))]


def duplicate(rng: random.Random, model: onnx.ModelProto, _: Sequence[bytes]) -> None:
    graph = model.graph
    lists = [graph.node, graph.initializer, graph.input, graph.output, model.opset_import,
             model.functions, *(n.attribute for n in graph.node)]  # fmt: skip
    chosen = rng.choice([x for x in lists if x])
    chosen.append(rng.choice(chosen))
    if chosen is graph.node and rng.random() < 0.7:
        for i, name in enumerate(chosen[-1].output):
            chosen[-1].output[i] = name + "_again"


def swap_nodes(rng: random.Random, model: onnx.ModelProto, _: Sequence[bytes]) -> None:
    nodes = list(model.graph.node)
    rng.shuffle(nodes)
    kept = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def change_operator(rng: random.Random, model: onnx.ModelProto, _: Sequence[bytes]) -> None:
    node = _node(rng, model)
    if rng.random() < 0.8:
        node.op_type = rng.choice(OPERATORS)
    if rng.random() < 0.3:
        node.domain = rng.choice(DOMAINS)


def change_attribute(rng: random.Random, model: onnx.ModelProto, _: Sequence[bytes]) -> None:
    nodes = [n for n in model.graph.node if n.attribute]
    attribute = rng.choice(rng.choice(nodes).attribute)
    if attribute.ints and rng.random() < 0.7:
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(NUMBERS)
    elif rng.random() < 0.7:
        attribute.i, attribute.f = rng.choice(NUMBERS), rng.choice(FLOATS)
        attribute.s = rng.choice((b"", b"NONE", b"constant", b"\xff\xfe", b"x" * 9))
    elif rng.random() < 0.5:
        attribute.type = rng.randrange(16)
    else:
        attribute.name = rng.choice((*NAMES, "axis", "perm", "to", "axes", "alpha"))


ATTRIBUTES = (
    "allowzero", "alpha", "axes", "axis", "batch_dims", "block_size", "end", "epsilon", "equation",
    "is_causal", "keepdims", "k", "largest", "mode", "num_heads", "kv_num_heads", "q_num_heads",
    "num_outputs", "perm", "scale", "softcap", "start", "to", "transA", "transB", "upper", "value",
    "qk_matmul_output_mode", "interleaved", "rotary_embedding_dim", "reduction", "exclusive",
)  # fmt: skip


def add_attribute(rng: random.Random, model: onnx.ModelProto, _: Sequence[bytes]) -> None:
    value = rng.choice((
        rng.choice(NUMBERS), rng.choice(FLOATS), rng.choice(NAMES), b"\xff",
        [rng.choice(NUMBERS) for _ in range(rng.randrange(1, 5))],
        [rng.choice(FLOATS)], numpy_helper.from_array(np.zeros((1, 0), np.float32)),
        helper.make_tensor("s", TensorProto.STRING, [1], [b"x"]),
    ))  # fmt: skip
    node = _node(rng, model)
    node.attribute.append(helper.make_attribute(rng.choice(ATTRIBUTES), value))
    if rng.random() < 0.1:
        node.attribute[-1].ref_attr_name = rng.choice(("slope", "alpha", ""))


def retype(rng: random.Random, model: onnx.ModelProto, _: Sequence[bytes]) -> None:
    kind = rng.choice((*range(0, 28), 99, -1))
    if rng.random() < 0.5:
        _tensor(rng, model).data_type = kind
    else:
        _info(rng, model).type.tensor_type.elem_type = kind


def reshape_tensor(rng: random.Random, model: onnx.ModelProto, _: Sequence[bytes]) -> None:
    tensor = _tensor(rng, model)
    dims = list(tensor.dims)
    how = rng.randrange(5)
    if how == 0 and dims:
        dims[rng.randrange(len(dims))] = rng.choice(NUMBERS)
    elif how == 1:
        rng.shuffle(dims)
    elif how == 2:
        dims.insert(rng.randrange(len(dims) + 1), rng.choice((1, 1, 1, 0, -1, 2**40)))
    elif how == 3 and dims:
        del dims[rng.randrange(len(dims))]
    else:
        dims = [1] * rng.choice((1, 5, 17, 100)) + dims
    tensor.dims[:] = dims


def refill_tensor(rng: random.Random, model: onnx.ModelProto, _: Sequence[bytes]) -> None:
    """Other numbers, as axes, bounds and target shapes have them, or not finite."""
    tensor = _tensor(rng, model)
    kind = tensor.data_type
    if kind in (TensorProto.INT64, TensorProto.INT32):
        size = int(np.prod(tensor.dims)) if len(tensor.dims) else 1
        size = min(max(size, 0), 64) + rng.choice((0, 0, 0, 1))
        bits = 64 if kind == TensorProto.INT64 else 32
        top = 2 ** (bits - 1)
        held = [min(max(rng.choice(NUMBERS), -top), top - 1) for _ in range(size)]
        if rng.random() < 0.3:
            tensor.dims[:] = [size]
        tensor.ClearField("int64_data"), tensor.ClearField("int32_data")
        tensor.raw_data = np.array(held, f"int{bits}").tobytes()
    elif tensor.raw_data:
        raw = bytearray(tensor.raw_data)
        for _ in range(rng.randrange(1, 9)):
            raw[rng.randrange(len(raw))] = rng.choice((0, 0x7F, 0x80, 0xFF))
        tensor.raw_data = bytes(raw[: rng.choice((len(raw), len(raw), len(raw) - 1))])
    if rng.random() < 0.1:
        tensor.float_data.append(1.0)


def reshape_value(rng: random.Random, model: onnx.ModelProto, _: Sequence[bytes]) -> None:
    shape = _info(rng, model).type.tensor_type.shape
    how = rng.randrange(4)
    if how == 0 or not shape.dim:
        shape.dim.add()
    elif how == 1:
        del shape.dim[rng.randrange(len(shape.dim))]
    elif how == 2:
        rng.choice(shape.dim).dim_value = rng.choice(NUMBERS)
    else:
        rng.choice(shape.dim).dim_param = rng.choice(NAMES)


def note_value(rng: random.Random, model: onnx.ModelProto, _: Sequence[bytes]) -> None:
    """A note of a shape that need not be right, on any value; perhaps it is an output too."""
    dims = [rng.choice((1, 2, 8, 0, -1, 2**40, "n", "2")) for _ in range(rng.randrange(5))]
    value = helper.make_tensor_value_info(_some_name(rng, model), rng.choice((1, 7, 9, 10)), dims)
    rng.choice((model.graph.value_info, model.graph.value_info, model.graph.output)).append(value)


def odd_kind(rng: random.Random, model: onnx.ModelProto, _: Sequence[bytes]) -> None:
    value = _info(rng, model)
    value.type.Clear()
    if rng.random() < 0.5:
        value.type.sequence_type.elem_type.tensor_type.elem_type = 1
    elif rng.random() < 0.5:
        value.type.optional_type.elem_type.tensor_type.elem_type = 1


def versions(rng: random.Random, model: onnx.ModelProto, _: Sequence[bytes]) -> None:
    if rng.random() < 0.3:
        model.ir_version = rng.choice((0, 3, 4, 7, 8, 10, 13, 14, 99, -1))
    for entry in model.opset_import:
        if rng.random() < 0.7:
            entry.version = rng.choice((*range(1, 30), 0, -1, 999))


def outside(rng: random.Random, model: onnx.ModelProto, _: Sequence[bytes]) -> None:
    """Weights of a tensor put into, or sought in, a file beside the model."""
    tensor = _tensor(rng, model)
    if rng.random() < 0.8:
        tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    numbers = ("0", "1", "64", "-1", "4096", "4095", str(2**63), "x", "", "1e3", "٣")
    given = {"location": rng.choice(LOCATIONS[:1] * 9 + LOCATIONS)}
    for key in ("offset", "length", "checksum", "__class__", "basepath"):
        if rng.random() < 0.4:
            given[key] = rng.choice(numbers)
    for key, text in given.items():
        for _ in range(rng.choice((1, 1, 1, 1, 2, 0))):
            tensor.external_data.add(key=key, value=text)


def into_branch(rng: random.Random, model: onnx.ModelProto, _: Sequence[bytes]) -> None:
    """A node moves into an If, up to sixty deep."""
    at = rng.randrange(len(model.graph.node))
    node = onnx.NodeProto.FromString(model.graph.node[at].SerializeToString())
    for depth in range(rng.choice((1, 2, 20, 60))):
        outputs = [onnx.ValueInfoProto(name=o) for o in node.output]
        inner = helper.make_graph([node], f"g{depth}", [], outputs)
        node = helper.make_node("If", ["c"], list(node.output), then_branch=inner)
    model.graph.node[at].CopyFrom(node)


def into_function(rng: random.Random, model: onnx.ModelProto, _: Sequence[bytes]) -> None:
    """A node becomes the call of a function that holds it, or that calls itself."""
    node = rng.choice(model.graph.node)
    body = onnx.NodeProto.FromString(node.SerializeToString())
    name = rng.choice(("Fresh", "Outer", "Inner", node.op_type))
    domain = rng.choice(("local", "fuzz", node.domain, "pfmc"))
    imports = [helper.make_opsetid("", rng.choice((9, 13, 20, 24, 99)))]
    model.functions.append(
        helper.make_function(domain, name, [n for n in node.input if n], list(node.output), [body],
                             imports)
    )  # fmt: skip
    node.op_type, node.domain = name, domain
    node.input[:] = [n for n in node.input if n]
    del node.attribute[:]
    if rng.random() < 0.8:
        model.opset_import.add(domain=domain, version=1)


def damage_function(rng: random.Random, model: onnx.ModelProto, _: Sequence[bytes]) -> None:
    function = rng.choice(model.functions)
    names = rng.choice((function.input, function.output, function.attribute))
    if names and rng.random() < 0.5:
        del names[rng.randrange(len(names))]
    else:
        names.append(rng.choice(NAMES))
    if rng.random() < 0.2:
        function.name, function.domain = rng.choice(OPERATORS), rng.choice(DOMAINS)
    if rng.random() < 0.2:
        function.attribute_proto.append(helper.make_attribute("slope", rng.choice(FLOATS)))


def graft(rng: random.Random, model: onnx.ModelProto, others: Sequence[bytes]) -> None:
    """Some nodes and weights of another model, hung on values of this one."""
    other = onnx.ModelProto.FromString(rng.choice(others))
    if len(other.graph.node) > 64:
        return
    mine = _names(model)
    first = rng.randrange(len(other.graph.node))
    for node in other.graph.node[first : first + rng.choice((1, 2, 8))]:
        model.graph.node.append(node)
        inputs = model.graph.node[-1].input
        inputs[:] = [rng.choice(mine) if rng.random() < 0.2 else n for n in inputs]
    model.graph.initializer.extend(other.graph.initializer)
    if rng.random() < 0.5:
        model.graph.output.append(onnx.ValueInfoProto(name=model.graph.node[-1].output[0]))


def hang_on(rng: random.Random, model: onnx.ModelProto, _: Sequence[bytes]) -> None:
    """A fresh node between a value and its users, or as an output."""
    old = rng.choice(_names(model))
    kind = rng.choice(OPERATORS)
    count = rng.choice((1, 1, 2, 3))
    inputs = [old, *(_some_name(rng, model) for _ in range(count - 1))]
    at = rng.randrange(len(model.graph.node) + 1)
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in model.graph.node]
    for node in nodes[at:]:
        node.input[:] = ["fresh" if n == old else n for n in node.input]
    nodes.insert(at, helper.make_node(kind, inputs, ["fresh"]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    if rng.random() < 0.3:
        model.graph.output.append(onnx.ValueInfoProto(name="fresh"))


def notes(rng: random.Random, model: onnx.ModelProto, _: Sequence[bytes]) -> None:
    """Metadata that pfmc reads, wrong; and parts of a file that it refuses."""
    keys = ("pfmc.src", "pfmc.scope", "pfmc.value", "pfmc.weight", "namespace",
            "pkg.torch.onnx.name_scopes", "pkg.onnxscript.optimizer.folded_from")  # fmt: skip
    texts = ("", "n1 n2", "['a'", "['', 'model', 'model.layers.0']", "[1]", "n" * 999, "[" * 999)
    place = rng.choice((_node(rng, model), _info(rng, model), _tensor(rng, model), model))
    place.metadata_props.add(key=rng.choice(keys), value=rng.choice(texts))
    if rng.random() < 0.1:
        model.training_info.add()
    if rng.random() < 0.1:
        model.graph.sparse_initializer.add()
    if rng.random() < 0.1:
        model.graph.quantization_annotation.add(tensor_name=_some_name(rng, model))


def oversize(rng: random.Random, model: onnx.ModelProto, _: Sequence[bytes]) -> None:
    """A constant small in the file that is huge when expanded."""
    how = rng.choice(("ConstantOfShape", "Expand", "Tile", "Range", "Pad", "OneHot"))
    big = [rng.choice((2**20, 2**31, 2**35, 2**44)) for _ in range(rng.choice((1, 2)))]
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.array(big, np.int64), "big"))
    graph.initializer.append(numpy_helper.from_array(np.array([0, 0, *big][-2:], np.int64), "two"))
    graph.initializer.append(numpy_helper.from_array(np.array(1, np.int64), "step"))
    graph.initializer.append(numpy_helper.from_array(np.array(big[0], np.int64), "top"))
    inputs = {
        "ConstantOfShape": ["big"], "Range": ["step", "top", "step"],
        "OneHot": ["big", "top", "two"],
        "Pad": ["big", "two"],
    }.get(how, ["step", "big"])  # fmt: skip
    graph.node.append(helper.make_node(how, inputs, ["huge"]))
    kind = rng.choice(("Add", "Shape", "ReduceSum", "Cast", "Gather"))
    if kind == "Cast":
        graph.node.append(helper.make_node("Cast", ["huge"], ["used"], to=1))
    else:
        operands = ["huge", "step"] if kind in ("Add", "Gather") else ["huge"]
        graph.node.append(helper.make_node(kind, operands, ["used"]))
    graph.output.append(onnx.ValueInfoProto(name="used"))
    graph.output[-1].type.tensor_type.elem_type = 7


def odd_texts(rng: random.Random, model: onnx.ModelProto, _: Sequence[bytes]) -> None:
    """An attribute of a strange kind."""
    attribute = _node(rng, model).attribute.add(name="odd", type=rng.randrange(16))
    if rng.random() < 0.5:
        attribute.type = AttributeProto.TYPE_PROTO
        attribute.tp.tensor_type.elem_type = 1
    if rng.random() < 0.3:
        attribute.sparse_tensor.dims.append(2**40)


STRUCTURAL: tuple[Mutation, ...] = (
    rename_node, rename_everywhere, rewire, rewire, resize_ends, resize_ends, drop, drop, duplicate,
    swap_nodes, change_operator, change_operator, change_attribute, change_attribute,
    change_attribute, add_attribute, add_attribute, retype, reshape_tensor, reshape_tensor,
    refill_tensor, refill_tensor, refill_tensor, reshape_value, reshape_value, note_value, odd_kind,
    versions, outside, into_branch, into_function, damage_function, graft, graft, hang_on, hang_on,
    notes, oversize, odd_texts,
)  # fmt: skip
