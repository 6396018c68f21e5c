"""Opens the files of a model once, without following links, and maps them instead of reading."""

from __future__ import annotations

import difflib
import functools
import hashlib
import mmap
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from pfmc.errors import FileError, InputError, UsageError

_CHUNK = 1 << 22


@dataclass(frozen=True)
class SourceFile:
    """A file the model was read from: its path, its size in bytes and (when asked) its hash."""

    path: Path
    size: int
    data: mmap.mmap | bytes = field(repr=False, compare=False)

    @functools.cached_property
    def sha256(self) -> str:
        """Hex digest of the content, computed at first use in pieces of 4 MiB."""
        digest = hashlib.sha256()
        view = memoryview(self.data)
        for start in range(0, self.size, _CHUNK):
            digest.update(view[start : start + _CHUNK])
            self._drop(start, min(_CHUNK, self.size - start))
        return digest.hexdigest()

    def release(self) -> None:
        """Lets the system drop the pages of this file that were read."""
        self._drop(0, self.size)

    def _drop(self, start: int, length: int) -> None:
        if isinstance(self.data, mmap.mmap):
            self.data.madvise(mmap.MADV_DONTNEED, start, length)


def open_mapped(path: Path, *, follow: bool) -> SourceFile:
    """Maps the regular file `path` read-only.

    Args:
        path: the file.
        follow: whether the last part of the path may be a symbolic link.

    Raises:
        InputError: it is not a regular file.
        FileError: the system refused to open it.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise FileError(f"Cannot open the file: {error.strerror}", where=str(path)) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InputError("This is not a regular file", where=str(path))
        if status.st_size == 0:
            return SourceFile(path, 0, b"")
        mapped = mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ)
        return SourceFile(path, status.st_size, mapped)
    except OSError as error:
        raise FileError(f"Cannot map the file: {error.strerror}", where=str(path)) from error
    finally:
        os.close(descriptor)


def find(path: str | Path) -> Path:
    """`path` as a Path to an existing file.

    Raises:
        UsageError: there is no such file (the nearest name is told), or it is a folder.
    """
    given = Path(path)
    if "\0" in str(given):
        raise UsageError("A file name cannot hold a NUL", where=repr(str(given))[:200])
    try:
        if given.is_dir():
            raise UsageError(
                "This is a folder, not an ONNX file", where=str(given), mend=_in(given)
            )
        if not given.exists():
            raise UsageError("No such file", where=str(given), mend=_near(given))
    except OSError as error:
        raise UsageError(
            f"No usable file name: {error.strerror}", where=str(given)[:200]
        ) from error
    return given


def _in(folder: Path) -> str:
    models = sorted(p.name for p in folder.glob("*.onnx"))
    if not models:
        return "name the .onnx file itself; this folder has none"
    return f"name the file, for example {folder / models[0]}"


def _near(missing: Path) -> str:
    folder = missing.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist either"
    names = [p.name for p in folder.iterdir()]
    near = difflib.get_close_matches(missing.name, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {folder / near[0]}?"
    models = sorted(n for n in names if n.endswith(".onnx"))
    return f"{folder} holds: {', '.join(models[:8])}" if models else f"{folder} holds no .onnx file"
