"""Folding: constants, transposed weights, and nodes that do nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from pfmc.errors import InputError
from pfmc.ir import matcher, types
from pfmc.ir.meaning import OPS, compile_node, growth, key_of
from pfmc.passes.base import Context, Declined, Pass, PassResult
from pfmc.passes.rules import where
from pfmc.passes.weights import SLICE, derived, kind_of, shape_of, transposed

_CONSTANT_ATTRIBUTES: dict[str, Callable[[Any], Any]] = {
    "value_int": lambda v: np.asarray(v, np.int64),
    "value_ints": lambda v: np.asarray(v, np.int64),
    "value_float": lambda v: np.asarray(v, np.float32),
    "value_floats": lambda v: np.asarray(v, np.float32),
}

_RANDOM = frozenset({"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike"})
_RANDOM_TOO = frozenset({"Bernoulli", "Multinomial", "Dropout"})
_KEEP = frozenset({"DequantizeLinear", "QuantizeLinear"})


@dataclass(frozen=True)
class Fold(Pass):
    """Folds what is constant and removes what does nothing.

    Attributes:
        largest: constants of more bytes than this are not computed (weights stay lazy).
    """

    name: ClassVar[str] = "fold"
    largest: int = 1 << 16

    def apply(self, model: ir.Model, context: Context) -> PassResult:
        """One sweep in graph order, which sees the results of its own foldings."""
        work = _Sweep(model.graph, self.largest)
        for node in list(model.graph):
            work.visit(node)
        work.drop_dead()
        return PassResult(model, work.changed, tuple(work.declined), {**work.counts})


class _Sweep:
    """One pass over the nodes, with its counts."""

    def __init__(self, graph: ir.Graph, largest: int) -> None:
        self.graph, self.largest = graph, largest
        self.changed = 0
        self.counts: dict[str, int] = {}
        self.declined: list[Declined] = []

    def _count(self, what: str) -> None:
        self.changed += 1
        self.counts[what] = self.counts.get(what, 0) + 1

    def visit(self, node: ir.Node) -> None:
        """Folds `node` if one of the rules applies; else notes the type of its output."""
        if node.domain not in ("", "ai.onnx") or node.graph is not self.graph:
            return
        if node.op_type == "Constant":
            self._constant(node)
        elif self._does_nothing(node):
            self._bypass(node)
        elif self._is_foldable(node):
            self._fold(node)
        elif node.op_type == "Split" and self._is_constant(node):
            self._split(node)
        elif node.op_type == "DequantizeLinear" and self._is_constant(node):
            self._dequantise(node)
        else:
            types.note(node)

    def _constant(self, node: ir.Node) -> None:
        tensor = _tensor_of(node)
        if tensor is None:
            self.declined.append(Declined("fold", where(node), "constant of an unknown kind"))
            return
        output = node.outputs[0]
        self._become_initialiser(node, tensor)
        self._count("constants")
        assert not output.uses()

    def _become_initialiser(self, node: ir.Node, tensor: ir.TensorProtocol) -> None:
        """Replaces the first output of `node` by an initialiser of the same name."""
        old = node.outputs[0]
        if old.is_graph_output():
            identity = matcher.fresh(
                "Identity", [self._initialiser(f"{old.name}:constant", tensor)]
            )
            matcher.substitute(node, [], [identity], old)
            return
        name, metadata = str(old.name), dict(old.metadata_props)
        old.name = matcher.unique_name(self.graph, f"{name}:folded")
        new = self._initialiser(name, tensor)
        new.metadata_props.update(metadata)
        old.replace_all_uses_with(new)
        matcher.remove_dead(self.graph, [node])

    def _initialiser(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        return matcher.add_initialiser(self.graph, name, tensor)

    def _does_nothing(self, node: ir.Node) -> bool:
        source = node.inputs[0] if node.inputs else None
        if source is None:
            return False
        match node.op_type:
            case "Identity":
                return True
            case "Cast":
                return source.dtype is not None and matcher.attribute(node, "to") == source.dtype
            case "Dropout":
                return _is_idle_dropout(node)
            case "Transpose":
                perm = matcher.attribute(node, "perm")
                return perm is not None and list(perm) == sorted(perm)
            case "Concat":
                return len(node.inputs) == 1
            case "Mul" | "Div":
                return _is_neutral(node, 1.0)
            case "Add" | "Sub":
                return _is_neutral(node, 0.0)
        return False

    def _bypass(self, node: ir.Node) -> None:
        """Lets the readers of `node` read its input."""
        source, output = node.inputs[0], node.outputs[0]
        assert source is not None
        if output.is_graph_output():
            if source.producer() is None or source.is_graph_output() or node.op_type != "Identity":
                types.note(node)
                return
            self._hand_on_sources(node, source)
            matcher.take_place(self.graph, output, source)
        else:
            self._hand_on_sources(node, source)
            output.replace_all_uses_with(source)
        matcher.remove_dead(self.graph, [node])
        self._count(node.op_type)

    def _hand_on_sources(self, node: ir.Node, source: ir.Value) -> None:
        maker = source.producer()
        if maker is not None:
            matcher.inherit(maker, [node], maker)

    def _is_foldable(self, node: ir.Node) -> bool:
        if node.op_type in _RANDOM | _RANDOM_TOO | _KEEP or len(node.outputs) != 1:
            return False
        if any(a.type in _GRAPHS for a in node.attributes.values()):
            return False
        return self._is_constant(node)

    def _is_constant(self, node: ir.Node) -> bool:
        values = [v for v in node.inputs if v is not None]
        return bool(values) and all(matcher.is_constant(v) for v in values)

    def _fold(self, node: ir.Node) -> None:
        if node.op_type == "Transpose" and len(shape_of(_constant_of(node, 0))) == 2:
            self._transpose(node)
            return
        if SLICE in _constant_of(node, 0).meta and self._delay(node):
            return
        array = self._compute(node)
        if array is not None:
            self._become_initialiser(node, ir.Tensor(array))
            self._count("folded")
        elif not self._delay(node):
            types.note(node)

    def _delay(self, node: ir.Node) -> bool:
        """A large constant of known shape becomes a lazy one: views, and sums of weights."""
        output = node.outputs[0]
        if key_of(node) not in OPS or output.is_graph_output() or not _shrinks(node):
            return False
        first = _constant_of(node, 0)
        shape = _shape_by_dummies(node) if node.op_type in _VIEWS else _static(output)
        if shape is None or shape_of(first) == () or kind_of(first) not in _REAL:
            return False
        if output.dtype not in (None, kind_of(first)):
            return False
        run, rest = compile_node(node), [None if v is None else v.const_value for v in _seen(node)]

        def of(array: np.ndarray) -> np.ndarray:
            others = [None if t is None else t.numpy() for t in rest[1:]]
            return np.asarray(run([array, *others])[0])

        output.replace_all_uses_with(derived(self.graph, first, shape, of))
        matcher.remove_dead(self.graph, [node])
        self._count("delayed")
        return True

    def _split(self, node: ir.Node) -> None:
        """Every part of a constant, such as the experts of a stack, becomes a lazy constant."""
        if any(v.is_graph_output() for v in node.outputs) or key_of(node) not in OPS:
            return
        first, run = _constant_of(node, 0), compile_node(node)
        rest = [None if v is None else v.const_value.numpy() for v in _seen(node)[1:]]  # type: ignore[union-attr]
        parts = run([_dummy(first), *rest])
        if len(parts) != len(node.outputs):
            what = f"Split makes {len(parts)} parts and has {len(node.outputs)} outputs"
            raise InputError(what, where=where(node))
        one_each = all(p.shape[:1] == (1,) for p in parts) and len(shape_of(first)) == 3
        axis, start = matcher.attribute(node, "axis", 0), 0
        for i, (output, part) in enumerate(zip(node.outputs, parts, strict=True)):
            shape = tuple(int(n) for n in part.shape)
            part_of = partial(_part, axis % len(shape), start, shape)
            lazy = derived(self.graph, first, shape, part_of)
            start += shape[axis]
            if one_each and axis == 0:
                lazy.meta[SLICE] = i
            output.replace_all_uses_with(lazy)
        matcher.remove_dead(self.graph, [node])
        self._count("split")

    def _compute(self, node: ir.Node) -> np.ndarray | None:
        """What a node of small constants gives; None, with the reason, if that is not to be had."""
        if _cost(node) > self.largest:
            return None
        if key_of(node) not in OPS:
            self.declined.append(Declined("fold", where(node), f"{node.op_type} is not computed"))
            return None
        count = _elements(node)
        if count > growth.MOST and _static(node.outputs[0]) is not None:
            what = f"{node.op_type} makes a constant of {count:.4g} elements"
            raise InputError(f"{what}; at most {growth.MOST}", where=where(node))
        if count > self.largest:
            return None
        inputs = [None if v is None else matcher.constant(v) for v in node.inputs]
        array = np.asarray(compile_node(node)(inputs)[0])
        return array if array.nbytes <= self.largest else None

    def _transpose(self, node: ir.Node) -> None:
        """``Transpose(W)`` of a matrix becomes a lazy constant."""
        source = _constant_of(node, 0)
        output = node.outputs[0]
        if output.is_graph_output():
            return
        lazy = transposed(self.graph, source)
        output.replace_all_uses_with(lazy)
        matcher.remove_dead(self.graph, [node])
        self._count("transposed")

    def _dequantise(self, node: ir.Node) -> None:
        """Quantised weights become a lazy constant of real numbers."""
        output, codes, scale = node.outputs[0], _constant_of(node, 0), _constant_of(node, 1)
        if output.is_graph_output():
            return
        run = compile_node(node)
        tensors = [None if v is None else v.const_value for v in _seen(node)]
        name = matcher.unique_name(self.graph, f"{codes.name}:real")

        def read() -> ir.TensorProtocol:
            inputs = [None if t is None else t.numpy() for t in tensors]
            return ir.Tensor(np.ascontiguousarray(run(inputs)[0]), name=name)

        lazy = ir.LazyTensor(read, kind_of(scale), ir.Shape(shape_of(codes)), name=name)
        value = matcher.add_initialiser(self.graph, name, lazy, codes.metadata_props)
        output.replace_all_uses_with(value)
        matcher.remove_dead(self.graph, [node])
        self._count("dequantised")

    def drop_dead(self) -> None:
        """Removes nodes and initialisers that nobody reads."""
        removed = 0
        for node in reversed(list(self.graph)):
            removed += matcher.remove_dead(self.graph, [node])
        outputs = set(self.graph.outputs)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and value not in outputs and not value.is_graph_input():
                del self.graph.initializers[name]
        if removed:
            self.counts["dead"] = removed
            self.changed += removed


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
_VIEWS = frozenset({"Squeeze", "Unsqueeze", "Reshape", "Flatten", "Transpose", "Slice"})
_REAL = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


def _seen(node: ir.Node) -> list[ir.Value | None]:
    """The inputs of a node of constants, aliases looked through."""
    return [matcher.see_through(v) for v in node.inputs]


def _dummy(value: ir.Value) -> np.ndarray:
    """Zeros of the shape and type of a constant that take no memory."""
    return np.broadcast_to(np.zeros((), kind_of(value).numpy()), shape_of(value))


def _shape_by_dummies(node: ir.Node) -> tuple[int, ...]:
    """The shape of a view of a constant, found without reading it."""
    rest = [None if v is None else matcher.constant(v) for v in node.inputs[1:]]
    found = compile_node(node)([_dummy(_constant_of(node, 0)), *rest])[0]
    return tuple(int(n) for n in np.shape(found))


def _static(value: ir.Value) -> tuple[int, ...] | None:
    """The shape of a value if every dimension is known."""
    dims = list(value.shape) if value.shape is not None else [None]
    return tuple(d for d in dims if isinstance(d, int)) if _all_int(dims) else None


def _all_int(dims: list[Any]) -> bool:
    return all(isinstance(d, int) for d in dims)


def _shrinks(node: ir.Node) -> bool:
    """Whether a node gives no more numbers than its largest constant holds."""
    shape = _static(node.outputs[0])
    if node.op_type in _VIEWS:
        return True
    largest = max(math.prod(shape_of(v)) for v in _seen(node) if v is not None)
    return shape is not None and math.prod(shape) <= largest


def _part(axis: int, start: int, shape: tuple[int, ...], array: np.ndarray) -> np.ndarray:
    return array[(*[slice(None)] * axis, slice(start, start + shape[axis]))]


def _constant_of(node: ir.Node, position: int) -> ir.Value:
    value = matcher.see_through(node.inputs[position])
    assert value is not None
    return value


def _cost(node: ir.Node) -> int:
    """Bytes of the largest input: reading more than that is not worth folding."""
    tensors = [v.const_value for v in node.inputs if v is not None and v.const_value is not None]
    return max((int(t.nbytes) for t in tensors), default=0)


_MOST = 1 << 24


def _elements(node: ir.Node) -> int:
    """How many elements the result has if that is known; 0 if not, but it cannot be huge."""
    shape = _static(node.outputs[0])
    if shape is not None:
        return math.prod(shape)
    operands = [v.const_value for v in node.inputs if v is not None]
    worst = math.prod(max(1, int(t.size)) for t in operands if t is not None)
    return worst if worst > _MOST else 0


def _tensor_of(node: ir.Node) -> ir.TensorProtocol | None:
    for name, found in node.attributes.items():
        if name == "value":
            return found.as_tensor()
        if name in _CONSTANT_ATTRIBUTES:
            return ir.tensor(_CONSTANT_ATTRIBUTES[name](found.value))
    return None


def _is_idle_dropout(node: ir.Node) -> bool:
    training = node.inputs[2] if len(node.inputs) > 2 else None
    if training is not None and matcher.scalar(training) != 0.0:
        return False
    return not any(v.uses() or v.is_graph_output() for v in node.outputs[1:])


def _is_neutral(node: ir.Node, neutral: float) -> bool:
    """Whether the second operand is one element that changes neither value, type nor shape."""
    second = matcher.see_through(node.inputs[1])
    if second is None or second.const_value is None or matcher.scalar(second) != neutral:
        return False
    return len(second.const_value.shape) == 0
