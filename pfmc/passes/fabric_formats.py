"""Number formats of the digital fabric: what attention, KV memory and embeddings hold in integers.

The cost report prices them at these widths, so the simulated model has them too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from pfmc.ir import matcher, provenance, vocabulary
from pfmc.ir.vocabulary import DOMAIN, Stage
from pfmc.passes.base import Context, Pass, PassResult

_OPERANDS = (0, 1, 2)  # q, k and v of Attention


@dataclass(frozen=True)
class FabricFormats(Pass):
    """QUANTISED -> QUANTISED with the fabric's widths made explicit.

    ``Attention(q, k, v)`` -> ``Attention`` of ``QuantiseToken`` of each: one scale for every
    position and head, so the KV memory holds integers. ``Gather(table, ids)`` of a constant real
    matrix -> ``QuantiseToken`` of it: the table's rows are stored as integers with a scale each.
    Nothing is changed where `Limits.fabric_bits` is 0.
    """

    name: ClassVar[str] = "fabric-formats"
    needs: ClassVar[Stage] = Stage.QUANTISED
    gives: ClassVar[Stage] = Stage.QUANTISED

    def apply(self, model: ir.Model, context: Context) -> PassResult:
        """Puts a `QuantiseToken` in front of every integer operand and behind every table."""
        bits = 0 if context.limits is None else context.limits.fabric_bits
        if not bits:
            return PassResult(model, 0)
        top = float(2 ** (bits - 1) - 1)
        made: dict[ir.Value, ir.Value] = {}
        for node in list(model.graph):
            if vocabulary.is_op(node, "Attention"):
                for index in _OPERANDS:
                    _round_operand(model.graph, node, index, top, made)
            elif _reads_table(node):
                _round_output(model.graph, node, top)
        vocabulary.install(model)
        count = sum(vocabulary.is_op(n, vocabulary.QUANTISE_TOKEN, DOMAIN) for n in model.graph)
        return PassResult(model, len(made), (), {"bits": bits, "per_position_scales": count})


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


def _round_output(graph: ir.Graph, node: ir.Node, top: float) -> None:
    read = node.outputs[0]
    uses = list(read.uses())
    rounding = _rounding(graph, read, node, top)
    graph.insert_after(node, rounding)
    for use in uses:
        use.node.replace_input_with(use.idx, rounding.outputs[0])
