"""Finds every value's shape by running the model twice on tiny inputs with weights of no memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pfmc.errors import InputError, PfmcError
from pfmc.ir import meaning, vocabulary
from pfmc.ir.meaning import growth
from pfmc.ir.meaning.elementwise import ELEMENTWISE
from pfmc.ir.probe import ShapeProbe

PROBES = ((3, 5), (5, 9))
"""(positions computed, positions in the KV memory) of the two runs; past is 0 without KV inputs."""

SIDES = (224, 32, 30, 64, 16, 28, 48, 96, 128, 256, 384, 336, 448, 512)
"""Image sides tried, in order, where an image input has no fixed size."""

_LARGE = 1 << 20
_MOST = 1 << 27  # elements of a graph input in one run
_SKETCHED = 1 << 29  # elements of a value of real numbers that is not computed
_HELD = 1 << 28  # bytes of integers at one time

Array = npt.NDArray[np.generic]


HOPS = (1, 32, 64, 128, 256, 512, 1024)
"""Samples a position tried, in order, where an input is a sound of free length."""


@dataclass(frozen=True)
class _Run:
    """Sizes of one run; `symbols` are the named dimensions that the KV memory settles."""

    positions: int
    past: int
    side: int
    hop: int = 1
    symbols: Mapping[str, int] = field(default_factory=dict)


def probe_shapes(model: ir.Model) -> dict[str, tuple[ShapeProbe, ...]]:
    """The shapes of every value of `model` at two lengths, by value name.

    Fixed linears yield zeros of the right shape, and constants over 1 MiB are zeros that take no
    memory, so a model of any size is probed in milliseconds per node.

    Raises:
        InputError: a run failed; the message names the node.
    """
    runs = [_run(model, *_lengths(model, s, p)) for s, p in PROBES]
    return {name: (runs[0][name], runs[1][name]) for name in runs[0]}


def image_side(model: ir.Model) -> int:
    """Side of the images that the model takes: the first of `SIDES` on which it runs.

    Raises:
        InputError: it runs on none of them; the message names the node.
    """
    image = next((str(v.name) for v in model.graph.inputs if _is_image(v)), None)
    if image is None:
        return SIDES[0]
    return int(_run(model, *_lengths(model, *PROBES[0]))[image].shape[-1])


def longest(model: ir.Model, length: int) -> int:
    """`length`, halved until the model's position tables hold it; as it is if nothing runs."""
    tried = length
    while tried > 1:
        try:
            _run(model, *_lengths(model, tried, 0))
        except PfmcError:
            tried //= 2
        else:
            return tried
    return length


def _lengths(model: ir.Model, positions: int, past: int) -> tuple[int, int]:
    """Positions and past of a run: the given ones, except where an input fixes its own."""
    memory = [v for v in model.graph.inputs if _is_memory(v)]
    others = [v for v in model.graph.inputs if not _is_memory(v) and "mask" not in str(v.name)]
    fixed = [_dims(v)[1] for v in others if len(_dims(v)) in (2, 3)]
    fixed_past = [_dims(v)[2] for v in memory if len(_dims(v)) == 4]
    if 0 in fixed:
        where = next(str(v.name) for v in others if 0 in _dims(v)[1:2])
        raise InputError("a graph input holds no positions: its second axis is 0", where=where)
    for length in fixed:
        positions = length if isinstance(length, int) else positions
    for length in fixed_past:
        past = length if isinstance(length, int) else past
    return positions, past if memory else 0


def _run(model: ir.Model, positions: int, past: int) -> dict[str, ShapeProbe]:
    sides = SIDES if any(_is_image(v) for v in model.graph.inputs) else SIDES[:1]
    hops = HOPS if any(_is_sound(v) for v in model.graph.inputs) else HOPS[:1]
    known = _memory_symbols(model, past)
    failure: PfmcError | None = None
    for side, hop in itertools.product(sides, hops):
        try:
            found = _shapes(model, _Run(positions, past, side, hop, known))
            if hop == hops[-1] or all(p.size for p in found.values()):
                return found
        except PfmcError as error:
            failure = failure or error
    raise failure or InputError("the model has no inputs")


def _is_memory(value: ir.Value) -> bool:
    return "past" in str(value.name) and len(_dims(value)) == 4


