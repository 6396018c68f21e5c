"""Writes plain attention masks: from a padding input, with or without a sliding window."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pfmc.ir import matcher, shapes
from pfmc.passes.attention_site import RefusedError

LOWEST = float(np.finfo(np.float32).min)


class MaskMaker:
    """Writes the plain mask of a padding input at the head of the graph."""

    def __init__(self, graph: ir.Graph, source: ir.Value, origin: tuple[ir.Node, ...]) -> None:
        self.graph, self.source, self.origin = graph, source, origin
        self.nodes: list[ir.Node] = []

    def make(self, queries: shapes.Dim, window: int, causal: bool = False) -> ir.Value:
        """Zero where the source is not zero (and within the window), else the lowest float.

        Args:
            queries: S; window: positions seen, 0 for all.
            causal: whether the mask itself hides later positions.
        """
        rows = self._rows(queries)
        axes = self._constant("axes", np.asarray([1, 2], np.int64))
        shown = self.source
        if self.source.dtype != ir.DataType.BOOL:
            shown = self._node("Cast", [shown], to=int(ir.DataType.BOOL))
        shown = self._node("Unsqueeze", [shown, axes])
        if window or causal:
            shown = self._node("And", [shown, self._within(rows, window, causal)])
        low = self._constant("low", np.asarray(LOWEST, np.float32))
        mask = self._node("Where", [shown, self._constant("zero", np.asarray(0, np.float32)), low])
        if not window and not causal:
            one = self._constant("one", np.asarray([1], np.int64))
            shape = self._node("Concat", [one, one, rows, one], axis=0)
            mask = self._node("Expand", [mask, shape])
        self.graph.insert_before(next(iter(self.graph)), self.nodes)
        return mask

    def _node(self, op_type: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        node = matcher.fresh(op_type, inputs, attributes)
        matcher.inherit(node, list(self.origin), self.origin[0])
        name = matcher.unique_name(self.graph, f"{self.source.name}:{op_type}")
        node.outputs[0].name = name
        self.nodes.append(node)
        return node.outputs[0]

    def _constant(self, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
        return matcher.add_array(self.graph, f"{self.source.name}:{name}", np.asarray(array))

    def _rows(self, queries: shapes.Dim) -> ir.Value:
        """The vector ``[S]``."""
        if isinstance(queries, int):
            return self._constant("rows", np.asarray([queries], np.int64))
        home = next(
            (h for n, h in shapes.homes(self.graph).items() if shapes.symbol(n) == queries), None
        )
        if home is None:
            raise RefusedError("the number of queries is not a dimension of an input")
        return self._node("Shape", [home[0]], start=home[1], end=home[1] + 1)

    def _within(self, rows: ir.Value, window: int, causal: bool) -> ir.Value:
        """``[S, T]``: whether the key is less than `window` positions behind, and not ahead."""
        first = self._constant("first", np.asarray([0], np.int64))
        zero, one = (
            self._constant(n, np.asarray(i, np.int64)) for i, n in enumerate(("from", "by"))
        )
        columns = self._node("Shape", [self.source], start=1, end=2)
        past = self._node("Squeeze", [self._node("Sub", [columns, rows]), first])
        end = self._node("Squeeze", [columns, first])
        keys = self._node("Range", [zero, end, one])
        own = self._node(
            "Unsqueeze",
            [
                self._node("Range", [past, end, one]),
                self._constant("last", np.asarray([1], np.int64)),
            ],
        )
        behind = self._node("Sub", [own, keys])
        seen = [
            self._node("Less", [behind, self._constant("window", np.asarray(window, np.int64))])
        ] if window else []  # fmt: skip
        if causal:
            seen.append(self._node("GreaterOrEqual", [behind, zero]))
        return seen[0] if len(seen) == 1 else self._node("And", list(seen))
