"""What may stand in a graph at each stage, as data, and whether a graph is whole.

A violation names its node. `check` is for what a pass must never do (our bug); `require_stage` is
for a model that could not be brought to a stage (the model's matter).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from pfmc.errors import InputError, InternalError
from pfmc.ir import provenance, vocabulary
from pfmc.ir.vocabulary import DOMAIN, Stage

ARITHMETIC = frozenset({
    "Abs", "Add", "Ceil", "Clip", "Cos", "CumSum", "Div", "Elu", "Erf", "Exp", "Floor",
    "HardSigmoid", "LeakyRelu", "Log", "Max", "Mean", "Min", "Mod", "Mul", "Neg", "Pow",
    "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin", "Softplus", "Sqrt", "Sub", "Sum",
    "Tan", "Tanh",
})  # fmt: skip
"""Elementwise operators of the digital fabric."""
LOGIC = frozenset({
    "And", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Not",
    "Or", "Where", "Xor",
})  # fmt: skip
"""Comparisons and masks."""
WIRING = frozenset({
    "Cast", "CastLike", "Concat", "ConstantOfShape", "Expand", "Flatten", "Gather",
    "GatherElements", "GatherND", "Identity", "NonZero", "OneHot", "Pad", "Range", "Reshape",
    "ScatterElements", "ScatterND", "Shape", "Size", "Slice", "Split", "Squeeze", "Tile",
    "Transpose", "Trilu", "Unsqueeze",
})  # fmt: skip
"""Operators that move or address numbers: embeddings, shapes, tables."""
REDUCTIONS = frozenset({
    "ArgMax", "ArgMin", "GlobalAveragePool", "LogSoftmax", "ReduceL1", "ReduceL2",
    "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum",
    "ReduceSumSquare", "Softmax", "TopK",
})  # fmt: skip
"""Operators that gather many numbers into few."""
BLOCKS = frozenset({
    "Attention", "Gelu", "InstanceNormalization", "LayerNormalization", "MatMul",
    "RMSNormalization", "RotaryEmbedding", "Swish",
})  # fmt: skip
"""High-level operators; a MatMul is legal only between two activations."""
STANDARD = ARITHMETIC | LOGIC | WIRING | REDUCTIONS | BLOCKS


@dataclass(frozen=True)
class Legality:
    """What may stand in a graph at one stage.

    Attributes:
        standard: operators of the standard domain; None for any.
        own: operators of domain ``pfmc``.
        foreign: whether other domains are allowed.
    """

    standard: frozenset[str] | None
    own: frozenset[str]
    foreign: bool


_CONVERTERS = frozenset({vocabulary.QUANTISE, vocabulary.QUANTISE_TOKEN})
_HELPERS = frozenset(
    {vocabulary.ROTARY, vocabulary.SWIGLU, vocabulary.SIDE_PATH, vocabulary.TRIM}
)
LEGAL: dict[Stage, Legality] = {
    Stage.SOURCE: Legality(None, frozenset(vocabulary.OPERATORS), True),
    Stage.CANONICAL: Legality(STANDARD, _HELPERS | {vocabulary.FIXED_LINEAR}, False),
    Stage.QUANTISED: Legality(
        STANDARD,
        _HELPERS | _CONVERTERS | {vocabulary.QUANTISED_LINEAR},
        False,
    ),
}
"""Stage -> what is legal there."""


@dataclass(frozen=True)
class Violation:
    """One thing that is wrong: at which node or value, and what."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def describe(node: ir.Node) -> str:
    """A node in words: ``node 'x' (MatMul) n12 in model.layers.0``."""
    name = f"node {node.name or (node.outputs[0].name if node.outputs else '')!r} ({node.op_type})"
    ids, scope = " ".join(provenance.sources(node)), provenance.scope(node)
    return name + (f" {ids}" if ids else "") + (f" in {scope}" if scope else "")


# -- legality ------------------------------------------------------------------------------------


