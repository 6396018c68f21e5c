"""Says everything that is wrong with, or worth knowing about, a model file before any pass."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from pfmc.errors import FileError, InputError
from pfmc.ingest import branches, dialects, shapes
from pfmc.ingest.checkpoint import is_checkpoint, load_checkpoint
from pfmc.ingest.external import ExternalData
from pfmc.ingest.files import find, open_mapped
from pfmc.ingest.findings import MAX_FINDINGS, Finding, from_error
from pfmc.ingest.guard import Guard
from pfmc.ingest.load import build, drop_traces, map_weights, modernise, normalise, parse
from pfmc.ingest.lowering import Lowering
from pfmc.ingest.order import label
from pfmc.ingest.rewrite import Builder
from pfmc.ingest.tensors import check_finite, check_tensor
from pfmc.ir import stored

USUAL_OPSET = 18
_PLAIN_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_NARROW = 8  # bits of a quantised weight, at most
_SHOWN = 4
_MATRIX_USERS = frozenset({"Conv", "Gather", "Gemm", "MatMul", "Transpose"})
_CANONICAL_KV = re.compile(r"past_key_values\.\d+\.(key|value)")
_KV_WORDS = re.compile(r"past|cache|kv", re.IGNORECASE)


Progress = Callable[[str], None]


def silent(_: str) -> None:
    """No progress shown."""


@dataclass(frozen=True)
class SourceLint:
    """What can be said of a file before any pass.

    Attributes:
        path: the file.
        findings: in the order of the checks.
        model: the uniform graph at stage SOURCE; None if there are errors.
        labels: the name of each source node: ``labels[12]`` is that of ``n12``.
    """

    path: Path
    findings: tuple[Finding, ...]
    model: ir.Model | None
    labels: tuple[str, ...] = ()


def lint_source(
    path: str | Path, trust_root: Path | None = None, progress: Progress = silent
) -> SourceLint:
    """Looks at the ONNX file or the checkpoint `path`; every weight is read once.

    Args:
        path: the file or the checkpoint's folder.
        trust_root: a folder within which external data may be reached through links.
        progress: takes a word for each step.

    Raises:
        UsageError: there is no such file.
        FileError: the system refused to read it.
    """
    if is_checkpoint(Path(path)):
        return _lint_checkpoint(Path(path), trust_root)
    file = open_mapped(find(path), follow=True)
    name = str(file.path)
    try:
        proto = parse(file)
        branches.specialise(proto)
    except InputError as error:
        return SourceLint(file.path, (from_error("PFM001", error, name),), None)
    drop_traces(proto)
    progress("guard")
    guarded = Guard(proto, name, frozenset(dialects.LOWERINGS)).findings()
    work = _Work(proto, name, ExternalData(file.path, trust_root), progress)
    if guarded:
        work.external_data()
        return SourceLint(file.path, (*guarded, *work.found)[:MAX_FINDINGS], None)
    model = work.run()
    return SourceLint(file.path, tuple(work.found), model, tuple(map(label, proto.graph.node)))


def _lint_checkpoint(path: Path, trust_root: Path | None) -> SourceLint:
    try:
        loaded = load_checkpoint(path, trust_root=trust_root)
    except InputError as error:
        return SourceLint(path, (from_error("PFM009", error, str(path)),), None)
    found = [*_not_finite(loaded.model, str(path)), *_notes(loaded.model)]
    loaded.release()
    model = None if any(f.severity == "error" for f in found) else loaded.model
    return SourceLint(path, tuple(found), model, tuple(str(n.name) for n in loaded.model.graph))


@dataclass
class _Work:
    """A file that the guard let through."""

    proto: onnx.ModelProto
    file: str
    external: ExternalData
    progress: Progress

    def __post_init__(self) -> None:
        self.found: list[Finding] = []

    def run(self) -> ir.Model | None:
        """The uniform graph, if nothing is wrong; `found` says what is."""
        self.found += _old_opset(self.proto)
        self.found += _inputs(self.proto)
        self.external_data()
        views = None if self.errors() else self._views()
        self._shapes()
        if views is None:  # no graph can be built
            return None
        if self.errors():
            self._in_vain(views)
            return None
        model = self._normalised(views)
        if model is not None:
            self._weights(model)
        return None if self.errors() else model

    def errors(self) -> bool:
        return any(f.severity == "error" for f in self.found)

    def external_data(self) -> None:
        """Every external tensor by itself, so that each missing file is told."""
        self.progress("external data")
        for tensor in self.proto.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL and _is_sound(tensor):
                try:
                    self.external.extent(tensor, f"{self.file}: tensor {tensor.name!r}")
                except (InputError, FileError) as error:
                    place = error.where.removeprefix(f"{self.file}: ")
                    self.found.append(
                        Finding("PFM304", error.what, place, error.mend, tensors=(tensor.name,))
                    )

    def _shapes(self) -> None:
        """Every operation whose operands do not fit."""
        self.progress("shapes")
        try:
            shapes.infer(self.proto, self.file)
        except InputError as error:
            names = {label(n) for n in self.proto.graph.node}
            for what in (error.what, *getattr(error, "__notes__", ())):
                quoted = re.search(r"node name: ([^)]*)\)", what)
                nodes = (quoted[1],) if quoted and quoted[1] in names else ()
                self.found.append(Finding("PFM208", what, "", error.mend, nodes))

    def _views(self) -> dict[str, ir.TensorProtocol] | None:
        try:
            return map_weights(self.proto, self.external)
        except InputError as error:  # only attributes are left: the weights were seen
            self.found.append(from_error("PFM304", error, self.file))
            return None

    def _in_vain(self, views: dict[str, ir.TensorProtocol]) -> None:
        """What else is wrong with a file whose shapes do not fit: numbers and operators."""
        try:
            model = build(self.proto, views)
        except InputError as error:
            self.found.append(from_error("PFM109", error, self.file))
            return
        self.progress("weights")
        self.found += _not_finite(model, self.file)
        self.found += self._refused(model)

    def _normalised(self, views: dict[str, ir.TensorProtocol]) -> ir.Model | None:
        self.progress("operators")
        try:
            model = build(self.proto, views)
        except InputError as error:
            self.found.append(from_error("PFM109", error, self.file))
            return None
        try:
            normalise(model)
        except InputError as error:
            first = from_error("PFM110", error, self.file, nodes=_named(error))
            more = self._refused(build(self.proto, views))
            self.found += [first, *(f for f in more if f.nodes != first.nodes)]
            self.found += _not_finite(build(self.proto, views), self.file)
            return None
        return model

    def _refused(self, model: ir.Model) -> Iterator[Finding]:
        """Every dialect node that cannot be lowered: each is tried, whatever became of others."""
        try:
            modernise(model)
        except InputError:
            return  # the finding that led here says so already
        builder = Builder(model.graph)
        for node in [n for n in model.graph if (n.domain, n.op_type) in dialects.LOWERINGS]:
            builder.at(node)
            try:
                dialects.lower_node(Lowering(node, builder, {}))
            except InputError as error:
                yield from_error("PFM110", error, self.file, nodes=(str(node.name),))

    def _weights(self, model: ir.Model) -> None:
        self.progress("weights")
        self.found += [*_not_finite(model, self.file), *_notes(model)]
        for file in self.external.files.values():
            file.release()


def _is_sound(tensor: onnx.TensorProto) -> bool:
    """Whether type and dimensions are such that a size can be told."""
    try:
        check_tensor(tensor, "")
    except InputError:
        return False  # the guard says so
    return True


def _not_finite(model: ir.Model, file: str) -> Iterator[Finding]:
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype.is_floating_point():
            try:
                check_finite(name, stored.numbers(value))
            except InputError as error:
                yield from_error("PFM305", error, file, tensors=(name,))


def _notes(model: ir.Model) -> Iterator[Finding]:
    yield from _odd_types(model)
    yield from _shared(model)
    yield from _repeated(model)


def _named(error: InputError) -> tuple[str, ...]:
    """The node that an error's ``where`` quotes."""
    quoted = re.search(r"node '([^']*)'", error.where)
    return (quoted[1],) if quoted else ()


