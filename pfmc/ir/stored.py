"""Constants as their file stores them: views that copy nothing, and pages given back when read.

A lazily widened or transposed constant costs a copy at every reading. Who only compares numbers,
or looks at a few, reads them here.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]

KEY = "pfmc.stored"
"""In a value's ``meta``: a function without arguments that gives the stored numbers as a view."""

_SAMPLE = 24
_PIECE = 1 << 23  # bytes
_SMALL = 1 << 20  # bytes whose pages are not worth a call


def remember(value: ir.Value, view: Callable[[], Array]) -> None:
    """Notes that the constant `value` holds the numbers of `view`, perhaps in a wider type.

    Args:
        value: a constant; view: gives an array of its shape.
    """
    value.meta[KEY] = view


def numbers(value: ir.Value) -> Array:
    """The numbers of a constant in its shape, in the type in which they are stored."""
    view: Callable[[], Array] | None = value.meta.get(KEY)
    if view is not None:
        return view()
    assert value.const_value is not None
    return value.const_value.numpy()


def source(value: ir.Value) -> Callable[[], Array]:
    """`numbers` of `value` as it is now, for a constant that is made of it."""
    view: Callable[[], Array] | None = value.meta.get(KEY)
    tensor = value.const_value
    assert tensor is not None
    return tensor.numpy if view is None else view


def sample(array: Array) -> tuple[str, bytes]:
    """The type of `array` and a few of its numbers, from the first to the last.

    One number of a row, and few rows: each reads a page of the file, and the system adds its
    neighbours.
    """
    places = tuple(np.linspace(0, n - 1, _SAMPLE).astype(int) for n in array.shape)
    found = array.dtype.name, array[places].tobytes() if array.size else b""
    release(array)
    return found


def digest(array: Array) -> bytes:
    """SHA-256 of the numbers in the order of the array, a few megabytes in memory at a time."""
    found = hashlib.sha256()
    step = max(1, _PIECE * len(array) // max(array.nbytes, 1)) if array.ndim else 1
    for start in range(0, len(array) if array.ndim else 1, step):
        piece = array[start : start + step] if array.ndim else array
        found.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        release(piece)
    return found.digest()


def release(array: Array) -> None:
    """Lets the system drop the pages behind `array` if it views a mapped file.

    They are read again when needed. A peak of memory counts them, so who walks through a large
    file gives back what was seen.
    """
    owner = _owner(array)
    if owner is None or array.nbytes < _SMALL:
        return
    low, high = np.lib.array_utils.byte_bounds(array)
    start = low - np.frombuffer(owner, np.uint8).__array_interface__["data"][0]
    page = start - start % mmap.PAGESIZE
    owner.madvise(mmap.MADV_DONTNEED, page, high - low + start - page)


def _owner(array: Array) -> mmap.mmap | None:
    """The mapped file that `array` is a view of."""
    base: Any = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
    return base
