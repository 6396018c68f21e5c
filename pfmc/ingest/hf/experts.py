"""Mixtures of experts: a router, one fixed linear for each expert's product, rows sent and fetched.

The weights stay where they are and the rows travel: the rows of expert i go through its products
and back to their places, and each token sums its k results by the router's scores (Shazeer et al.
2017, arXiv:1701.06538). Experts of a checkpoint lie apart, or in one stack of matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from pfmc.ingest.hf import blocks
from pfmc.ingest.hf.blocks import BOOL, FLOAT, INT
from pfmc.ingest.hf.graph import Dims, Graph, dims, width

ROWS, PICKED = "rows", "rows * chosen"


@dataclass(frozen=True)
class Experts:
    """The experts of a model.

    Attributes:
        count, chosen: how many there are, and how many a token uses.
        inner: width of an expert.
        layers: which layers have them.
        router: the router's module below the block; names: of gate, up and down of an expert.
        place: the experts' modules below the block, ``{}`` being the number.
        scores: ``softmax`` over all experts, ``normed`` to the chosen ones' sum, or ``chosen``
            for a softmax over the chosen ones.
        shared: width of the expert that all tokens use, 0 for none; it has a gate of its own.
        clamp: GPT-OSS's limit on gate and up, whose columns alternate in one stack with biases;
            0 for experts that lie apart; slope: of its sigmoid.
    """

    count: int
    chosen: int
    inner: int
    layers: frozenset[int]
    router: str = "gate"
    place: str = "experts.{}"
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    scores: str = "normed"
    shared: int = 0
    clamp: float = 0.0
    slope: float = 1.702


def block(g: Graph, x: ir.Value, at: str, e: Experts, kind: str) -> ir.Value:
    """The mixture at module `at` for ``x[B, S, D]``; `kind` is the gate's activation."""
    hidden = width(x)
    flat = g.op("Reshape", [x, g.integers(-1, hidden)], (ROWS, hidden), at)
    which, scores = _route(g, flat, at, e)
    rows = _rows(g, which, e, at)
    y = _stacked(g, flat, at, e, rows) if e.clamp else _apart(g, flat, at, e, rows, kind)
    y = g.op("Reshape", [y, g.integers(-1, e.chosen, hidden)], (ROWS, e.chosen, hidden), at)
    weights = g.op("Unsqueeze", [scores, g.integers(-1)], (ROWS, e.chosen, 1), at)
    y = g.op("Mul", [y, weights], dims(y), at)
    y = g.op("ReduceSum", [y, g.integers(1)], (ROWS, hidden), at, keepdims=0)
    if e.shared:
        y = blocks.add(g, y, _shared(g, flat, at, e, kind), at)
    shape = g.op("Shape", [x], (3,), at, kind=INT)
    return g.op("Reshape", [y, shape], dims(x), at)


def _route(g: Graph, x: ir.Value, at: str, e: Experts) -> tuple[ir.Value, ir.Value]:
    """Which experts a row uses, and with what scores, ``[rows, chosen]`` each."""
    biased = bool(e.clamp)
    logits = g.linear(x, f"{at}.{e.router}", e.count, bias=biased)
    own, top = f"{at}.{e.router}", (ROWS, e.chosen)
    if e.scores == "chosen":
        best, which = _top(g, logits, e, own)
        return which, g.op("Softmax", [best], top, own, axis=-1)
    chances = g.op("Softmax", [logits], dims(logits), own, axis=-1)
    best, which = _top(g, chances, e, own)
    if e.scores == "normed":
        whole = g.op("ReduceSum", [best, g.integers(-1)], (ROWS, 1), own, keepdims=1)
        best = g.op("Div", [best, whole], top, own)
    return which, best


def _top(g: Graph, x: ir.Value, e: Experts, at: str) -> tuple[ir.Value, ir.Value]:
    shape: Dims = (ROWS, e.chosen)
    best, which = g.ops("TopK", [x, g.integers(e.chosen)], (shape, shape), at, axis=-1)
    which.type = ir.TensorType(INT)
    return best, which


@dataclass(frozen=True)
class _Rows:
    """Of each expert: places of its rows among all picked ones, and the tokens they belong to."""

    places: list[ir.Value]
    tokens: list[ir.Value]
    back: ir.Value
    count: ir.Value


def _rows(g: Graph, which: ir.Value, e: Experts, at: str) -> _Rows:
    flat = g.op("Reshape", [which, g.integers(-1)], (PICKED,), at, kind=INT)
    chosen = g.constant(np.asarray(e.chosen, np.int64), f"pfmc/chosen_{e.chosen}")
    places, tokens = [], []
    for i in range(e.count):
        one, some = g.constant(np.asarray(i, np.int64), f"pfmc/expert_{i}"), f"{at}.rows.{i}"
        hit = g.op("Equal", [flat, one], (PICKED,), at, kind=BOOL)
        found = g.op("NonZero", [hit], (1, some), at, kind=INT)
        places.append(g.op("Squeeze", [found, g.integers(0)], (some,), at, kind=INT))
        tokens.append(g.op("Div", [places[-1], chosen], (some,), at, kind=INT))
    joined = g.op("Concat", places, (PICKED,), at, kind=INT, axis=0)
    back = g.op("Unsqueeze", [joined, g.integers(1)], (PICKED, 1), at, kind=INT)
    return _Rows(places, tokens, back, g.op("Shape", [flat], (1,), at, kind=INT))