def _memory_symbols(model: ir.Model, past: int) -> dict[str, int]:
    """Lengths that KV memory inputs name: another input of that name is as long."""
    found: dict[str, int] = {}
    for value in model.graph.inputs:
        if _is_memory(value) and isinstance(name := _dims(value)[2], str):
            found[name] = past
    return found


def _is_sound(value: ir.Value) -> bool:
    """Whether the value is a sound of free length: samples ``[batch, n]`` of real numbers."""
    dims = _dims(value)
    real = value.dtype is not None and value.dtype.is_floating_point()
    free = len(dims) == 2 and not isinstance(dims[1], int)
    return free and real and "mask" not in str(value.name)


def _is_image(value: ir.Value) -> bool:
    """Whether the value is an image of no fixed size: 4-D, real, and not KV memory."""
    dims = _dims(value)
    return len(dims) == 4 and not _is_memory(value) and not isinstance(dims[-1], int)


def _dims(value: ir.Value) -> list[int | str | None]:
    if value.shape is None:
        raise InputError("a graph input has no shape", where=str(value.name))
    sizes = [d if isinstance(d, int) else d.value for d in value.shape]
    return [int(d) if isinstance(d, str) and d.isdecimal() else d for d in sizes]


def _feed(value: ir.Value, run: _Run) -> Array:
    """A graph input of the run's size: zeros, ones for masks, counting up for positions."""
    name = str(value.name)
    shape = tuple(
        d if isinstance(d, int) else _length(value, axis, run)
        for axis, d in enumerate(_dims(value))
    )
    if math.prod(shape) > _MOST:
        raise InputError(
            f"A graph input has {math.prod(shape)} elements in one run; at most {_MOST}", where=name
        )
    dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
    if "mask" in name:
        return np.ones(shape, dtype)
    if "position" in name and dtype.kind == "i":
        return np.broadcast_to(np.arange(shape[-1], dtype=dtype) + run.past, shape)
    return np.zeros(shape, dtype)


def _length(value: ir.Value, axis: int, run: _Run) -> int:
    if axis == 0:
        return 1
    if (name := _dims(value)[axis]) in run.symbols:
        return run.symbols[str(name)]
    if _is_sound(value):
        return run.positions * run.hop
    if _is_image(value):
        return 3 if axis == 1 else run.side
    if _is_memory(value):
        return run.past
    return run.past + run.positions if "mask" in str(value.name) else run.positions


def _constant(value: ir.Value) -> Array:
    tensor = value.const_value
    assert tensor is not None
    if tensor.nbytes <= _LARGE:
        return np.asarray(tensor.numpy())
    shape = tuple(int(d) for d in tensor.shape.numpy())
    return np.broadcast_to(np.zeros((), tensor.dtype.numpy()), shape)


def _shapes(model: ir.Model, run: _Run) -> dict[str, ShapeProbe]:
    arrays: dict[ir.Value, Array] = {v: _feed(v, run) for v in model.graph.inputs}
    last, held = _last_uses(model), 0
    found = {str(v.name): _probe(a, run) for v, a in arrays.items()}
    for index, node in enumerate(model.graph):
        outputs = _outputs(node, arrays)
        for value, array in zip(node.outputs, outputs, strict=False):
            arrays[value] = _light(array)
            found[str(value.name)] = _probe(array, run)
        held += sum(_written(arrays[v]) for v in dict.fromkeys(node.outputs) if v in arrays)
        if held > _HELD:
            raise InputError(
                f"The integers of one run take {held} bytes; at most {_HELD}", where=str(node.name)
            )
        for value in last.get(index, ()):
            held -= _written(arrays.pop(value)) if value in arrays else 0
    return found


def _light(array: Array) -> Array:
    """`array`, or zeros of its shape that take no memory where it is large and of real numbers."""
    large = array.dtype.kind not in "iub" and _written(array) > _LARGE
    return _nothing(array.shape, array.dtype) if large else array


