"""Counts the dynamic work of a canonical or quantised model: one `FabricOp` a node, none lost.

Work keys, per position; each may also stand with the suffix ``_per_context`` (times the context):

``macs8`` products of two 8-bit numbers, summed (Q·K, dynamic MatMul) · ``macs16`` 16-bit
probability times 8-bit value, summed (A·V) · ``exps`` exponentials · ``adds`` additions and
comparisons · ``muls`` 16-bit products · ``table_reads`` 256-entry function tables · ``roots``
reciprocal or root of one number · ``kv_read_values``, ``kv_write_values`` numbers moved from and
to the KV memory · ``embedding_values`` numbers read from an embedding table · ``moved_values``
numbers sent to the next unit · ``control_ops`` integer or flag operations.

Two keys are not per position: ``kv_held_values`` numbers one user keeps in the KV memory, and
``stored_values`` fixed numbers stored with the operation (embedding tables, norm weights);
``adapter_held_values`` 8-bit numbers of an adapter or a correction in writable memory, all of them
read at every position (``adapter_read_values``); a gain or offset of 16 bits counts as two;
``beside`` marks what works at the same time as another (experts of one stack);
``linears`` says how many fixed linears share a requantised input, ``heads`` how many attend,
``window`` how many positions a local attention sees (`pfmc.targets.fabric.keys.at` keeps to it). A
soft-capped attention looks every score up in a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from pfmc.errors import InputError, InternalError
from pfmc.hardware import FabricOp
from pfmc.ir import routing, vocabulary
from pfmc.ir.probe import Growth, ShapeProbe, growth
from pfmc.targets.fabric.keys import BESIDE, PER_CONTEXT, SINK, WINDOW
from pfmc.targets.fabric.operators import (
    AT_LAST,
    CONTROL,
    PER_INPUT,
    PER_OUTPUT,
    VARIADIC,
    WIRING,
)

Shapes = Mapping[str, tuple[ShapeProbe, ...]]


def fabric_ops(model: ir.Model, shapes: Shapes) -> list[FabricOp]:
    """The dynamic operations of `model` and their work, in graph order.

    Fixed linears are left out: they are the target's. Where the model is a decoder, each output
    that a fixed linear makes adds a ``sampling`` operation (argmax over its last axis).

    Args:
        model: CANONICAL or QUANTISED; batch 1.
        shapes: value name -> its shapes at the trial runs (`pfmc.distill.shapes.probe_shapes`).

    Raises:
        InputError: operators whose work is unknown; the message names them with their nodes.
        InternalError: a value has no probed shape.
    """
    counter = _Counter(shapes, fixed_positions(model, shapes), _table_nodes(model))
    unknown = [n for n in model.graph if not _known(n)]
    if unknown:
        raise _unknown_error(unknown)
    nodes = [n for n in model.graph if not _fixed(n)]
    ops = [counter.op(n) for n in nodes]
    return [*_side_by_side(model, ops), *_sampling(model, counter)]


def _side_by_side(model: ir.Model, ops: list[FabricOp]) -> list[FabricOp]:
    """Experts' requantisers: the trial runs sent all rows to a few, so each gets an equal part.

    All but the first of a stack work at the same time as the first.
    """
    makers = {str(n.name): _maker(n) for n in vocabulary.fixed_linears(model)}
    found = {op.name: op for op in ops}
    done: set[str] = set()
    for names in routing.groups(model):
        mine = [m for m in dict.fromkeys(makers[n] for n in names) if m in found]
        if done.isdisjoint(mine) and mine:
            done.update(mine)
            found.update(_shared([found[m] for m in mine]))
    return [found[op.name] for op in ops]


def _maker(linear: ir.Node) -> str:
    """The name of the node that makes a fixed linear's input."""
    made = linear.inputs[0].producer() if linear.inputs[0] is not None else None
    return str(made.name) if made is not None else ""


def _shared(ops: Sequence[FabricOp]) -> dict[str, FabricOp]:
    keys = sorted({k for op in ops for k in op.work} - {"linears"})
    mean = {k: sum(op.work.get(k, 0.0) for op in ops) / len(ops) for k in keys}
    first = {k: v for k, v in ops[0].work.items() if k == "linears"}
    made = {ops[0].name: replace(ops[0], work=mean | first)}
    return made | {op.name: replace(op, work={**mean, BESIDE: 1.0}) for op in ops[1:]}


def _fixed(node: ir.Node) -> bool:
    return node.domain == vocabulary.DOMAIN and node.op_type in vocabulary.LINEARS