def _old_opset(proto: onnx.ModelProto) -> Iterator[Finding]:
    (version,) = {o.version for o in proto.opset_import if o.domain == ""}
    if version < USUAL_OPSET:
        mend = f"nothing need be done; exports from opset {USUAL_OPSET} on keep more of the model"
        yield Finding("PFM008", f"Opset {version} is old", "", mend)


# -- inputs --------------------------------------------------------------------------------------


def _inputs(proto: onnx.ModelProto) -> Iterator[Finding]:
    held = {t.name for t in proto.graph.initializer}
    given = [v for v in proto.graph.input if v.name not in held]
    shapes = {v.name: [_word(d) for d in v.type.tensor_type.shape.dim] for v in given}
    yield from _numbers_as_text(shapes)
    yield from _dynamic(shapes)
    yield from _fixed_length(given)
    odd = [v.name for v in given if _odd_memory(v)]
    if odd:
        what = f"{len(odd)} inputs look like KV memory under other names: {', '.join(odd[:3])}"
        yield Finding("PFM403", what, tensors=tuple(odd))


def _numbers_as_text(shapes: dict[str, list[int | str]]) -> Iterator[Finding]:
    for name, words in shapes.items():
        numbers = [w for w in words if isinstance(w, str) and w.isdecimal()]
        if numbers:
            what = f"Dimension {', '.join(map(repr, numbers))} is text and is read as a number"
            yield Finding("PFM404", what, f"input {name!r}", tensors=(name,))


