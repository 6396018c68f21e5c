"""Writes a graph node by node over the tensors of a checkpoint, which stay where they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from pfmc.errors import InputError
from pfmc.ingest.hf.stored import FLOATS, Stored
from pfmc.ir import vocabulary
from pfmc.ir.stored import remember
from pfmc.ir.vocabulary import DOMAIN, KEY_SCOPE, KEY_SOURCE, KEY_VALUE, KEY_WEIGHT

Dims = tuple[int | str, ...]
BATCH, SEQUENCE, PAST = "batch", "sequence", "past"
TOTAL = f"{PAST} + {SEQUENCE}"
TRANSPOSE_OF = "pfmc.transpose_of"  # as `pfmc.passes.weights` writes it
_SHOWN = 12
_STRIPE = 32


def dims(value: ir.Value) -> Dims:
    """The shape of a value that `Graph` made."""
    assert value.shape is not None
    return tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)


def width(value: ir.Value) -> int:
    """The fixed size of the last axis of a value that `Graph` made."""
    found = dims(value)[-1]
    assert isinstance(found, int)
    return found


@dataclass
class Graph:
    """A graph in the making.

    Attributes:
        stored: the tensors of the checkpoint.
        root: what the parameter names of the base model begin with, e.g. ``"model."``.
        other: what they may begin with instead: checkpoints with and without a head differ.
        where: the checkpoint, for messages.
        spelt: pairs of today's and an older spelling of parts of parameter names.
    """

    stored: Mapping[str, Stored]
    root: str
    other: str
    where: str
    spelt: tuple[tuple[str, str], ...] = ()
    inputs: list[ir.Value] = field(default_factory=list)
    outputs: list[ir.Value] = field(default_factory=list)
    _presents: list[ir.Value] = field(default_factory=list)
    _nodes: list[ir.Node] = field(default_factory=list)
    _held: dict[object, ir.Value] = field(default_factory=dict)
    _names: set[str] = field(default_factory=set)
    _problems: list[str] = field(default_factory=list)
    _used: set[str] = field(default_factory=set)

    # -- values -------------------------------------------------------------------------------

    def input(self, name: str, shape: Dims, kind: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """A new graph input."""
        value = ir.Value(name=self._unique(name), shape=ir.Shape(shape), type=ir.TensorType(kind))
        self.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str) -> None:
        """Makes `value` a graph output called `name`; what `pfmc.value` says stays."""
        value.name = self._unique(name)
        self.outputs.append(value)

    def remember(self, value: ir.Value, name: str) -> None:
        """Makes `value` an output of the KV memory; these stand behind the others."""
        value.name = self._unique(name)
        self._presents.append(value)

    def _unique(self, stem: str) -> str:
        name, count = stem, 0
        while name in self._names:
            count += 1
            name = f"{stem}.{count}"
        self._names.add(name)
        return name

    # -- constants ----------------------------------------------------------------------------

    def constant(self, array: np.ndarray, name: str) -> ir.Value:
        """A constant of our own making; equal ones are one."""
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._held:
            self._hold(key, ir.Tensor(array), name)
        return self._held[key]

    def integers(self, *numbers: int) -> ir.Value:
        """A vector of int64."""
        return self.constant(np.asarray(numbers, np.int64), "pfmc/" + "_".join(map(str, numbers)))

    def number(self, value: float, name: str) -> ir.Value:
        """A float32 scalar."""
        return self.constant(np.asarray(value, np.float32), f"pfmc/{name}")

    def zeros(self, length: int) -> ir.Value:
        """The bias of a product that has none: float32 ``[length]``."""
        key = ("zeros", length)
        if key not in self._held:
            self._hold(key, ir.Tensor(np.zeros(length, np.float32)), f"pfmc/zeros_{length}")
        return self._held[key]

    def _hold(self, key: object, tensor: ir.TensorProtocol, name: str) -> ir.Value:
        tensor.name = name = self._unique(name)
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        self._held[key] = value
        return value

    # -- parameters ---------------------------------------------------------------------------

    def find(self, name: str) -> str | None:
        """What the checkpoint calls parameter `name`: with or without the root, old spellings."""
        if name in self.stored:
            return name
        old = name
        for now, then in self.spelt:
            old = old.replace(now, then)
        for new, legacy in (("Norm.weight", "Norm.gamma"), ("Norm.bias", "Norm.beta")):
            if name.endswith(new):
                old = old.removesuffix(new) + legacy
        candidates = [old]
        for given in (name, old):
            if given.startswith(self.root):
                candidates.append(self.other + given.removeprefix(self.root))
        return next((s for s in candidates if s in self.stored), None)

    def parameter(
        self, name: str, shape: tuple[int, ...], *, turned: bool = False, plus: float = 0.0
    ) -> ir.Value:
        """Parameter `name` as float32: a view of the file where it is float32 there.

        Args:
            name: as the model calls it.
            shape: as it is stored.
            turned: whether the (lazy) transpose is wanted.
            plus: added to every number when it is read.
        """
        known = self.find(name)
        key = ("parameter", known or name, turned, plus)
        if key in self._held:
            return self._held[key]
        tensor = self._tensor(name, known, shape, turned, plus)
        value = self._hold(key, tensor, (known or name) + (":transposed" if turned else ""))
        value.metadata_props[KEY_WEIGHT] = known or name
        table = self._held.get(("parameter", known or name, False, plus))
        if turned and table is not None:
            value.meta[TRANSPOSE_OF] = table.const_value
        if known in self._used and not plus:
            view = self.stored[known].view
            remember(value, (lambda: view().T) if turned else view)
        return value

    def slice(self, name: str, shape: tuple[int, ...], index: int) -> ir.Value:
        """Entry `index` along the first axis of parameter `name` of this shape, as float32."""
        known = self.find(name)
        key = ("slice", known or name, index)
        if key not in self._held:
            faults = len(self._problems)
            part = self._tensor(name, known, shape, False, 0.0)
            if known is not None and len(self._problems) == faults:
                part = tensor_of(self.stored[known], index=index)
            value = self._hold(key, part, f"{known or name}.{index}")
            value.metadata_props[KEY_WEIGHT] = known or name
        return self._held[key]

    def _tensor(
        self, name: str, known: str | None, shape: tuple[int, ...], turned: bool, plus: float
    ) -> ir.TensorProtocol:
        if known is None:
            self._problems.append(f"{name} {list(shape)} is missing")
            return _nothing(shape, turned)
        stored = self.stored[known]
        self._used.add(known)
        if stored.shape != shape:
            self._problems.append(f"{known} is {list(stored.shape)}, not {list(shape)}")
            return _nothing(shape, turned)
        if stored.dtype not in FLOATS:
            self._problems.append(f"{known} is {stored.dtype}, not one of {', '.join(FLOATS)}")
            return _nothing(shape, turned)
        return tensor_of(stored, turned=turned, plus=plus)

    # -- nodes --------------------------------------------------------------------------------

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        shape: Dims,
        at: str,
        *,
        kind: ir.DataType = ir.DataType.FLOAT,
        domain: str = "",
        name: str = "",
        **attributes: float | int | str | Sequence[int],
    ) -> ir.Value:
        """Appends a node with one output of `shape` in module scope `at`; returns the output."""
        (value,) = self.ops(
            op_type, inputs, (shape,), at, kind=kind, domain=domain, name=name, **attributes
        )
        return value

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        shapes: Sequence[Dims],
        at: str,
        *,
        kind: ir.DataType = ir.DataType.FLOAT,
        domain: str = "",
        name: str = "",
        **attributes: float | int | str | Sequence[int],
    ) -> Sequence[ir.Value]:
        """Appends a node with one output for each of `shapes`."""
        stem = self._unique(name or (f"{at}/{op_type}" if at else op_type))
        node = ir.node(
            op_type, inputs, attributes, domain=domain, num_outputs=len(shapes), name=stem
        )
        node.metadata_props[KEY_SOURCE] = f"n{len(self._nodes)}"
        if at:
            node.metadata_props[KEY_SCOPE] = at
        for index, (value, shape) in enumerate(zip(node.outputs, shapes, strict=True)):
            value.name = stem if index == 0 else self._unique(f"{stem}/{index}")
            value.shape, value.type = ir.Shape(shape), ir.TensorType(kind)
        self._nodes.append(node)
        return node.outputs

    def linear(
        self, x: ir.Value, at: str, outputs: int, *, bias: bool, turned: bool = True,
        weight: str = "", bias_name: str = "", observed: bool = True,
    ) -> ir.Value:  # fmt: skip
        """The fixed linear of module `at`: ``[..., in]`` to ``[..., outputs]``.

        Args:
            x: its input; outputs: its width.
            at: its module, also the name of the value it makes.
            bias: whether it has one.
            turned: whether its weight is stored ``[out, in]``, as torch's Linear does.
            weight, bias_name: parameter names, if not ``<at>.weight`` and ``<at>.bias``.
            observed: whether transformers' model has a module `at` with this very output.
        """
        shape = (outputs, width(x)) if turned else (width(x), outputs)
        matrix = self.parameter(weight or f"{at}.weight", shape, turned=turned)
        row = self.zeros(outputs)
        if bias:
            row = self.parameter(bias_name or f"{at}.bias", (outputs,))
        return self._fixed(x, matrix, row, at, observed)

    def expert(
        self, x: ir.Value, at: str, stack: str, index: int, count: int, outputs: int
    ) -> ir.Value:
        """The fixed linear of matrix `index` of the stack ``<at>.<stack>[count, in, outputs]``.

        Its bias is a row of ``<at>.<stack>_bias``; its name is ``<at>.<index>.<stack>``.
        """
        matrix = self.slice(f"{at}.{stack}", (count, width(x), outputs), index)
        row = self.slice(f"{at}.{stack}_bias", (count, outputs), index)
        return self._fixed(x, matrix, row, f"{at}.{index}.{stack}", False)

    def _fixed(
        self, x: ir.Value, matrix: ir.Value, row: ir.Value, at: str, observed: bool
    ) -> ir.Value:
        outputs = width(row)
        y = self.op(
            vocabulary.FIXED_LINEAR, [x, matrix, row], (*dims(x)[:-1], outputs), at,
            domain=DOMAIN, name=at,
        )  # fmt: skip
        node = y.producer()
        assert node is not None
        if observed:
            node.metadata_props[KEY_VALUE] = at
        return y

    # -- the end ------------------------------------------------------------------------------

    def finish(self, name: str, unused: Iterable[str]) -> ir.Model:
        """The model.

        Args:
            name: of the graph.
            unused: parts of parameter names that may stay unread (buffers, other heads).

        Raises:
            InputError: names every parameter that is missing, has another shape, or is left over.
        """
        allowed = tuple(unused)
        extra = sorted(
            n for n in self.stored if n not in self._used and not any(a in n for a in allowed)
        )
        faults = dict.fromkeys(self._problems)  # experts of one stack tell the same fault
        problems = [*faults, *(f"{n} belongs to nothing" for n in extra)]
        if problems:
            more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise InputError(
                "The weights do not fit the configuration: "
                + "; ".join(problems[:_SHOWN]) + more,
                where=self.where,
                mend="config.json and the weights must be of one and the same model",
            )  # fmt: skip
        read = {v for n in self._nodes for v in n.inputs if v is not None}
        graph = ir.Graph(
            self.inputs, [*self.outputs, *self._presents], nodes=self._nodes, name=name,
            initializers=[v for v in self._held.values() if v in read],
            opset_imports={"": vocabulary.OPSET},
        )  # fmt: skip
        model = ir.Model(graph, ir_version=vocabulary.IR_VERSION)
        vocabulary.install(model)
        return model


def tensor_of(
    stored: Stored, *, turned: bool = False, plus: float = 0.0, index: int | None = None
) -> ir.TensorProtocol:
    """A stored matrix or vector as float32, read when asked for: as it is, or its transpose.

    With `index`, of one entry along the first axis.
    """
    view = stored.view() if index is None else stored.view()[index]
    if view.dtype == np.float32 and not plus and not turned:
        return ir.Tensor(view)

    def read() -> ir.TensorProtocol:
        wide = view.astype(np.float32) + np.float32(plus) if plus else view
        return ir.Tensor(_transposed(wide) if turned else wide.astype(np.float32, copy=False))

    shape = view.shape[::-1] if turned else view.shape
    return ir.LazyTensor(read, ir.DataType.FLOAT, ir.Shape(shape))


def _transposed(matrix: np.ndarray) -> np.ndarray:
    """The transpose in float32, written in stripes that fit the cache: 3.5 times numpy's speed.

    A strided view would cost nothing here and twice as much in every pass that reads it.
    """
    made = np.empty(matrix.shape[::-1], np.float32)
    for start in range(0, len(matrix), _STRIPE):
        stripe = matrix[start : start + _STRIPE].astype(np.float32, copy=False)
        made[:, start : start + _STRIPE] = stripe.T
    return made


def _nothing(shape: tuple[int, ...], turned: bool) -> ir.TensorProtocol:
    """Stands for a parameter that is at fault, until all faults are told."""

    def read() -> ir.TensorProtocol:
        raise AssertionError("a model with faults is never handed out")

    return ir.LazyTensor(read, ir.DataType.FLOAT, ir.Shape(shape[::-1] if turned else shape))