_SPECIAL = frozenset({"Attention", "MatMul", "Gemm", "Conv", "ConvTranspose"})
_GATHERS = frozenset({"Gather", "GatherElements", "GatherND"})


def _known(node: ir.Node) -> bool:
    if node.domain == vocabulary.DOMAIN:
        return node.op_type in vocabulary.OPERATORS
    tables: tuple[Iterable[str], ...] = (PER_OUTPUT, PER_INPUT, WIRING, CONTROL, _SPECIAL)
    return node.domain in ("", "ai.onnx") and any(node.op_type in t for t in tables)


def _unknown_error(nodes: list[ir.Node]) -> InputError:
    types = sorted({f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in nodes})
    names = ", ".join(str(n.name) for n in nodes[:5])
    return InputError(
        f"the fabric has no unit for {', '.join(types)}",
        where=names + (" …" if len(nodes) > 5 else ""),
        mend="add the operator to pfmc/targets/fabric/operators.py, or a pass that removes it",
    )


def fixed_positions(model: ir.Model, shapes: Shapes) -> int | None:
    """Positions of a model of fixed size (commonest rows of its fixed linears), else None.

    Such a model runs over these positions whatever the workload says: its counts hold no context.
    """
    if any(p[0].shape != p[-1].shape for p in shapes.values()):
        return None
    probes = [shapes[v] for n in vocabulary.fixed_linears(model) if (v := _name(n, 0)) in shapes]
    rows = [math.prod(p[0].shape[:-1]) for p in probes]
    return max(sorted(set(rows)), key=rows.count, default=None)


def _name(node: ir.Node, index: int) -> str:
    value = node.inputs[index] if index < len(node.inputs) else None
    return str(value.name) if value is not None else ""


def _table_nodes(model: ir.Model) -> frozenset[str]:
    """Values that lead to a cosine or sine: angles, whose table is all that is built."""
    wanted: set[str] = set()
    for node in reversed(list(model.graph)):
        leads = node.op_type in ("Cos", "Sin") or any(v.name in wanted for v in node.outputs)
        if leads:
            wanted.update(str(v.name) for v in node.inputs if v is not None)
    return frozenset(wanted)