def _dynamic(shapes: dict[str, list[int | str]]) -> Iterator[Finding]:
    names = [n for n, words in shapes.items() if any(map(_is_symbol, words))]
    if names:
        told = "; ".join(f"{n} [{', '.join(map(str, shapes[n]))}]" for n in names[:_SHOWN])
        more = f"; and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        what = f"{len(names)} inputs have dynamic dimensions: {told}{more}"
        yield Finding("PFM401", what, tensors=tuple(names))


def _is_symbol(word: int | str) -> bool:
    return isinstance(word, str) and not word.isdecimal()


def _word(dim: onnx.TensorShapeProto.Dimension) -> int | str:
    return dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?"


def _fixed_length(given: list[onnx.ValueInfoProto]) -> Iterator[Finding]:
    """Token ids of a fixed length above one; a step of one token is a decoder's."""
    for value in given:
        kind, dims = value.type.tensor_type.elem_type, value.type.tensor_type.shape.dim
        tokens = kind in (onnx.TensorProto.INT32, onnx.TensorProto.INT64) and len(dims) == 2
        if tokens and dims[1].HasField("dim_value") and dims[1].dim_value > 1:
            yield Finding(
                "PFM402",
                f"It always takes {dims[1].dim_value} positions",
                f"input {value.name!r}",
                "export with a dynamic sequence dimension, or fill up every input to that length",
                tensors=(value.name,),
            )


def _odd_memory(value: onnx.ValueInfoProto) -> bool:
    looks = _KV_WORDS.search(value.name) and len(value.type.tensor_type.shape.dim) == 4
    return bool(looks) and not _CANONICAL_KV.fullmatch(value.name)


# -- weights -------------------------------------------------------------------------------------


def _odd_types(model: ir.Model) -> Iterator[Finding]:
    by_type: dict[str, list[str]] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and _odd(tensor):
            by_type.setdefault(tensor.dtype.name, []).append(name)
    for kind, names in sorted(by_type.items()):
        yield Finding(
            "PFM306", f"{len(names)} weights are of type {kind}", mend="", tensors=tuple(names)
        )


def _odd(tensor: ir.TensorProtocol) -> bool:
    if tensor.dtype.is_floating_point():
        return tensor.dtype not in _PLAIN_FLOATS and tensor.size > 1
    narrow = tensor.dtype.bitwidth <= _NARROW and tensor.dtype != ir.DataType.BOOL
    return narrow and len(tensor.shape) >= 2 and tensor.size > 1


def _matrices(model: ir.Model) -> Iterator[tuple[str, ir.Value, ir.TensorProtocol]]:
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and len(tensor.shape) >= 2 and tensor.dtype.is_floating_point():
            yield name, value, tensor


def _shared(model: ir.Model) -> Iterator[Finding]:
    for name, value, tensor in _matrices(model):
        users = [n for n, _ in value.uses()]
        if len(users) > 1 and tensor.size > 1 and any(n.op_type in _MATRIX_USERS for n in users):
            what = f"{len(users)} operations use one matrix: {_ops(users)}"
            nodes = tuple(str(n.name) for n in users)
            yield Finding("PFM307", what, f"tensor {name!r}", nodes=nodes, tensors=(name,))


def _ops(nodes: list[ir.Node]) -> str:
    return ", ".join(f"{op} x {n}" for op, n in sorted(Counter(n.op_type for n in nodes).items()))


def _repeated(model: ir.Model) -> Iterator[Finding]:
    """Matrices of equal type, shape and bytes; only those of equal size are read."""
    sizes: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, _, tensor in _matrices(model):
        if tensor.size > 1:
            sizes.setdefault((tensor.dtype.name, tuple(tensor.shape.numpy())), []).append(name)
    for names in sizes.values():
        yield from _equal(model, names) if len(names) > 1 else ()


def _equal(model: ir.Model, names: list[str]) -> Iterator[Finding]:
    """Those of `names` that hold equal numbers; all are read of those alike in a few alone."""
    held = model.graph.initializers
    alike: dict[object, list[str]] = {}
    for name in names:
        alike.setdefault(stored.sample(stored.numbers(held[name])), []).append(name)
    groups: dict[bytes, list[str]] = {}
    for name in (n for some in alike.values() if len(some) > 1 for n in some):
        groups.setdefault(stored.digest(stored.numbers(held[name])), []).append(name)
    for same in groups.values():
        if len(same) > 1:
            what = f"{len(same)} matrices hold the same numbers: {', '.join(same[:3])}"
            yield Finding("PFM308", what + (", ..." if len(same) > 3 else ""), tensors=tuple(same))
