"""Keeps a call into native code within bounds that the code itself does not know."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path

_STATM = Path("/proc/self/statm")
_PAGE = 4096


@contextlib.contextmanager
def bounded(size: int) -> Iterator[None]:
    """Within it the process may allocate at most `size` bytes more; where Linux can hold that.

    The propagation of data in onnx's shape inference writes out every element of a vector whose
    length it knows: ten gigabytes for ``Gather(Range(0, 2**27), 0)``.

    Raises:
        MemoryError: by the code inside, when it wants more.
    """
    if not _STATM.exists():
        yield
        return
    resource = importlib.import_module("resource")  # there is none outside Unix
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(_STATM.read_text().split()[0]) * _PAGE + size
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