def _fetch(g: Graph, x: ir.Value, rows: ir.Value, at: str) -> ir.Value:
    return g.op("Gather", [x, rows], (dims(rows)[0], width(x)), at, axis=0)


def _return(g: Graph, parts: list[ir.Value], rows: _Rows, at: str) -> ir.Value:
    """The experts' results at their places, ``[picked, width]``."""
    wide = width(parts[0])
    shape = g.op("Concat", [rows.count, g.integers(wide)], (2,), at, kind=INT, axis=0)
    empty = g.op("Expand", [g.number(0.0, "zero"), shape], (PICKED, wide), at)
    joined = g.op("Concat", parts, (PICKED, wide), at, axis=0)
    return g.op("ScatterND", [empty, rows.back, joined], (PICKED, wide), at)


def _apart(g: Graph, x: ir.Value, at: str, e: Experts, rows: _Rows, kind: str) -> ir.Value:
    """Experts of three matrices each."""
    modules = [f"{at}.{e.place.format(i)}" for i in range(e.count)]
    gates, ups = [], []
    for own, tokens in zip(modules, rows.tokens, strict=True):
        part = _fetch(g, x, tokens, own)
        gates.append(_product(g, part, f"{own}.{e.names[0]}", e.inner))
        ups.append(_product(g, part, f"{own}.{e.names[1]}", e.inner))
    gate, up = _return(g, gates, rows, at), _return(g, ups, rows, at)
    inner = blocks.gated(g, gate, up, kind, at)
    outs = [
        _product(g, _fetch(g, inner, places, own), f"{own}.{e.names[2]}", width(x))
        for own, places in zip(modules, rows.places, strict=True)
    ]
    return _return(g, outs, rows, at)


def _product(g: Graph, x: ir.Value, at: str, outputs: int) -> ir.Value:
    """An expert's fixed linear: no module of transformers has its output."""
    return g.linear(x, at, outputs, bias=False, observed=False)


def _stacked(g: Graph, x: ir.Value, at: str, e: Experts, rows: _Rows) -> ir.Value:
    """GPT-OSS's experts: slices of stacks ``[experts, in, out]``, and of stacks of biases."""
    own, hidden = f"{at}.experts", width(x)
    both = [
        g.expert(_fetch(g, x, tokens, own), own, "gate_up_proj", i, e.count, 2 * e.inner)
        for i, tokens in enumerate(rows.tokens)
    ]
    y = _clamped(g, _return(g, both, rows, at), e, at)
    outs = [
        g.expert(_fetch(g, y, places, own), own, "down_proj", i, e.count, hidden)
        for i, places in enumerate(rows.places)
    ]
    return _return(g, outs, rows, at)


def _clamped(g: Graph, both: ir.Value, e: Experts, at: str) -> ir.Value:
    """``(up + 1) * gate * sigmoid(slope * gate)``, gate and up clamped."""
    shape: Dims = (PICKED, e.inner)
    pairs = g.op("Reshape", [both, g.integers(0, e.inner, 2)], (PICKED, e.inner, 2), at)
    zero, one = (g.constant(np.asarray(i, np.int64), f"pfmc/index_{i}") for i in (0, 1))
    gate, up = (g.op("Gather", [pairs, i], shape, at, axis=-1) for i in (zero, one))
    high, low = g.number(e.clamp, f"limit_{e.clamp:g}"), g.number(-e.clamp, f"limit_-{e.clamp:g}")
    gate = g.op("Min", [gate, high], shape, at)
    up = g.op("Clip", [up, low, high], shape, at)
    raised = g.op("Add", [up, g.number(1.0, "one")], shape, at, kind=FLOAT)
    gain = g.op("Sigmoid", [blocks.scaled(g, gate, e.slope, at)], shape, at)
    return g.op("Mul", [raised, g.op("Mul", [gate, gain], shape, at)], shape, at)


def _shared(g: Graph, x: ir.Value, at: str, e: Experts, kind: str) -> ir.Value:
    """Qwen2-MoE's expert for all tokens, and its gate."""
    own = f"{at}.shared_expert"
    gate, up = (g.linear(x, f"{own}.{n}", e.shared, bias=False) for n in e.names[:2])
    y = g.linear(blocks.gated(g, gate, up, kind, own), f"{own}.{e.names[2]}", width(x), bias=False)
    share = g.linear(x, f"{at}.shared_expert_gate", 1, bias=False)
    share = g.op("Sigmoid", [share], dims(share), own)
    return g.op("Mul", [y, share], dims(y), own)
