"""The words of the graph: stages, our operators as ONNX functions, metadata keys, legality.

Every operator of domain ``pfmc`` is an ONNX function whose body is standard operators, so a
model at any stage opens in Netron and runs in ONNX Runtime (graph optimisation BASIC or off).

Operators (B batch, S positions, H heads, D head width; all float32):

``FixedLinear(x[..., in], weight[in, out], bias[out]) -> y[..., out]``
    a weight-stationary product; ``bias`` is zeros where the source had none. The node's name is
    the layer's id (its module scope, e.g. ``model.layers.0.self_attn.q_proj``).
``QuantisedLinear(x[..., in], codes[in, out] int4|int8, scale, bias[out]) -> y[..., out]``
    the same with symmetric integer codes: ``scale`` is ``[out]`` (attributes ``axis=1``,
    ``block_size=0``) or ``[ceil(in / block_size), out]`` (``axis=0``).
``Quantise(x, scale[]) -> y``
    static symmetric fake-quantisation: ``clip(round(x / scale), -top, top) * scale`` with float
    attribute ``top = 2**(bits-1) - 1``; round half to even.
``QuantiseToken(x) -> y``
    the same with ``scale = max|x| / top`` over the last axis, afresh for every position.
``Rotary(x[B, H, S, D], cos, sin) -> y``
    ``x * cos + rotate(x) * sin``; cos and sin broadcast against x. Pairs are elements i and
    i + D/2 (Llama, GPT-NeoX), or with the attribute ``interleaved = 1`` elements 2i and 2i + 1
    (GPT-J, Cohere, GLM): a pair (a, b) is turned to (-b, a). Keys stay in the source's order.
``SwiGLU(gate, up) -> gate * sigmoid(gate) * up``
``SidePath(x[..., in], y[..., out], down[in, rank], up[rank, out]) -> y + (x @ down) @ up``
    an adapter beside the fixed linear that made y; down and up are writable memory of the digital
    fabric, so this is no fixed linear.
``Trim(y[..., out], gain[out], offset[out]) -> y * gain + offset``
    what corrects each output of one die's fixed linear; writable memory, too.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import onnx_ir as ir

DOMAIN = "pfmc"
OPSET = 24
IR_VERSION = 11

KEY_SOURCE = "pfmc.src"  # ids of the source nodes this came from, space-separated: "n12 n13"
KEY_SCOPE = "pfmc.scope"  # module scope, e.g. "model.layers.0.self_attn"
SYNTHETIC = "pfmc/"  # begins the names of values that no source has
KEY_VALUE = "pfmc.value"  # name, in the source file, of the value that a fixed linear produces
KEY_WEIGHT = "pfmc.weight"  # original weight name(s) of an initialiser
KEY_SHIFT = "pfmc.shift"  # on the node that says how far rows are from filling their memory
KEY_FULL = "pfmc.full"  # the input that stands in a node's place if they do fill it, or `DROPPED`
DROPPED = "drop"
KEY_SPREAD = "pfmc.spread"  # on a SidePath that belongs to its fixed linear and is no adapter


class Stage(enum.Enum):
    """How far a model has come down the road."""

    SOURCE = "source"
    CANONICAL = "canonical"
    QUANTISED = "quantised"


FIXED_LINEAR = "FixedLinear"
QUANTISED_LINEAR = "QuantisedLinear"
QUANTISE = "Quantise"
QUANTISE_TOKEN = "QuantiseToken"
ROTARY = "Rotary"
SWIGLU = "SwiGLU"
SIDE_PATH = "SidePath"
TRIM = "Trim"
INTERLEAVED = "interleaved"  # attribute of Rotary


@dataclass(frozen=True)
class Op:
    """One line of a function body: operator, inputs, outputs, attributes.

    An attribute given as ``"@name"`` refers to the calling node's attribute of that name.
    """

    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True)
class Operator:
    """An operator of domain ``pfmc``: its formal inputs, outputs, attributes and its meaning."""

    name: str
    inputs: tuple[str, ...]
    attributes: tuple[tuple[str, ir.AttributeType], ...]
    body: tuple[Op, ...]
    outputs: tuple[str, ...] = ("y",)
    defaults: tuple[tuple[str, int], ...] = ()


OPERATORS: dict[str, Operator] = {
    FIXED_LINEAR: Operator(
        FIXED_LINEAR,
        ("x", "weight", "bias"),
        (),
        (
            Op("MatMul", ("x", "weight"), ("product",)),
            Op("Add", ("product", "bias"), ("y",)),
        ),
    ),
    QUANTISED_LINEAR: Operator(
        QUANTISED_LINEAR,
        ("x", "codes", "scale", "bias"),
        (("axis", ir.AttributeType.INT), ("block_size", ir.AttributeType.INT)),
        (
            Op(
                "DequantizeLinear",
                ("codes", "scale"),
                ("weight",),
                (("axis", "@axis"), ("block_size", "@block_size")),
            ),
            Op("MatMul", ("x", "weight"), ("product",)),
            Op("Add", ("product", "bias"), ("y",)),
        ),
    ),
    QUANTISE: Operator(
        QUANTISE,
        ("x", "scale"),
        (("top", ir.AttributeType.FLOAT),),
        (
            Op("Constant", (), ("top",), (("value_float", "@top"),)),
            Op("Neg", ("top",), ("bottom",)),
            Op("Div", ("x", "scale"), ("ratio",)),
            Op("Round", ("ratio",), ("rounded",)),
            Op("Clip", ("rounded", "bottom", "top"), ("code",)),
            Op("Mul", ("code", "scale"), ("y",)),
        ),
    ),
    QUANTISE_TOKEN: Operator(
        QUANTISE_TOKEN,
        ("x",),
        (("top", ir.AttributeType.FLOAT),),
        (
            Op("Constant", (), ("top",), (("value_float", "@top"),)),
            Op("Constant", (), ("tiny",), (("value_float", 1e-30),)),
            Op("Constant", (), ("last",), (("value_ints", (-1,)),)),
            Op("Abs", ("x",), ("magnitude",)),
            Op("ReduceMax", ("magnitude", "last"), ("peak",), (("keepdims", 1),)),
            Op("Max", ("peak", "tiny"), ("range",)),
            Op("Div", ("range", "top"), ("scale",)),
            Op("Div", ("x", "scale"), ("ratio",)),
            Op("Round", ("ratio",), ("code",)),
            Op("Mul", ("code", "scale"), ("y",)),
        ),
    ),
    ROTARY: Operator(
        ROTARY,
        ("x", "cos", "sin"),
        ((INTERLEAVED, ir.AttributeType.INT),),
        (  # pairs lie `step` apart: rows of [2, step]
            Op("Constant", (), ("flag",), (("value_int", "@interleaved"),)),
            Op("Cast", ("flag",), ("near",), (("to", int(ir.DataType.BOOL)),)),
            Op("Constant", (), ("one",), (("value_ints", (1,)),)),
            Op("Constant", (), ("two",), (("value_ints", (2,)),)),
            Op("Constant", (), ("rest",), (("value_ints", (-1,)),)),
            Op("Shape", ("x",), ("shape",)),
            Op("Shape", ("x",), ("width",), (("start", -1),)),
            Op("Div", ("width", "two"), ("half",)),
            Op("Where", ("near", "one", "half"), ("step",)),
            Op("Concat", ("rest", "two", "step"), ("rows",), (("axis", 0),)),
            Op("Reshape", ("x", "rows"), ("pairs",)),
            Op("Split", ("pairs",), ("left", "right"), (("axis", 1), ("num_outputs", 2))),
            Op("Neg", ("right",), ("negative",)),
            Op("Concat", ("negative", "left"), ("swapped",), (("axis", 1),)),
            Op("Reshape", ("swapped", "shape"), ("turned",)),
            Op("Mul", ("x", "cos"), ("even",)),
            Op("Mul", ("turned", "sin"), ("odd",)),
            Op("Add", ("even", "odd"), ("y",)),
        ),
        defaults=((INTERLEAVED, 0),),
    ),
    SWIGLU: Operator(
        SWIGLU,
        ("gate", "up"),
        (),
        (
            Op("Sigmoid", ("gate",), ("squashed",)),
            Op("Mul", ("gate", "squashed"), ("active",)),
            Op("Mul", ("active", "up"), ("y",)),
        ),
    ),
    SIDE_PATH: Operator(
        SIDE_PATH,
        ("x", "y", "down", "up"),
        (),
        (
            Op("MatMul", ("x", "down"), ("narrow",)),
            Op("MatMul", ("narrow", "up"), ("wide",)),
            Op("Add", ("y", "wide"), ("z",)),
        ),
        ("z",),
    ),
    TRIM: Operator(
        TRIM,
        ("y", "gain", "offset"),
        (),
        (
            Op("Mul", ("y", "gain"), ("scaled",)),
            Op("Add", ("scaled", "offset"), ("z",)),
        ),
        ("z",),
    ),
}
"""Every operator of our domain and its ideal meaning."""


def _attribute(name: str, value: object) -> ir.Attr:
    if isinstance(value, str) and value.startswith("@"):
        kind = ir.AttributeType.FLOAT if name == "value_float" else ir.AttributeType.INT
        return ir.RefAttr(name, value[1:], kind)
    if isinstance(value, tuple):
        return ir.AttrInt64s(name, value)
    if isinstance(value, float):
        return ir.AttrFloat32(name, value)
    assert isinstance(value, int)
    return ir.AttrInt64(name, value)


def function(name: str) -> ir.Function:
    """The ONNX function of operator `name`, made afresh."""
    operator = OPERATORS[name]
    values: dict[str, ir.Value] = {n: ir.Value(name=n) for n in operator.inputs}
    nodes: list[ir.Node] = []
    for line in operator.body:
        outputs = [ir.Value(name=n) for n in line.outputs]
        values.update(zip(line.outputs, outputs, strict=True))
        nodes.append(
            ir.Node(
                "",
                line.op_type,
                [values[n] for n in line.inputs],
                [_attribute(k, v) for k, v in line.attributes],
                outputs=outputs,
            )
        )
    graph = ir.Graph(
        [values[n] for n in operator.inputs],
        [values[n] for n in operator.outputs],
        nodes=nodes,
        opset_imports={"": OPSET},
        name=name,
    )
    defaults = dict(operator.defaults)
    formal = [ir.Attr(n, kind, defaults.get(n)) for n, kind in operator.attributes]
    return ir.Function(DOMAIN, name, "", graph=graph, attributes=formal)


def install(model: ir.Model) -> None:
    """Gives `model` the functions of the ``pfmc`` operators it uses, and no others."""
    used = sorted({n.op_type for n in model.graph if n.domain == DOMAIN})
    for identifier in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[identifier]
    for name in used:
        made = function(name)
        model.functions[made.identifier()] = made
    if used:
        model.graph.opset_imports[DOMAIN] = 1


def is_op(node: ir.Node, op_type: str, domain: str = "") -> bool:
    """Whether `node` is `op_type` of `domain` (``""`` and ``"ai.onnx"`` are the same)."""
    if node.op_type != op_type:
        return False
    return node.domain == domain or (domain == "" and node.domain == "ai.onnx")


LINEARS = frozenset({FIXED_LINEAR, QUANTISED_LINEAR})


def fixed_linears(model: ir.Model) -> list[ir.Node]:
    """The weight-stationary products of `model` in graph order."""
    return [n for n in model.graph if n.domain == DOMAIN and n.op_type in LINEARS]