def _nothing(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    return np.broadcast_to(np.zeros((), dtype), shape)


def _written(array: Array) -> int:
    """The bytes of `array` in memory."""
    return int(array.nbytes) if all(array.strides) else 0


def _last_uses(model: ir.Model) -> Mapping[int, Iterable[ir.Value]]:
    last: dict[ir.Value, int] = {}
    for index, node in enumerate(model.graph):
        last.update({v: index for v in node.inputs if v is not None})
    ends: dict[int, list[ir.Value]] = {}
    for value, index in last.items():
        ends.setdefault(index, []).append(value)
    return ends


def _probe(array: Array, run: _Run) -> ShapeProbe:
    kind = array.dtype
    name = kind.name if kind.kind in "iubf" else f"float {kind.name}"
    return ShapeProbe(tuple(array.shape), name, run.positions, run.past + run.positions)


def _product(node: ir.Node, arrays: Mapping[ir.Value, Array]) -> Array:
    """The output of a fixed linear as zeros; its weight is not read (codes are made by reading)."""
    value, weight = node.inputs[:2]
    assert value is not None
    assert weight is not None
    assert weight.const_value is not None
    x, outputs = _value(value, arrays), int(weight.const_value.shape.numpy()[1])
    return np.broadcast_to(np.zeros((), x.dtype), (*x.shape[:-1], outputs))


def _outputs(node: ir.Node, arrays: Mapping[ir.Value, Array]) -> tuple[Array, ...]:
    if node.domain == vocabulary.DOMAIN and node.op_type in vocabulary.LINEARS:
        return (_product(node, arrays),)
    inputs = [None if v is None else _value(v, arrays) for v in node.inputs]
    sketch = _sketch(node, inputs)
    if sketch is not None:
        return (sketch,)
    largest = max((a.size for a in inputs if a is not None), default=0)
    if largest > _MOST and node.op_type not in _VIEWS:
        what = f"{node.op_type} reads {largest} elements in one run; at most {_MOST}"
        raise InputError(what, where=str(node.name))
    try:
        with np.errstate(all="ignore"):
            return tuple(np.asarray(a) for a in meaning.compile_node(node)(inputs))
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        shapes = [None if a is None else a.shape for a in inputs]
        raise InputError(
            f"{node.op_type} does not run on shapes {shapes}: {error}", where=str(node.name)
        ) from error


_VIEWS = frozenset({
    "Expand", "Flatten", "Identity", "Reshape", "Shape", "Size", "Slice", "Split", "Squeeze",
    "Transpose", "Unsqueeze",
})  # fmt: skip


def _sketch(node: ir.Node, inputs: Sequence[Array | None]) -> Array | None:
    """A large result of real numbers as zeros that take no memory; None where it is computed."""
    given = [a for a in inputs if a is not None]
    if not given or node.domain not in ("", "ai.onnx") or len(node.outputs) != 1:
        return None
    shape = _foreseen(node, inputs)
    if math.prod(shape) <= _LARGE or not all(a.size for a in given):
        return None
    kind = given[0].dtype
    if meaning.key_of(node) in ELEMENTWISE:
        corners = [a if a is None else a[(slice(1),) * a.ndim] for a in inputs]
        with np.errstate(all="ignore"):
            kind = np.asarray(meaning.compile_node(node)(corners)[0]).dtype
    if kind.kind in "iub":
        return None
    if math.prod(shape) > _SKETCHED:
        what = f"{node.op_type} makes {math.prod(shape):.4g} elements; at most {_SKETCHED}"
        raise InputError(what, where=str(node.name))
    return _nothing(shape, kind)


def _foreseen(node: ir.Node, inputs: Sequence[Array | None]) -> tuple[int, ...]:
    """The shape of the result of an operator that is not looked into where it is large."""
    first, second = (*inputs, None, None)[:2]
    if node.op_type == "CastLike":
        return ()
    if meaning.key_of(node) in ELEMENTWISE:
        return growth.broadcast(inputs)
    if first is not None and second is not None and node.op_type == "MatMul":
        return growth.product(first.shape, second.shape)
    if first is not None and node.op_type in ("LogSoftmax", "Softmax"):
        return tuple(first.shape)
    if node.op_type == "Gather":
        axis = node.attributes.get("axis")
        return growth.gathered(inputs, 0 if axis is None else axis.as_int())
    return ()


def _value(value: ir.Value, arrays: Mapping[ir.Value, Array]) -> Array:
    if value in arrays:
        return arrays[value]
    if value.const_value is not None:
        return _constant(value)
    raise InputError("a value is read before it is made", where=str(value.name))
