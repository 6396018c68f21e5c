"""Brings nodes of older standard opsets to ours: the changes of meaning, and nothing else.

Every entry names the opset that changed the operator (onnx docs/Changelog.md). Additions that leave
old nodes valid (new types, new optional inputs) need no entry. Value names and metadata survive,
which neither the C++ converter of `onnx` (drops metadata) nor the one of onnxscript (wrong below
opset 18, quadratic) offers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from pfmc.errors import InputError
from pfmc.ingest.rewrite import Builder
from pfmc.ir.vocabulary import OPSET


@dataclass
class Upgrade:
    """One node on its way from opset `version` to ours, and the place to put its new parts."""

    node: ir.Node
    version: int
    builder: Builder = field(repr=False)

    def take(self, name: str) -> ir.Attr | None:
        """Removes and returns an attribute."""
        self._check_known(name)
        return self.node.attributes.pop(name, None)

    def integer(self, name: str, default: int = 0) -> int:
        """An integer attribute."""
        self._check_known(name)
        return self.node.attributes.get_int(name, default)

    def _check_known(self, name: str) -> None:
        attribute = self.node.attributes.get(name)
        if attribute is not None and attribute.is_ref():
            raise self.refuse(f"the calls of a function set its attribute {name!r}")

    def ints(self, values: Sequence[int]) -> ir.Value:
        """An int64 vector constant."""
        return self.builder.constant(np.array(values, dtype=np.int64))

    def set_input(self, index: int, value: ir.Value | None) -> None:
        """Sets an input, growing the node where needed."""
        if len(self.node.inputs) <= index:
            self.node.resize_inputs(index + 1)
        self.node.replace_input_with(index, value)

    def refuse(self, why: str) -> InputError:
        """The error of a node that cannot be converted."""
        return InputError(
            f"{self.node.op_type} of opset {self.version} cannot become opset {OPSET}: {why}",
            where=f"node {self.node.name!r}",
            mend="export the model again with opset 18 or newer",
        )


def _axes_to_input(up: Upgrade) -> None:
    axes = up.take("axes")
    if axes is not None:
        up.set_input(1, up.ints(axes.as_ints()))


def _split(up: Upgrade) -> None:
    sizes = up.take("split")
    if sizes is not None:
        up.set_input(1, up.ints(sizes.as_ints()))
    if len(up.node.inputs) < 2 or up.node.inputs[1] is None:
        up.node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(up.node.outputs))


def _slice(up: Upgrade) -> None:
    starts, ends, axes = up.take("starts"), up.take("ends"), up.take("axes")
    if starts is None or ends is None:
        raise up.refuse("it has no starts or ends")
    up.set_input(1, up.ints(starts.as_ints()))
    up.set_input(2, up.ints(ends.as_ints()))
    if axes is not None:
        up.set_input(3, up.ints(axes.as_ints()))


def _top_k(up: Upgrade) -> None:
    k = up.take("k")
    if k is None:
        raise up.refuse("it has no k")
    up.set_input(1, up.ints([k.as_int()]))


def _scalar(up: Upgrade, value: float) -> ir.Value:
    """A scalar of the node's element type."""
    source = up.node.inputs[0]
    dtype = source.dtype if source is not None and source.dtype is not None else ir.DataType.FLOAT
    try:
        return up.builder.constant(np.array(value, dtype=dtype.numpy()))
    except (OverflowError, ValueError) as error:
        raise up.refuse(f"{value} is no {dtype.name}") from error


def _clip(up: Upgrade) -> None:
    for index, name in ((1, "min"), (2, "max")):
        bound = up.take(name)
        if bound is not None:
            up.set_input(index, _scalar(up, bound.as_float()))


def _pad(up: Upgrade) -> None:
    pads, value = up.take("pads"), up.take("value")
    if pads is None:
        raise up.refuse("it has no pads")
    up.set_input(1, up.ints(pads.as_ints()))
    if value is not None:
        up.set_input(2, _scalar(up, value.as_float()))


def _softmax(up: Upgrade) -> None:
    """Before 13 the input was coerced to two dimensions at `axis` (default 1)."""
    node, source = up.node, up.node.inputs[0]
    assert source is not None
    axis = up.integer("axis", 1)
    rank = len(source.shape) if source.shape is not None else None
    if axis == -1 or axis + 1 == rank:
        node.attributes["axis"] = ir.AttrInt64("axis", -1)
        return
    shape = up.builder.op("Shape", [source])
    flat = up.builder.op("Flatten", [source], {"axis": axis})
    soft = up.builder.op(node.op_type, [flat], {"axis": -1})
    up.builder.replace(node, [up.builder.op("Reshape", [soft, shape])])


