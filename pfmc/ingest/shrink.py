"""Reads a model that shall be cut smaller, says how valid a file is, and writes candidates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import checker

from pfmc.errors import PfmcError
from pfmc.ingest import branches, dialects, shapes
from pfmc.ingest.external import Extent, ExternalData
from pfmc.ingest.files import find, open_mapped
from pfmc.ingest.guard import Guard
from pfmc.ingest.load import parse
from pfmc.ingest.order import in_order
from pfmc.ingest.tensors import check_tensor

Array = npt.NDArray[Any]

EMBED_BYTES = 1 << 30
_FILL_ELEMENTS = 1 << 20
_RECORDED = 4096  # elements of a recorded constant, at most
_NUMBERS = "biuf"  # NumPy's kinds that stand for themselves
_BOMBS = frozenset({"PFM106", "PFM107"})
_INTEGERS = frozenset({onnx.TensorProto.INT32, onnx.TensorProto.INT64, onnx.TensorProto.BOOL})


@dataclass
class Subject:
    """A model to be cut, and what is known of its values.

    Attributes:
        proto: the model; its nodes in topological order where they have one.
        path: the file it came from; external: its data files.
        types: value name -> type; values: integers and flags that were recorded in a run.
        strictness: 2 if the file passes onnx's full check, 1 its plain one, 0 neither.
    """

    proto: onnx.ModelProto
    path: Path
    external: ExternalData
    types: dict[str, onnx.TypeProto]
    strictness: int
    values: Mapping[str, Array] = field(default_factory=dict)

    def questions(self) -> list[str]:
        """Inner values of integer or flag type, and those of unknown type or rank: for a run."""
        made = (o for n in self.proto.graph.node for o in n.output if o)
        return [o for o in made if o not in self.types or _worth_asking(self.types[o])]

    def learn(self, found: Mapping[str, Array]) -> None:
        """Takes what a run showed: types and shapes that were unknown, and small integers."""
        for name, array in found.items():
            kind = self.types.get(name)
            unknown = kind is None or not kind.tensor_type.HasField("shape")
            if unknown and array.dtype.kind in _NUMBERS:
                number = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
                self.types[name] = onnx.helper.make_tensor_type_proto(number, array.shape)
        self.values = {
            n: a for n, a in found.items()
            if _element(self.types.get(n)) in _INTEGERS and a.size <= _RECORDED
        }  # fmt: skip

    def read(self, tensor: onnx.TensorProto) -> Array:
        """The numbers of an initialiser, wherever they lie; those outside as a view.

        Raises:
            PfmcError: they cannot be had.
        """
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return onnx.numpy_helper.to_array(tensor)
        check_tensor(tensor, tensor.name)
        return self.external.tensor(tensor, tensor.name).numpy()

    def constant(self, name: str, *, real: bool) -> Array | None:
        """A constant in place of value `name`: as recorded, or where `real` 0.5 everywhere."""
        if name in self.values:
            return self.values[name]
        kind = self.types.get(name)
        if not real or kind is None or kind.tensor_type.elem_type != onnx.TensorProto.FLOAT:
            return None
        dims = kind.tensor_type.shape.dim
        sizes = [d.dim_value for d in dims if d.HasField("dim_value")]
        known = kind.tensor_type.HasField("shape") and len(sizes) == len(dims)
        if not known or int(np.prod(sizes, dtype=object)) > _FILL_ELEMENTS:
            return None
        return np.full(sizes, 0.5, np.float32)


def _element(kind: onnx.TypeProto | None) -> int:
    return kind.tensor_type.elem_type if kind is not None else 0


def _worth_asking(kind: onnx.TypeProto) -> bool:
    return _element(kind) in _INTEGERS or not kind.tensor_type.HasField("shape")


def open_subject(path: Path) -> Subject:
    """Reads `path` for cutting; nothing is refused that can be parsed.

    Raises:
        UsageError: there is no such file.
        InputError: the file is no ONNX model.
    """
    file = open_mapped(find(path), follow=True)
    proto = parse(file)
    branches.specialise(proto)
    nodes = in_order(proto.graph.node)
    if len(nodes) == len(proto.graph.node):  # in a circle there is no order
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)
    found = Guard(proto, str(path), frozenset(dialects.LOWERINGS)).findings()
    bomb = bool(_BOMBS & {f.code for f in found}) or any(f.code == "PFM002" for f in found)
    strictness = 0 if bomb else strictness_of(path)
    types = {} if bomb else shapes.known_types(proto)
    return Subject(proto, file.path, ExternalData(file.path), types, strictness)


def strictness_of(path: Path) -> int:
    """2 if the file at `path` passes onnx's full check, 1 the plain one, 0 neither."""
    try:
        checker.check_model(str(path))
    except (checker.ValidationError, ValueError, RuntimeError):
        return 0
    try:
        checker.check_model(str(path), full_check=True)
    except (checker.ValidationError, onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        return 1
    return 2


def write(proto: onnx.ModelProto, path: Path, external: ExternalData) -> None:
    """Writes `proto` as an ordinary file; data from outside goes in, or beside it if it is large.

    A reference to data that cannot be had is written as it is.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    found: list[tuple[onnx.TensorProto, Extent]] = []
    for tensor in copy.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            try:
                found.append((tensor, external.extent(tensor, tensor.name)))
            except PfmcError:
                continue  # what cannot be had may be the very failure that is looked for
    if sum(extent.size for _, extent in found) <= EMBED_BYTES:
        _embed(found)
    else:
        _put_beside(found, path.with_name(f"{path.name}.data"))
    path.write_bytes(copy.SerializeToString(deterministic=True))


def _embed(found: list[tuple[onnx.TensorProto, Extent]]) -> None:
    for tensor, extent in found:
        tensor.ClearField("data_location")
        tensor.ClearField("external_data")
        tensor.raw_data = extent.bytes()


def _put_beside(found: list[tuple[onnx.TensorProto, Extent]], path: Path) -> None:
    with path.open("wb") as file:
        for tensor, extent in found:
            where = {"location": path.name, "offset": file.tell(), "length": extent.size}
            tensor.ClearField("external_data")
            for key, value in where.items():
                tensor.external_data.add(key=key, value=str(value))
            file.write(extent.bytes())
