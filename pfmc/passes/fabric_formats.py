"""Number formats of the digital fabric: what attention, KV memory and embeddings hold in integers.

The cost report prices them at these widths, so the simulated model has them too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pfmc.ir import matcher, provenance, vocabulary
from pfmc.ir.vocabulary import DOMAIN, Stage
from pfmc.passes.base import Context, Pass, PassResult

_OPERANDS = (0, 1, 2)  # q, k and v of Attention
_FACTORS = (2, 3)  # down and up of SidePath


@dataclass(frozen=True)
class FabricFormats(Pass):
    """QUANTISED -> QUANTISED with the fabric's widths made explicit.

    ``Attention(q, k, v)`` -> ``Attention`` of ``QuantiseToken`` of each: one scale for every
    position and head, so the KV memory holds integers. ``Gather(table, ids)`` of a constant real
    matrix -> ``QuantiseToken`` of it: the table's rows are stored as integers with a scale each.
    ``SidePath(x, y, down, up)`` -> the same of ``QuantiseToken`` of x and of factors rounded to
    integers with a scale for each column.
    Nothing is changed where `Limits.fabric_bits` is 0.

    Attributes:
        kv_bits: width of k and v, which the KV memory holds; 0 for `Limits.fabric_bits`.
    """

    name: ClassVar[str] = "fabric-formats"
    needs: ClassVar[Stage] = Stage.QUANTISED
    gives: ClassVar[Stage] = Stage.QUANTISED

    kv_bits: int = 0

    def apply(self, model: ir.Model, context: Context) -> PassResult:
        """Puts a `QuantiseToken` in front of every integer operand and behind every table."""
        bits = 0 if context.limits is None else context.limits.fabric_bits
        if not bits:
            return PassResult(model, 0)
        top = _top(bits)
        held = _top(self.kv_bits or bits)
        made: dict[ir.Value, ir.Value] = {}
        stored: dict[ir.Value, ir.Value] = {} if held != top else made
        for node in list(model.graph):
            if vocabulary.is_op(node, "Attention"):
                for index in _OPERANDS:
                    of = (held, stored) if index else (top, made)
                    _round_operand(model.graph, node, index, *of)
            elif vocabulary.is_op(node, vocabulary.SIDE_PATH, DOMAIN):
                _round_adapter(model.graph, node, top, made)
            elif _reads_table(node):
                _round_output(model.graph, node, top)
        vocabulary.install(model)
        count = sum(vocabulary.is_op(n, vocabulary.QUANTISE_TOKEN, DOMAIN) for n in model.graph)
        changed = len(made) + (len(stored) if stored is not made else 0)
        notes: dict[str, float | int | str] = {"bits": bits, "per_position_scales": count}
        if self.kv_bits:
            notes["kv_bits"] = self.kv_bits
        return PassResult(model, changed, (), notes)


def _top(bits: int) -> float:
    return float(2 ** (bits - 1) - 1)


def _reads_table(node: ir.Node) -> bool:
    """Whether `node` reads rows of a constant real matrix (an embedding)."""
    if not vocabulary.is_op(node, "Gather") or node.attributes.get_int("axis", 0) != 0:
        return False
    table = node.inputs[0]
    tensor = None if table is None else table.const_value
    return tensor is not None and len(tensor.shape) == 2 and tensor.dtype.is_floating_point()


def _rounding(graph: ir.Graph, x: ir.Value, near: ir.Node, top: float) -> ir.Node:
    node = matcher.fresh(vocabulary.QUANTISE_TOKEN, [x], {"top": top}, domain=DOMAIN)
    output = node.outputs[0]
    output.name = matcher.unique_name(graph, f"{x.name}:stored")
    output.shape, output.type = x.shape, x.type
    node.name = f"{x.name}:stored"
    if scope := provenance.scope(near):
        node.metadata_props[vocabulary.KEY_SCOPE] = scope
    provenance.union_sources(node, [near])
    return node


def _round_operand(
    graph: ir.Graph, node: ir.Node, index: int, top: float, made: dict[ir.Value, ir.Value]
) -> None:
    x = node.inputs[index]
    if x is None:
        return
    if x not in made:
        rounding = _rounding(graph, x, node, top)
        graph.insert_before(node, rounding)
        made[x] = rounding.outputs[0]
    node.replace_input_with(index, made[x])


def _round_adapter(
    graph: ir.Graph, node: ir.Node, top: float, made: dict[ir.Value, ir.Value]
) -> None:
    """Rounds the input of a side path, as its fixed linear does where it can, and its factors."""
    x = node.inputs[0]
    assert x is not None
    for use in x.uses():
        same = vocabulary.is_op(use.node, vocabulary.QUANTISE_TOKEN, DOMAIN)
        if same and use.node.attributes["top"].value == top:
            made.setdefault(x, use.node.outputs[0])
    _round_operand(graph, node, 0, top, made)
    for index in _FACTORS:
        value = node.inputs[index]
        assert value is not None
        assert value.const_value is not None
        name = matcher.unique_name(graph, f"{value.name}:stored")
        rounded = matcher.add_initialiser(graph, name, _columns(value.const_value, name, top))
        node.replace_input_with(index, rounded)
        if not value.uses():
            graph.initializers.pop(str(value.name), None)


def rounded_columns(matrix: npt.NDArray[np.float32], top: float) -> npt.NDArray[np.float32]:
    """Each column rounded to codes of at most `top` times a scale of its own."""
    peak = np.abs(matrix).max(axis=0, keepdims=True)
    scale = np.where(peak > 0, peak, np.float32(1.0)) / np.float32(top)
    return np.asarray(np.round(matrix / scale) * scale, np.float32)


def _columns(tensor: ir.TensorProtocol, name: str, top: float) -> ir.LazyTensor:
    """A matrix rounded to codes of at most `top` times the scale of their column, when read."""

    def read() -> ir.TensorProtocol:
        return ir.tensor(rounded_columns(np.asarray(tensor.numpy(), np.float32), top), name=name)

    shape = ir.Shape([int(d) for d in tensor.shape.numpy()])
    return ir.LazyTensor(read, ir.DataType.FLOAT, shape, name=name)


def _round_output(graph: ir.Graph, node: ir.Node, top: float) -> None:
    read = node.outputs[0]
    uses = list(read.uses())
    rounding = _rounding(graph, read, node, top)
    graph.insert_after(node, rounding)
    for use in uses:
        use.node.replace_input_with(use.idx, rounding.outputs[0])