def _dropout(up: Upgrade) -> None:
    """At inference Dropout is the identity; its mask is all true since 12, as in ONNX Runtime."""
    node = up.node
    training = node.inputs[2] if len(node.inputs) > 2 else None
    constant = training.const_value if training is not None else None
    if training is not None and (constant is None or bool(np.any(constant.numpy()))):
        raise up.refuse("it is in training mode")
    source = node.inputs[0]
    assert source is not None
    results = [up.builder.op("Identity", [source])]
    if len(node.outputs) > 1:
        shape = up.builder.op("Shape", [source])
        mask = ir.tensor(np.array([up.version >= 12]))
        results.append(up.builder.op("ConstantOfShape", [shape], {"value": mask}))
    up.builder.replace(node, results)


def _batch_norm(up: Upgrade) -> None:
    spatial, mode = up.take("spatial"), up.integer("training_mode")
    if mode or len(up.node.outputs) > 1 or (spatial is not None and not spatial.as_int()):
        raise up.refuse("it is in training mode or not per channel")


def _mod(up: Upgrade) -> None:
    """Since 28 real numbers have a remainder with the sign of the divisor as well."""
    a, b = up.node.inputs[:2]
    real = any(v is not None and v.dtype is not None and v.dtype.is_floating_point()
               for v in (a, b))  # fmt: skip
    if not real or up.integer("fmod"):
        return
    build = up.builder
    rest = build.op("Mod", [a, b], {"fmod": 1})
    signs = build.op("Mul", [build.op("Sign", [rest]), build.op("Sign", [b])])
    against = build.op("Equal", [signs, _scalar(up, -1.0)])
    build.replace(up.node, [build.op("Where", [against, build.op("Add", [rest, b]), rest])])


def _scatter(up: Upgrade) -> None:
    up.node.op_type = "ScatterElements"


def _upsample(up: Upgrade) -> None:
    """Upsample, and Resize of opset 10, count from the corner and round down."""
    node, scales, given_mode = up.node, up.take("scales"), up.take("mode")
    mode = "nearest" if given_mode is None else given_mode.as_string()
    if mode not in ("nearest", "linear", "bilinear"):
        raise up.refuse(f"its mode {mode!r} is not known")
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if scales is not None:
        given = up.builder.constant(np.array(scales.as_floats(), np.float32))
    if given is None:
        raise up.refuse("it has no scales")
    known = given.const_value
    if mode == "nearest" and (known is None or bool((known.numpy() < 1).any())):
        raise up.refuse("nearest to fewer points, whose rounding changed")
    attributes = {
        "mode": mode.removeprefix("bi"),
        "coordinate_transformation_mode": "asymmetric",
        "nearest_mode": "floor",
    }
    results = [up.builder.op("Resize", [node.inputs[0], None, given], attributes)]
    up.builder.replace(node, results)


def _refuse(up: Upgrade) -> None:
    raise up.refuse("its meaning changed and no transformer needs it")


@dataclass(frozen=True)
class Change:
    """An operator whose meaning changed in opset `since`, and how to mend an older node."""

    since: int
    mend: Callable[[Upgrade], None]


_REDUCTIONS_18 = [
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceSumSquare",
]

_NEWEST = 28
"""The newest opset that is read; what changed after `OPSET` and cannot be said in it is refused."""

CHANGES: dict[str, tuple[Change, ...]] = {
    "Slice": (Change(10, _slice),),
    "TopK": (Change(10, _top_k),),
    "Clip": (Change(11, _clip),),
    "Pad": (Change(11, _pad),),
    "Scatter": (Change(11, _scatter),),
    "Squeeze": (Change(13, _axes_to_input),),
    "Unsqueeze": (Change(13, _axes_to_input),),
    "ReduceSum": (Change(13, _axes_to_input),),
    "Softmax": (Change(13, _softmax),),
    "LogSoftmax": (Change(13, _softmax),),
    "Hardmax": (Change(13, _softmax),),
    "BatchNormalization": (Change(15, _batch_norm),),
    "Split": (Change(18, _split),),
    "Mod": (Change(_NEWEST + 1, _mod),),
    "Upsample": (Change(OPSET, _upsample),),
    "Resize": (Change(11, _upsample),),
    "RoiAlign": (Change(16, _refuse),),
    "GridSample": (Change(20, _refuse),),
    "DFT": (Change(20, _refuse),),
    "Dropout": (Change(OPSET + 1, _dropout),),
    **{name: (Change(18, _axes_to_input),) for name in _REDUCTIONS_18},
}
"""Operator -> what must be mended on nodes older than `since`, oldest first."""


def upgrade(graph: ir.Graph | ir.Function, version: int, builder: Builder) -> None:
    """Brings the standard operators of `graph` from opset `version` to ours, in place."""
    for node in list(graph):
        if node.domain not in ("", "ai.onnx"):
            continue
        for change in CHANGES.get(node.op_type, ()):
            if version < change.since:
                builder.at(node)
                change.mend(Upgrade(node, version, builder))
    graph.opset_imports[""] = OPSET
