"""Checks tensors before their data is touched: type, dimensions, exact size, finite numbers."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir

from pfmc.errors import InputError
from pfmc.ir.stored import release

MAX_RANK = 16
MAX_ELEMENTS = 1 << 46
EAGER_BYTES = 64 << 20
_PIECE = 1 << 22
_REFUSED_TYPES = {"UNDEFINED", "STRING", "COMPLEX64", "COMPLEX128", "FLOAT6E2M3", "FLOAT6E3M2"}

DTYPES: dict[int, ir.DataType] = {
    int(kind): kind for kind in ir.DataType if kind.name not in _REFUSED_TYPES
}
"""The element types that are accepted."""

_FIELDS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
_PACKED = {
    "float_data": {"FLOAT"},
    "double_data": {"DOUBLE"},
    "int64_data": {"INT64"},
    "uint64_data": {"UINT32", "UINT64"},
}


def check_dtype(number: int, where: str) -> ir.DataType:
    """The element type of this number, if it is accepted."""
    kind = DTYPES.get(number)
    if kind is None:
        raise InputError(
            f"Element type {_type_name(number)} is not supported",
            where=where,
            mend="use floating-point, integer or boolean tensors",
        )
    return kind


def _type_name(number: int) -> str:
    known: dict[int, str] = {v: k for k, v in onnx.TensorProto.DataType.items()}
    return known.get(number, f"number {number}")


def check_dims(dims: list[int], where: str) -> int:
    """The number of elements of a tensor with these dimensions."""
    if len(dims) > MAX_RANK:
        raise InputError(f"A tensor has {len(dims)} dimensions; at most {MAX_RANK}", where=where)
    negative = [d for d in dims if d < 0]
    if negative:
        raise InputError(f"A tensor has the negative dimension {negative[0]}", where=where)
    elements = math.prod(dims)
    sides = math.prod(d for d in dims if d)  # numpy has no empty array of longer sides
    if sides > MAX_ELEMENTS:
        raise InputError(f"Dimensions {dims} span {sides} elements, too many", where=where)
    return elements


def nbytes(kind: ir.DataType, elements: int) -> int:
    """Bytes of `elements` packed elements; sub-byte types fill whole bytes at the end."""
    return (elements * kind.bitwidth + 7) // 8


def check_tensor(proto: onnx.TensorProto, where: str) -> int:
    """Checks everything about a tensor but where external data lies; returns its size in bytes.

    Raises:
        InputError: type, dimensions, several data fields, or data of another size than declared.
    """
    kind = check_dtype(proto.data_type, where)
    elements = check_dims(list(proto.dims), where)
    size = nbytes(kind, elements)
    filled = [f for f in _FIELDS if len(getattr(proto, f))]
    if proto.HasField("raw_data"):
        filled.append("raw_data")
    external = proto.data_location == onnx.TensorProto.EXTERNAL
    if len(filled) + external > 1:
        names = filled + ["external data"] * external
        raise InputError(f"A tensor holds its data more than once: {', '.join(names)}", where=where)
    if proto.HasField("segment"):
        raise InputError("A tensor is stored in segments, which no exporter writes", where=where)
    if not external:
        _check_embedded(proto, kind, elements, filled[0] if filled else "", where)
    return size


def tensor_code(proto: onnx.TensorProto) -> str:
    """The code of `pfmc.ingest.findings` under which `check_tensor` refuses this tensor."""
    if proto.data_type not in DTYPES:
        return "PFM301"
    try:
        check_dims(list(proto.dims), "")
    except InputError:
        return "PFM302"
    return "PFM303"


def _check_embedded(
    proto: onnx.TensorProto, kind: ir.DataType, elements: int, field: str, where: str
) -> None:
    if field == "raw_data":
        have, need, unit = len(proto.raw_data), nbytes(kind, elements), "bytes"
    elif field:
        have, need, unit = len(getattr(proto, field)), _entries(field, kind, elements), "numbers"
        if kind.name not in _PACKED.get(field, {kind.name}) or field == "string_data":
            raise InputError(f"A {kind.name} tensor cannot be held in {field}", where=where)
    else:
        have, need, unit = 0, nbytes(kind, elements), "bytes"
    if have != need:
        raise InputError(
            f"A tensor of type {kind.name} and shape {list(proto.dims)} needs {need} {unit} "
            f"of data but has {have}",
            where=where,
            mend="export the model again; the file is damaged",
        )


def _entries(field: str, kind: ir.DataType, elements: int) -> int:
    """How many numbers a typed data field must have (4-bit types: two per entry)."""
    if field == "int32_data" and kind.bitwidth < 8:
        return nbytes(kind, elements)
    return elements


def check_finite(tensor_name: str, array: np.ndarray) -> None:
    """Refuses NaN and infinity among weights; attention masks of 0 and -inf are let through.

    Args:
        tensor_name: the name for the message.
        array: of any type and layout; only floating-point types are looked at.

    Raises:
        InputError: names the tensor and the index of the first offender.
    """
    if not ir.DataType.from_numpy(array.dtype).is_floating_point():
        return
    order: Literal["C", "F"] = "F" if array.flags.fnc else "C"  # as it lies: no copy
    flat = array.reshape(-1, order=order)
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE]
        bad = _non_finite(piece)
        if bad.any() and not _is_mask(flat):
            _refuse(tensor_name, array, start + int(np.argmax(bad)), order)
        release(piece)


_EXPONENT = {"float16": np.uint16(0x7C00), "bfloat16": np.uint16(0x7F80)}


def _non_finite(piece: np.ndarray) -> np.ndarray:
    """Whether each element is NaN or infinite; by bits for 16-bit types, which are slow else."""
    exponent = _EXPONENT.get(piece.dtype.name)
    if exponent is not None:
        return np.asarray((piece.view(np.uint16) & exponent) == exponent)
    narrow = piece.dtype.itemsize == 1  # the 8-bit types and below
    return np.asarray(~np.isfinite(piece.astype(np.float32) if narrow else piece))


def _is_mask(flat: np.ndarray) -> bool:
    """A lone infinity (fill value) or a tensor of nothing but 0 and -inf (attention mask)."""
    if flat.size == 1:
        return not np.isnan(flat).any()
    return all(
        not bool(np.any((part != 0) & (part != -np.inf)))
        for part in (flat[i : i + _PIECE] for i in range(0, flat.size, _PIECE))
    )


def _refuse(name: str, array: np.ndarray, flat_index: int, order: Literal["C", "F"]) -> None:
    index = tuple(int(i) for i in np.unravel_index(flat_index, array.shape, order))
    raise InputError(
        f"A weight holds {float(array[index])}",
        where=f"tensor {name!r}, index {list(index)}",
        mend="mend the checkpoint: no hardware can hold this number",
    )