@dataclass(frozen=True)
class _Counter:
    shapes: Shapes
    positions: int | None
    tables: frozenset[str]

    def op(self, node: ir.Node) -> FabricOp:
        kind, work = self.work(node)
        stored = sum(_size(v) for v in node.inputs if v is not None and _real_constant(v))
        if stored and kind not in ("wiring", "control", "table", "side_path", "trim"):
            work = {**work, "stored_values": float(stored)}
        return FabricOp(
            str(node.name), kind, node.metadata_props.get(vocabulary.KEY_SCOPE, ""),
            tuple(node.metadata_props.get(vocabulary.KEY_SOURCE, "").split()),
            {k: v for k, v in sorted(work.items()) if v},
        )  # fmt: skip

    def work(self, node: ir.Node) -> tuple[str, dict[str, float]]:
        if node.domain != vocabulary.DOMAIN and node.op_type in WIRING:
            return "wiring", {}
        if not any(self.floating(v) for v in node.outputs if v.name):
            return "control", _spread({"control_ops": self.grow(node.outputs[0])})
        if any(v.name in self.tables for v in node.outputs):
            return "table", {}
        return self.real_work(node)

    def real_work(self, node: ir.Node) -> tuple[str, dict[str, float]]:
        special: dict[str, Callable[[ir.Node], tuple[str, dict[str, Growth]]]] = {
            "Attention": self.attention, "MatMul": self.product, "Gemm": self.product,
            "Conv": self.convolution, "ConvTranspose": self.convolution,
            vocabulary.SIDE_PATH: self.side_path, vocabulary.TRIM: self.trim,
        }  # fmt: skip
        out = self.grow(node.outputs[0])
        if node.op_type in special:
            kind, counts = special[node.op_type](node)
        elif node.op_type in _GATHERS:
            kind, counts = self.gather(node)
        elif node.op_type in PER_OUTPUT:
            kind, each = PER_OUTPUT[node.op_type]
            more = max(len(node.inputs) - 1, 1) if node.op_type in VARIADIC else 1
            times = {k: f * more if k == "adds" else f for k, f in each.items()}
            counts = {k: out.times(f) for k, f in times.items()} | self.once(node, kind)
        elif node.op_type in PER_INPUT:
            kind, each = PER_INPUT[node.op_type]
            counts = {k: self.grow(node.inputs[0]).times(f) for k, f in each.items()}
            for key, factor in AT_LAST.get(node.op_type, {}).items():
                counts[key] = counts.get(key, Growth(0.0)).plus(out.times(factor))
        else:
            raise _unknown_error([node])
        return kind, _spread(counts if kind == "wiring" else {**counts, "moved_values": out})

    def once(self, node: ir.Node, kind: str) -> dict[str, Growth]:
        """Work done once a row (last axis): a root for norms, a reciprocal for softmax."""
        if kind == "requantise":
            users = [n for v in node.outputs for n, _ in v.uses() if _fixed(n)]
            linears = {"linears": Growth(float(len(users)))}
            return linears | self.rows(node) if node.op_type == "QuantiseToken" else linears
        if kind in ("norm", "softmax"):
            return self.rows(node)
        return {}

    def rows(self, node: ir.Node) -> dict[str, Growth]:
        width = max(self.probes(node.outputs[0])[0].shape[-1], 1)
        return {"roots": self.grow(node.outputs[0]).times(1.0 / width)}

    def attention(self, node: ir.Node) -> tuple[str, dict[str, Growth]]:
        q, k, v = (self.probes(node.inputs[i]) for i in range(3))
        heads, width, kv_heads, v_width = _heads(node, q[0].shape, k[0].shape, v[0].shape)
        points, held = [], []
        for i, probe in enumerate(q):
            length = self.length(node, i)
            points.append((length * _rows(probe), probe))
            held.append(length == probe.context and q[0].context != q[-1].context)
        each, queries = self.fit(points), self.fit([(_rows(p), p) for p in q])
        kv = float(kv_heads * (width + v_width))
        written = self.written(node).times(kv)
        memory = Growth(0.0, kv) if all(held) else Growth(kv * self.length(node, 0))
        capped = 1.0 if (cap := node.attributes.get("softcap")) is not None and cap.value else 0.0
        window = float(node.metadata_props.get("pfmc.window", 0))
        return "attention", {
            WINDOW: Growth(window), "table_reads": each.times(capped * heads),
            "macs8": each.times(heads * width), "macs16": each.times(heads * v_width),
            "exps": each.times(heads), "adds": each.times(2.0 * heads),
            "roots": queries.times(heads), "muls": queries.times(heads * v_width),
            "kv_read_values": each.times(kv), "kv_write_values": written,
            "kv_held_values": memory, "heads": Growth(float(heads)),
        }  # fmt: skip

    def length(self, node: ir.Node, run: int) -> int:
        """Positions attended to in trial run `run`; a sink is none."""
        total = self.probes(node.inputs[1])[run].shape[-2] - (SINK in node.metadata_props)
        past = node.inputs[4] if len(node.inputs) > 4 else None
        return total + (self.probes(past)[run].shape[-2] if past is not None else 0)

    def written(self, node: ir.Node) -> Growth:
        """Positions whose keys are new in a run: none of a memory that is only read."""
        value = node.inputs[1]
        pad = value.producer() if value is not None and SINK in node.metadata_props else None
        value = pad.inputs[0] if pad is not None and pad.op_type == "Pad" else value
        if value is not None and value.is_graph_input():
            return Growth(0.0)
        joined = value.producer() if value is not None else None
        if joined is not None and joined.op_type == "Concat" and len(joined.inputs) == 2:
            past, new = joined.inputs
            if past is not None and past.is_graph_input():
                value = new
        extra = int(pad is not None and value is node.inputs[1])
        return self.fit([(_rows(p) - extra, p) for p in self.probes(value)])

    def product(self, node: ir.Node) -> tuple[str, dict[str, Growth]]:
        left = self.probes(node.inputs[0])[0].shape
        inner = left[-2] if node.op_type == "Gemm" and _attribute(node, "transA") else left[-1]
        probes = zip(self.probes(node.inputs[0]), self.probes(node.outputs[0]), strict=True)
        if node.op_type == "MatMul":
            macs = self.fit([(p.shape[-1] * y.size, y) for p, y in probes])
        else:
            macs = self.grow(node.outputs[0]).times(inner)
        return "product", {"macs8": macs}

    def convolution(self, node: ir.Node) -> tuple[str, dict[str, Growth]]:
        kernel = self.probes(node.inputs[1])[0].shape
        return "product", {"macs8": self.grow(node.outputs[0]).times(math.prod(kernel[1:]))}

    def side_path(self, node: ir.Node) -> tuple[str, dict[str, Growth]]:
        """Two products with an adapter's factors, each number of them read from SRAM once."""
        down, up = (self.probes(v)[0].shape for v in node.inputs[2:])
        out, held = self.grow(node.outputs[0]), float(math.prod(down) + math.prod(up))
        rows = out.times(1.0 / up[1])
        return "side_path", {
            "macs8": rows.times(math.prod(down)), "macs16": rows.times(math.prod(up)),
            "adds": out, "adapter_read_values": rows.times(held),
            "adapter_held_values": Growth(held),
        }  # fmt: skip

    def trim(self, node: ir.Node) -> tuple[str, dict[str, Growth]]:
        """A 16-bit gain and a 16-bit offset for every output, read from SRAM once."""
        out, width = self.grow(node.outputs[0]), math.prod(self.probes(node.inputs[1])[0].shape)
        return "trim", {
            "muls": out, "adds": out, "adapter_read_values": out.times(4.0),
            "adapter_held_values": Growth(4.0 * width),
        }  # fmt: skip

    def gather(self, node: ir.Node) -> tuple[str, dict[str, Growth]]:
        source = node.inputs[0]
        if source is None or source.const_value is None:
            return "wiring", {}
        return "embedding", {"embedding_values": self.grow(node.outputs[0])}

    def floating(self, value: ir.Value) -> bool:
        return self.probes(value)[0].floating

    def probes(self, value: ir.Value | None) -> tuple[ShapeProbe, ...]:
        name = str(value.name) if value is not None else ""
        if name in self.shapes:
            return self.shapes[name]
        if value is not None and value.const_value is not None:
            shape = tuple(int(d) for d in value.const_value.shape.numpy())
            kind = value.const_value.dtype
            dtype = "float" if kind.is_floating_point() else kind.name.lower()
            first = next(iter(self.shapes.values()))
            return tuple(ShapeProbe(shape, dtype, p.positions, p.context) for p in first)
        raise InternalError("a value has no probed shape", where=name)

    def s(self, probe: ShapeProbe) -> int:
        return self.positions or probe.positions

    def t(self, probe: ShapeProbe) -> int:
        return self.positions or probe.context

    def grow(self, value: ir.Value | None) -> Growth:
        return self.fit([(p.size, p) for p in self.probes(value)])

    def fit(self, counts: list[tuple[int, ShapeProbe]]) -> Growth:
        return growth([(float(n), self.s(p), self.t(p)) for n, p in counts])


