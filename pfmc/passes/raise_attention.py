"""Raises softmax attention to the standard ``Attention`` operator with native grouped heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from pfmc.ir import matcher
from pfmc.ir.shapes import Shapes
from pfmc.passes import plain_scores
from pfmc.passes.attention_site import RefusedError, Site, read
from pfmc.passes.base import Context, Declined, Pass, PassResult
from pfmc.passes.lift_products import lift
from pfmc.passes.masks import (
    KEY_MASK,
    KEY_SINK,
    KEY_WINDOW,
    Finding,
    Probe,
    marks_empty_rows,
)
from pfmc.passes.rules import where
from pfmc.passes.site_masks import SiteMasks


@dataclass(frozen=True)
class RaiseAttention(Pass):
    """Raises softmax attention.

    ``Softmax(s q' @ k'ᵀ + mask) @ v'`` -> ``Attention(q, k, v[, mask]; scale, is_causal)``, 4-D,
    where k' and v' are k and v, or k and v with each head repeated for its group of query heads.
    Scalings of q, of k and of the scores are gathered in `scale`. Whatever Reshape, Transpose,
    Expand and Unsqueeze lie between k and k' are proved to be that repetition (and transposition)
    by moving numbered elements through them. A guard that turns NaN into zero is dropped.

    ``cap * tanh(s / cap)`` around the scores becomes `softcap`. A sink, a score that takes part in
    the softmax without a value, becomes one key and one value of zeros more, whose column of the
    then explicit mask holds the sink's score (``pfmc.sink``).

    The mask is computed, not matched (`pfmc.passes.masks`). Proven causal: ``is_causal=1``.
    Proven to hide the columns of a graph input: one plain mask of that input, shared by all
    layers. Of a sum whose other terms are so proven, the rest stays as a bias (ALiBi, T5's and
    DeBERTa's relative positions, Swin). Else it stays as it is. ``pfmc.mask`` tells. Scores that
    are filled with a very low number count as masked; products on flattened heads
    ``[B * H, S, T]`` are brought into four dimensions first. In rows where padding hides everything
    (padded queries, which nobody reads) the result may differ from the source.
    """

    name: ClassVar[str] = "raise-attention"

    def apply(self, model: ir.Model, context: Context) -> PassResult:
        """Visits every softmax of the graph."""
        work = _Work(model.graph, context.seed)
        declined: list[Declined] = []
        for node in [n for n in model.graph if n.op_type == "Softmax"]:
            try:
                work.start(node)
            except RefusedError as refusal:
                declined.append(Declined(self.name, where(node), str(refusal)))
        if work.unsorted:
            model.graph.sort()
        declined.extend(Declined(self.name, at, reason) for at, reason in work.remarks)
        return PassResult(model, work.changed, tuple(declined), {**work.counts})


def _leads_to(value: ir.Value, end: ir.Node) -> bool:
    """Whether some reader of `value`, or a reader of its results, and so on, is `end`."""
    queue, seen = [use.node for use in value.uses()], set[ir.Node]()
    for node in queue:
        if node is end:
            return True
        if node not in seen:
            seen.add(node)
            queue.extend(use.node for out in node.outputs for use in out.uses())
    return False


class _Work:
    def __init__(self, graph: ir.Graph, seed: int) -> None:
        self.graph, self.seed = graph, seed
        self.shapes = Shapes(graph)
        self.masks = SiteMasks(graph, self.shapes, seed)
        self.empty: dict[object, bool] = {}
        self.counts: dict[str, int] = {}
        self.remarks: list[tuple[str, str]] = []
        self.changed = 0
        self.unsorted = False  # whether a reader of joined keys may stand before the attention

    def start(self, softmax: ir.Node) -> None:
        """Raises one attention, on four dimensions, or raises `RefusedError`."""
        self.changed += plain_scores.tidy(softmax, self.shapes)
        lifted = lift(softmax, self.shapes)
        self.changed += lifted is not None
        self.visit(lifted or softmax)

    def visit(self, softmax: ir.Node) -> None:
        """Raises one attention or raises `RefusedError`."""
        site = read(softmax, self.shapes)
        if site.sink is not None:
            self._visit_sunk(softmax, site, site.sink)
            return
        memory = self._memory(site)
        queries, keys = self.masks.lengths(site)
        mask, finding = self.masks.decide(site, aligned=memory is not None or queries == keys)
        before: list[ir.Node] = []
        k, v = site.k, site.v
        if site.perm is not None:
            before.append(matcher.fresh("Transpose", [k], {"perm": site.perm}))
            k = before[0].outputs[0]
        past: list[ir.Value | None] = []
        if memory is not None:
            (past_k, k), (past_v, v) = memory
            past = [past_k, past_v]
        inputs = [site.q, k, v, *([mask, *past] if past or mask is not None else [])]
        options = _options(site, finding.causal)
        node = matcher.fresh("Attention", inputs, options, outputs=3 if past else 1)
        _describe(node, finding)
        if finding.reason:
            self.remarks.append((where(softmax), f"mask kept explicit: {finding.reason}"))
        self._put(site, [*before, node], (site.k, site.v) if past else ())
        self._drop_guard(node, Probe(finding, (queries, keys), self.shapes, self.seed))
        self.counts[finding.kind] = self.counts.get(finding.kind, 0) + 1
        self.changed += 1

    def _visit_sunk(self, softmax: ir.Node, site: Site, sink: ir.Value) -> None:
        """Raises one attention with a sink."""
        if not site.scores.masks:
            raise RefusedError("an attention with a sink and no mask")
        mask, finding = self.masks.sunk(site)
        new: list[ir.Node] = []

        def add(op_type: str, inputs: list[ir.Value], **options: object) -> ir.Value:
            new.append(matcher.fresh(op_type, inputs, options))
            return new[-1].outputs[0]

        k = site.k if site.perm is None else add("Transpose", [site.k], perm=site.perm)
        name = str(site.output.name)
        ends = matcher.add_array(self.graph, f"{name}:end", np.asarray([0] * 6 + [1, 0], np.int64))
        k, v = add("Pad", [k, ends]), add("Pad", [site.v, ends])
        mask = add("Expand", [mask, add("Shape", [sink])])
        mask = add("Concat", [mask, sink], axis=-1)
        new.append(matcher.fresh("Attention", [site.q, k, v, mask], _options(site, False)))
        _describe(new[-1], finding)
        new[-1].metadata_props[KEY_SINK] = "1"
        reason = "an attention sink: its score stands in the mask"
        self.remarks.append((where(softmax), f"mask kept explicit: {reason}"))
        self._put(site, new, ())
        self.counts["sink"] = self.counts.get("sink", 0) + 1
        self.changed += 1

    def _put(self, site: Site, new: list[ir.Node], joined: tuple[ir.Value, ...]) -> None:
        """Puts the new nodes in place; the joined keys and values become present outputs."""
        node, dims = new[-1], self.shapes.shape(site.output)
        matcher.substitute(site.root, site.nodes, new, site.output, node.outputs[0])
        if dims is not None:
            self.shapes.learn(node.outputs[0], dims)
        for value, present in zip(joined, node.outputs[1:], strict=False):
            maker = value.producer()
            assert maker is not None
            if _leads_to(value, node):  # what is joined is read on the way to this attention
                continue
            self.unsorted |= bool(value.uses())
            matcher.inherit(node, [maker], node)
            known = self.shapes.shape(value)
            matcher.take_place(self.graph, value, present)
            matcher.remove_dead(self.graph, [maker])
            if known is not None:
                self.shapes.learn(present, known)

    def _memory(self, site: Site) -> tuple[tuple[ir.Value, ir.Value], ...] | None:
        """(past, new) of keys and of values that are joined along the positions."""
        if site.perm is not None:
            return None
        pairs = [_joined(value, self.shapes) for value in (site.k, site.v)]
        for value in (site.k, site.v):
            if not self._only_feeds(value, site):
                return None
        ready = tuple(p for p in pairs if p is not None)
        return ready if len(ready) == 2 else None

    def _only_feeds(self, value: ir.Value, site: Site) -> bool:
        """Whether the readers of `value` are this attention's own and graph outputs."""
        own = set(site.nodes) | set(site.moves)
        return all(use.node in own for use in value.uses())

    def _drop_guard(self, node: ir.Node, found: Probe) -> None:
        """Drops ``Where(nothing is seen, 0, y)`` behind the attention."""
        output = node.outputs[0]
        uses = tuple(output.uses())
        if len(uses) != 1 or uses[0].node.op_type != "Where" or uses[0].idx != 2:
            return
        guard = uses[0].node
        if output.is_graph_output() or self.shapes.shape(guard.outputs[0]) is None or (
            self.shapes.shape(guard.outputs[0]) != self.shapes.shape(output)
        ):  # fmt: skip
            return
        flag = guard.inputs[0]
        if flag is None or matcher.scalar(guard.inputs[1]) != 0.0:
            return
        key = (flag, found.lengths, found.finding)
        if key not in self.empty:
            self.empty[key] = marks_empty_rows(flag, found)
        if self.empty[key]:
            matcher.inherit(node, [guard], node)
            matcher.take_place(self.graph, guard.outputs[0], output)
            matcher.remove_dead(self.graph, [guard])


def _options(site: Site, causal: bool) -> dict[str, object]:
    """The attributes of the operator."""
    options: dict[str, object] = {"scale": site.scale, "is_causal": int(causal)}
    return options | ({"softcap": site.scores.softcap} if site.scores.softcap else {})


def _describe(node: ir.Node, finding: Finding) -> None:
    node.metadata_props[KEY_MASK] = finding.kind
    if finding.window:
        node.metadata_props[KEY_WINDOW] = str(finding.window)


def _joined(value: ir.Value, known: Shapes) -> tuple[ir.Value, ir.Value] | None:
    """(past, new) if `value` ``[B, H, T, D]`` is a graph input and a new part, in this order."""
    node = value.producer()
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2:
        return None
    past, new = node.inputs
    if past is None or new is None or matcher.attribute(node, "axis") not in (2, -2):
        return None
    return (past, new) if past.is_graph_input() else None
