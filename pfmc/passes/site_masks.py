"""Decides what mask one attention hands to the operator: none, a plain one, or a bias."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from pfmc.ir import matcher, shapes
from pfmc.ir.shapes import Shapes
from pfmc.passes.attention_site import Site
from pfmc.passes.masks import BIASES, BLOCKED, Finding, explicit, probe
from pfmc.passes.plain_masks import MaskMaker
from pfmc.passes.scores import HIDDEN, Part, filling


class SiteMasks:
    """The masks of a graph's attentions; equal ones are made once.

    Args:
        graph: the graph; known: its shapes; seed: of the random paddings that masks are tried with.
    """

    def __init__(self, graph: ir.Graph, known: Shapes, seed: int) -> None:
        self.graph, self.known, self.seed = graph, known, seed
        self.findings: dict[tuple[ir.Value, object, object], Finding] = {}
        self.plain: dict[tuple[ir.Value, object, int], ir.Value] = {}
        self.made: dict[tuple[object, ...], ir.Value] = {}

    def decide(self, site: Site, aligned: bool) -> tuple[ir.Value | None, Finding]:
        """The mask to hand to the operator, and what it means.

        Unless `aligned` (as many keys as queries, or the past handed over apart) the operator
        would count positions from another end than the mask, which then stays.
        """
        if not site.scores.masks:
            return None, Finding("none")
        whole = self.combine(site.scores.masks, site)
        finding = self._find(whole, site)
        if finding.causal and not aligned:
            return self._full(site, whole), explicit("keys and queries are not aligned")
        if finding.kind in ("none", "causal"):
            return None, finding
        if finding.padding is not None and site.q.dtype in (None, ir.DataType.FLOAT):
            return self._padding(site, finding.padding, finding.window), finding
        if finding.kind == "explicit" and not finding.window:
            return self._bias(site, whole, finding, aligned)
        return self._full(site, whole), finding

    def sunk(self, site: Site) -> tuple[ir.Value, Finding]:
        """The whole mask of an attention with a sink, plain if it can be, and what it means."""
        whole = self.combine(site.scores.masks, site)
        finding = self._find(whole, site)
        queries, keys = self.lengths(site)
        source = finding.padding
        if source is None or not finding.causal or queries != keys:
            return whole, finding
        key = (source, queries, -1 - finding.window)
        if key not in self.plain:
            maker = MaskMaker(self.graph, source, site.scores.nodes)
            self.plain[key] = maker.make(queries, finding.window, causal=True)
        return self.plain[key], finding

    def _find(self, mask: ir.Value, site: Site) -> Finding:
        queries, keys = self.lengths(site)
        key = (mask, queries, keys)
        if key not in self.findings:
            self.findings[key] = probe(mask, queries, keys, self.known, self.seed)
        return self.findings[key]

    def lengths(self, site: Site) -> tuple[shapes.Dim, shapes.Dim]:
        """S and T."""
        dims = self.known.shape(site.scores.product.outputs[0])
        assert dims is not None
        return dims[-2], dims[-1]

    # -- a bias and what else is added --------------------------------------------------------

    def _bias(
        self, site: Site, whole: ir.Value, finding: Finding, aligned: bool
    ) -> tuple[ir.Value | None, Finding]:
        """Splits what is added into what is causal or plain padding, and the rest, a bias."""
        kept: list[Part] = []
        causal, biased, window, pads = False, False, 0, dict[ir.Value, None]()
        parts = [p for part in site.scores.masks for p in _terms(part)]
        for part in parts:
            found = self._find(self.combine((part,), site), site)
            settled = found.kind in ("none", "causal", "padding", "causal+padding")
            if (found.causal and not aligned) or not settled:
                kept.append(part)
                window = found.window if aligned else 0
                given = part.value.is_graph_input()
                biased = biased or given or found.reason in BIASES
                continue
            causal = causal or found.causal
            if found.padding is not None:
                pads[found.padding] = None
        if not biased:
            return self._full(site, whole), finding
        if len(kept) == len(parts):
            return self._full(site, whole), replace(finding, kind="bias")
        hidden = [Part(self._padding(site, p, 0)) for p in pads]
        mask = self.combine((*kept, *hidden), site) if kept or hidden else None
        kind = "causal+bias" if causal else "bias"
        return (
            None if mask is None else self._full(site, mask),
            Finding(kind, window, None, f"a bias is added: {finding.reason}"),
        )

    # -- writing ------------------------------------------------------------------------------

    def combine(self, parts: tuple[Part, ...], site: Site) -> ir.Value:
        """One value to add to the scores in place of `parts`."""
        key = tuple((p.value, p.kind, p.factor) for p in parts)
        if key not in self.made:
            self.made[key] = self._written(parts, site)
        return self.made[key]

    def _written(self, parts: tuple[Part, ...], site: Site) -> ir.Value:
        total: ir.Value | None = None
        for part in parts:
            if part.kind == "add":
                value = part.value
                if part.factor != 1.0:
                    value = self._insert("Mul", [value, self._number(part.factor, site)], site)
                total = value if total is None else self._insert("Add", [total, value], site)
                continue
            rest = self._number(0.0, site) if total is None else total
            low = self._number(BLOCKED, site)
            pair = (low, rest) if part.kind == "hide" else (rest, low)
            total = self._insert("Where", [part.value, *pair], site)
        assert total is not None
        return total

    def _full(self, site: Site, mask: ir.Value) -> ir.Value:
        """The mask with the rows and columns that the operator demands."""
        dims = self.known.shape(mask)
        lengths = self.lengths(site)
        if dims is not None and len(dims) > 1 and dims[-2:] == lengths:
            return mask
        key = (mask, "full", lengths)
        if key not in self.made:
            q, kt = site.scores.product.inputs
            rows = self._insert("Shape", [q], site, start=2, end=3)
            columns = self._insert("Shape", [kt], site, start=3, end=4)
            ones = matcher.add_array(self.graph, "mask:ones", np.ones(2, np.int64))
            size = self._insert("Concat", [ones, rows, columns], site, axis=0)
            self.made[key] = self._insert("Expand", [mask, size], site)
            front = dims[-4:-2] if dims is not None else ()
            self.known.learn(self.made[key], (*(1,) * (2 - len(front)), *front, *lengths))
        return self.made[key]

    def _padding(self, site: Site, source: ir.Value, window: int) -> ir.Value:
        """``[B, 1, S, T]``: zero where `source` ``[B, T]`` is not zero, else the lowest float."""
        queries, _ = self.lengths(site)
        key = (source, queries, window)
        if key not in self.plain:
            maker = MaskMaker(self.graph, source, site.scores.nodes)
            self.plain[key] = maker.make(queries, window)
        return self.plain[key]

    def _number(self, number: float, site: Site) -> ir.Value:
        kind = np.float64 if site.q.dtype == ir.DataType.DOUBLE else np.float32
        return matcher.add_array(self.graph, "mask:number", np.asarray(number, kind))

    def _insert(
        self, op_type: str, inputs: list[ir.Value | None], site: Site, **options: int
    ) -> ir.Value:
        at, origin = site.root, site.scores.product
        node = matcher.fresh(op_type, inputs, options)
        matcher.inherit(node, [origin], origin)
        output = node.outputs[0]
        output.name = matcher.unique_name(self.graph, f"{origin.outputs[0].name}:{op_type}")
        self.graph.insert_before(at, [node])
        dims = [self.known.shape(v) for v in inputs]
        if op_type in ("Add", "Mul", "Where") and all(d is not None for d in dims):
            joined = shapes.broadcast([d for d in dims if d is not None])
            if joined is not None:
                self.known.learn(output, joined)
        return output


_MOST_SUMS = 8


def _terms(part: Part, depth: int = 0) -> list[Part]:
    """The parts that a sum is made of; a part that is no sum, or too far down in one, itself."""
    if depth > _MOST_SUMS:
        return [part]
    filled = matcher.producer(part.value, "Where") if part.kind == "add" else None
    found = filling(filled) if filled is not None else None
    if found is not None and found[1].low * part.factor <= HIDDEN:
        rest, hidden = found
        return [*_terms(replace(part, value=rest), depth + 1), hidden]
    node = matcher.producer(part.value, "Add") if part.kind == "add" else None
    if node is None:
        return [part]
    terms = [replace(part, value=v) for v in node.inputs if v is not None]
    return [t for term in terms for t in _terms(term, depth + 1)]