def _rows(probe: ShapeProbe) -> int:
    """Positions of ``[B, H, S, D]`` or ``[B, S, H * D]``: B (or windows) times S."""
    return probe.shape[0] * probe.shape[-2]


def _heads(
    node: ir.Node, q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]
) -> tuple[int, int, int, int]:
    """Heads, head width, KV heads and value width of an Attention in 3-D or 4-D form."""
    if len(q) == 4:
        return q[1], q[3], k[1], v[3]
    heads, kv_heads = _attribute(node, "q_num_heads"), _attribute(node, "kv_num_heads")
    return heads, q[-1] // heads, kv_heads, v[-1] // kv_heads


def _attribute(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else 0


def _spread(counts: Mapping[str, Growth]) -> dict[str, float]:
    flat = {k: g.fixed for k, g in counts.items()}
    return flat | {k + PER_CONTEXT: g.per_context for k, g in counts.items()}


def _real_constant(value: ir.Value) -> bool:
    constant = value.const_value
    return constant is not None and constant.dtype.is_floating_point()


def _size(value: ir.Value) -> int:
    return int(value.const_value.size) if value.const_value is not None else 0


def _sampling(model: ir.Model, counter: _Counter) -> Iterable[FabricOp]:
    attentions = [n for n in model.graph if n.op_type == "Attention"]
    causal = any(
        _attribute(n, "is_causal") == 1 or len(n.inputs) > 4 or SINK in n.metadata_props
        for n in attentions
    )
    for value in model.graph.outputs if causal else ():
        if _from_linear(value) and len(counter.probes(value)[0].shape) <= 3:
            work = _spread({"adds": counter.grow(value)})
            yield FabricOp(
                f"sample.{value.name}", "sampling", "", (), {k: v for k, v in work.items() if v}
            )


def _from_linear(value: ir.Value | None) -> bool:
    """Whether a fixed linear made the value, but for wiring and a constant that is added."""
    node = value.producer() if value is not None else None
    if node is None or _fixed(node):
        return node is not None
    if vocabulary.is_op(node, vocabulary.SIDE_PATH, vocabulary.DOMAIN):
        return _from_linear(node.inputs[1])
    if vocabulary.is_op(node, vocabulary.TRIM, vocabulary.DOMAIN):
        return _from_linear(node.inputs[0])
    if node.op_type == "Add":
        return any(_from_linear(v) for v in node.inputs) and any(
            v is not None and v.const_value is not None for v in node.inputs
        )
    return node.op_type in WIRING and _from_linear(node.inputs[0] if node.inputs else None)