def illegal(model: ir.Model, stage: Stage) -> list[Violation]:
    """What may not stand in `model` at `stage`."""
    found: list[Violation] = []
    names: set[str] = set()
    for node in model.graph:
        if stage is Stage.SOURCE and node.domain != DOMAIN:
            continue  # anything may stand there
        found += [Violation(describe(node), what) for what in _illegal(node, stage)]
        if node.domain == DOMAIN and node.op_type in vocabulary.LINEARS:
            if not node.name or node.name in names:
                found.append(Violation(describe(node), "a fixed linear needs a name of its own"))
            names.add(node.name or "")
    return found


def _illegal(node: ir.Node, stage: Stage) -> Iterator[str]:
    legal = LEGAL[stage]
    if node.domain == DOMAIN:
        if node.op_type not in legal.own:
            yield f"pfmc.{node.op_type} may not stand at stage {stage.value}"
        elif stage is not Stage.SOURCE:
            yield from _illegal_own(node)
    elif node.domain not in ("", "ai.onnx"):
        if not legal.foreign:
            yield f"operator of foreign domain {node.domain}"
    elif legal.standard is not None:
        if node.op_type not in legal.standard:
            yield f"{node.op_type} cannot be built at stage {stage.value}"
        elif node.op_type == "MatMul" and any(map(_is_weight, node.inputs, (-1, -2))):
            yield "a product with a constant that did not become a fixed linear"
        elif node.op_type == "MatMul" and any(map(gathered_weights, node.inputs)):
            yield "a product with weights gathered at run time: they cannot be fixed"


def _is_weight(value: ir.Value | None, summed: int) -> bool:
    """Whether a factor is a constant that sums over its axis `summed`.

    An outer product, such as rotary frequencies by positions, sums over one element: no matrix.
    """
    if value is None or value.const_value is None or value.is_graph_input():
        return False
    shape = value.const_value.shape
    return len(shape) < 2 or shape[summed] != 1


_BENDING = frozenset({"Transpose", "Squeeze", "Unsqueeze", "Cast", "Reshape"})


def gathered_weights(value: ir.Value | None) -> bool:
    """Whether a factor is gathered at run time from a constant stack of matrices."""
    maker = value.producer() if value is not None else None
    while maker is not None and maker.op_type in _BENDING and maker.inputs[0] is not None:
        maker = maker.inputs[0].producer()
    if maker is None or maker.op_type not in ("Gather", "GatherND"):
        return False
    stack = maker.inputs[0]
    constant = stack.const_value if stack is not None else None
    return constant is not None and len(constant.shape) == 3


def _illegal_own(node: ir.Node) -> Iterator[str]:
    operator = vocabulary.OPERATORS[node.op_type]
    if len(node.inputs) != len(operator.inputs) or any(v is None for v in node.inputs):
        yield f"{node.op_type} has {len(node.inputs)} inputs, not {', '.join(operator.inputs)}"
    elif node.op_type in vocabulary.LINEARS:
        yield from _illegal_linear(node)
    elif node.op_type == vocabulary.SIDE_PATH:
        yield from _illegal_side_path(node)
    elif node.op_type == vocabulary.TRIM and any(v.const_value is None for v in node.inputs[1:]):  # type: ignore[union-attr]
        yield "a gain or an offset is not a constant"
    elif node.op_type in _CONVERTERS and not _top(node) >= 1:
        yield "the largest code `top` is below 1"


def _top(node: ir.Node) -> float:
    return float(node.attributes["top"].value) if "top" in node.attributes else 0.0


def _illegal_linear(node: ir.Node) -> Iterator[str]:
    constants = [None if v is None else v.const_value for v in node.inputs[1:]]
    if any(c is None for c in constants):
        yield "weight, scale or bias is not a constant"
        return
    shapes = [tuple(int(d) for d in c.shape.numpy()) for c in constants if c is not None]
    if len(shapes[0]) != 2 or shapes[-1] != shapes[0][1:]:
        yield f"weight {shapes[0]} and bias {shapes[-1]} are no [in, out] and [out]"
    elif node.op_type == vocabulary.QUANTISED_LINEAR:
        yield from _illegal_codes(node, constants[0], shapes)


def _illegal_side_path(node: ir.Node) -> Iterator[str]:
    factors = [None if v is None else v.const_value for v in node.inputs[2:]]
    shapes = [tuple(int(d) for d in c.shape.numpy()) for c in factors if c is not None]
    if len(shapes) < 2:
        yield "a factor of the side path is not a constant"
    elif [len(s) for s in shapes] != [2, 2] or shapes[0][1] != shapes[1][0]:
        yield f"factors {shapes[0]} and {shapes[1]} are no [in, rank] and [rank, out]"


def _illegal_codes(
    node: ir.Node, codes: ir.TensorProtocol | None, shapes: list[tuple[int, ...]]
) -> Iterator[str]:
    if codes is None or codes.dtype not in (ir.DataType.INT4, ir.DataType.INT8):
        yield "codes are neither int4 nor int8"
    axis, block = (int(node.attributes[n].value) for n in ("axis", "block_size"))
    inputs, outputs = shapes[0]
    wanted = (outputs,) if block == 0 else (-(-inputs // block), outputs)
    if axis != (1 if block == 0 else 0) or shapes[1] != wanted:
        yield f"scale {shapes[1]} does not fit axis {axis}, block size {block}: want {wanted}"


# -- wholeness -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """What is remembered of a model while a pass works on it.

    Attributes:
        sources: value name -> source ids of the node that makes it, space-separated.
        tensors: initialiser -> its tensor, and a checksum of it if it is small and in memory.
        operators: (domain, operator) -> how many there are.
    """

    sources: dict[str, str]
    tensors: dict[ir.Value, tuple[ir.TensorProtocol, int]]
    operators: dict[tuple[str, str], int]


class _Survey:
    """One walk over a graph: what is broken, what was lost since `before`, what to remember.

    All of it in one loop, because it is run after every pass.
    """

    def __init__(self, before: Snapshot | None = None) -> None:
        self.before = before
        self.broken: list[Violation] = []
        self.lost: list[Violation] = []
        self.sources: dict[str, str] = {}
        self.operators: dict[tuple[str, str], int] = {}
        self._old = before.sources if before is not None else {}

    def run(self, model: ir.Model) -> None:
        """Looks at all of `model`."""
        graph = model.graph
        names: set[str] = set()
        defined: set[ir.Value] = set()
        for value in graph.inputs:
            self._define(value, "graph input", names, defined)
        for key, value in graph.initializers.items():
            if value.name != key or value.const_value is None:
                what = "its name or its tensor is missing"
                self.broken.append(Violation(f"initialiser {key!r}", what))
            if not value.is_graph_input():
                self._define(value, f"initialiser {key!r}", names, defined)
        for node in graph:
            ids = node.metadata_props.get(vocabulary.KEY_SOURCE, "")
            if not ids:
                self.broken.append(Violation(describe(node), "it has no source id (pfmc.src)"))
            operator = node.domain, node.op_type
            self.operators[operator] = self.operators.get(operator, 0) + 1
            self._step(node, names, defined)
            for value in node.outputs:
                self._remember(node, value.name or "", ids)
        for value in graph.outputs:
            if value not in defined:
                self.broken.append(Violation(f"graph output {value.name!r}", "nothing defines it"))

    def _step(self, node: ir.Node, names: set[str], defined: set[ir.Value]) -> None:
        """Inputs are defined before, bodies are whole, outputs are defined once."""
        for value in node.inputs:
            if value is not None and value not in defined:
                what = f"input {value.name!r} is not defined before it"
                self.broken.append(Violation(describe(node), what))
        if node.op_type in _WITH_BODIES:
            for body in _bodies(node):
                self._body(body, names, defined)
        for value in node.outputs:
            name = value.name
            if name and name not in names:
                names.add(name)
                defined.add(value)
            else:
                self._define(value, describe(node), names, defined)

    def _body(self, body: ir.Graph, names: set[str], defined: set[ir.Value]) -> None:
        """Names of a body may hide those outside."""
        inner = (*body.inputs, *body.initializers.values())
        names, defined = names | {v.name or "" for v in inner}, defined | set(inner)
        for node in body:
            self._step(node, names, defined)

    def _define(self, value: ir.Value, where: str, names: set[str], defined: set[ir.Value]) -> None:
        if not value.name:
            if value.uses() or value.is_graph_output():
                self.broken.append(Violation(where, "it defines a value without a name"))
        elif value.name in names:
            self.broken.append(Violation(where, f"it defines {value.name!r} a second time"))
        else:
            names.add(value.name)
            defined.add(value)

    def _remember(self, node: ir.Node, name: str, ids: str) -> None:
        self.sources[name] = ids
        old = self._old.get(name, "")
        if old != ids and (missing := set(old.split()) - set(ids.split())):
            words = " ".join(sorted(missing, key=provenance.order))
            self.lost.append(Violation(describe(node), f"{name!r} lost its sources {words}"))

    def snapshot(self, model: ir.Model) -> Snapshot:
        """What was seen, and the tensors; initialisers changed in place go to `lost`."""
        tensors = {
            value: (value.const_value, _checksum(value.const_value))
            for value in model.graph.initializers.values()
            if value.const_value is not None
        }
        if self.before is not None:
            self.lost += _mutated(self.before, tensors)
        return Snapshot(self.sources, tensors, self.operators)


def broken(model: ir.Model) -> list[Violation]:
    """What is not whole: names, definitions before uses, outputs, source ids."""
    survey = _Survey()
    survey.run(model)
    return survey.broken


def snapshot(model: ir.Model) -> Snapshot:
    """Remembers where each value comes from and which tensor each initialiser has."""
    survey = _Survey()
    survey.run(model)
    return survey.snapshot(model)


_WITH_BODIES = frozenset({"If", "Loop", "Scan", "SequenceMap"})


def _bodies(node: ir.Node) -> Iterable[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH and not attribute.is_ref():
            yield attribute.as_graph()
        elif attribute.type is ir.AttributeType.GRAPHS and not attribute.is_ref():
            yield from attribute.as_graphs()


def _checksum(tensor: ir.TensorProtocol) -> int:
    if not isinstance(tensor, ir.Tensor) or tensor.nbytes > 1 << 14:
        return 0
    return zlib.crc32(np.ascontiguousarray(tensor.numpy()).tobytes())


def _mutated(
    before: Snapshot, tensors: Mapping[ir.Value, tuple[ir.TensorProtocol, int]]
) -> Iterator[Violation]:
    """Initialisers whose tensor, or whose tensor's numbers, were changed in place.

    A value whose node died, or which became a constant, has lost nothing.
    """
    for value, (tensor, checksum) in before.tensors.items():
        known = tensors.get(value)
        now = known[0] if known is not None else value.const_value
        if now is tensor:
            if checksum and checksum != (known[1] if known is not None else _checksum(tensor)):
                yield Violation(f"initialiser {value.name!r}", "its numbers were changed in place")
        elif now is not None and now.dtype == tensor.dtype and value.uses():
            yield Violation(f"initialiser {value.name!r}", "its tensor was replaced in place")


# -- the two judges ------------------------------------------------------------------------------


def check(model: ir.Model, before: Snapshot | None = None) -> Snapshot:
    """Refuses a graph that is not whole or, given `before`, has lost what must be kept.

    Returns:
        the snapshot of the graph as it is, for the pass that comes next.

    Raises:
        InternalError: names the first offenders; 0.02 s at 5,000 nodes.
    """
    survey = _Survey(before)
    survey.run(model)
    remembered = survey.snapshot(model)
    found = survey.broken + survey.lost
    if found:
        raise InternalError(
            "the graph is broken: " + "; ".join(v.what for v in found[:3]) + _more(found),
            where=found[0].where,
        )
    return remembered


def require_stage(model: ir.Model, stage: Stage, reasons: Mapping[str, str] | None = None) -> None:
    """Refuses a model that holds what is illegal at `stage`.

    Args:
        model: the model.
        stage: where it should be.
        reasons: ``scope (node)`` -> why a pass declined it, for the message.

    Raises:
        InputError: names the first offending node and how many there are.
    """
    found = illegal(model, stage)
    if not found:
        return
    named = {f"{w.rpartition('(')[2].rstrip(')')!r}": r for w, r in (reasons or {}).items()}
    why = next((r for w, r in named.items() if w in found[0].where), "")
    raise InputError(
        f"{found[0].what}{_more(found)}" + (f": {why}" if why else ""),
        where=found[0].where,
        mend="`pfmc passes --explain MODEL` shows what each pass did and declined",
    )


def _more(found: list[Violation]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""
