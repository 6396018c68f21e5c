"""Finds, contains and maps the external data of a model: one open file and one map per file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import onnx
import onnx_ir as ir

from pfmc.errors import InputError
from pfmc.ingest.files import SourceFile, open_mapped
from pfmc.ingest.tensors import DTYPES, nbytes


@dataclass(frozen=True)
class Extent:
    """Where the bytes of one tensor lie: `size` bytes at `offset` of `file`."""

    file: SourceFile
    offset: int
    size: int

    def bytes(self) -> bytes:
        """A copy of the bytes."""
        return bytes(self.file.data[self.offset : self.offset + self.size])


@dataclass
class ExternalData:
    """The data files of the model at `model_path`, each opened once.

    `trust_root` is a folder within which links are followed; None allows only ordinary files
    (or links to them) inside the model's own folder.
    """

    model_path: Path
    trust_root: Path | None = None
    files: dict[str, SourceFile] = field(default_factory=dict)

    def extent(self, proto: onnx.TensorProto, where: str) -> Extent:
        """Where the bytes of external tensor `proto` lie, all checks passed."""
        entries = {e.key: e.value for e in proto.external_data}
        if not all(isinstance(text, str) for pair in entries.items() for text in pair):
            raise InputError("The reference to external data is not UTF-8 text", where=where)
        location = entries.get("location", "")
        need = nbytes(DTYPES[proto.data_type], int(np.prod(proto.dims, dtype=object)))
        offset = _number(entries, "offset", 0, where)
        length = _number(entries, "length", need, where)
        if length != need:
            raise InputError(
                f"External data of {length} bytes is declared for a tensor of "
                f"{need} bytes (shape {list(proto.dims)})",
                where=where,
            )
        file = self.file(location, where)
        if offset + need > file.size:
            raise InputError(
                f"The data file is too short: bytes {offset} to {offset + need} are asked of "
                f"{file.size}",
                where=f"{where}, {file.path}",
                mend="copy or download the data file again",
            )
        return Extent(file, offset, need)

    def tensor(self, proto: onnx.TensorProto, where: str) -> ir.TensorProtocol:
        """The external tensor as a read-only view of the map; nothing is read."""
        extent = self.extent(proto, where)
        kind, dims = DTYPES[proto.data_type], list(proto.dims)
        if kind.bitwidth < 8:
            raw = np.frombuffer(extent.file.data, np.uint8, extent.size, extent.offset)
            return ir.PackedTensor(raw, kind, shape=ir.Shape(dims), name=proto.name)
        count = extent.size // (kind.bitwidth // 8)
        flat = np.frombuffer(extent.file.data, kind.numpy(), count, extent.offset)
        return ir.Tensor(flat.reshape(dims), dtype=kind, name=proto.name)

    def file(self, location: str, where: str) -> SourceFile:
        """The data file at `location` beside the model, opened at its first use, if it may be.

        Raises:
            InputError: it leaves the folder, or is missing, no regular file or a hard link.
        """
        if location not in self.files:
            path = self._contained(location, where)
            self.files[location] = open_mapped(path, follow=False)
        return self.files[location]

    def _contained(self, location: str, where: str) -> Path:
        """The real path of a data file, if it lies where it may."""
        pure = PurePosixPath(location)
        if not location or "\0" in location or "\\" in location:
            raise InputError(f"External data has the unusable location {location!r}", where=where)
        if pure.is_absolute() or (len(location) > 1 and location[1] == ":"):
            raise InputError(
                f"External data has the absolute location {location!r}",
                where=where,
                mend="keep the data file beside the model and name it without a folder",
            )
        if ".." in pure.parts:
            raise InputError(
                f"External data leaves the model's folder: {location!r}",
                where=where,
                mend="keep the data file beside the model",
            )
        folder = Path(os.path.realpath(self.model_path.parent))
        return self._resolved(folder, location, where)

    def _resolved(self, folder: Path, location: str, where: str) -> Path:
        named = folder / location
        real = Path(os.path.realpath(named))
        root = Path(os.path.realpath(self.trust_root)) if self.trust_root else None
        inside = real.is_relative_to(folder) or (root is not None and real.is_relative_to(root))
        if not inside:
            raise InputError(
                f"External data {location!r} is a link out of the model's folder, to {real}",
                where=where,
                mend=f"if you trust that place, {_advice(folder, real)}",
            )
        try:
            self._check_file(named, real, root, where)
        except OSError as error:  # too long a name, a folder that may not be entered
            raise InputError(
                f"The data file {location[:80]!r} cannot be reached: {error.strerror}", where=where,
                mend="keep the data file beside the model under a plain name",
            ) from error  # fmt: skip
        return real

    def _check_file(self, named: Path, real: Path, root: Path | None, where: str) -> None:
        if not real.exists():
            raise InputError(
                f"The data file is missing: {named}",
                where=where,
                mend="put the data file beside the .onnx file; both are needed",
            )
        if not real.is_file():
            raise InputError(f"The data file is no regular file: {named}", where=where)
        if real.stat().st_nlink > 1 and root is None:
            raise InputError(
                f"The data file has more than one name (hard link), so it may be any file: {named}",
                where=where,
                mend=f"copy it (cp), or if you trust it, {_advice(real.parent, real)}",
            )


def _advice(folder: Path, real: Path) -> str:
    root = os.path.commonpath([folder, real.parent])
    return f"allow links within a folder that holds both: --trust-root {root}"


def _number(entries: dict[str, str], key: str, default: int, where: str) -> int:
    text = entries.get(key)
    if text is None or text == "":
        return default
    if text.startswith("-"):
        raise InputError(f"External data has the negative {key} {text[:40]}", where=where)
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise InputError(f"External data has the unusable {key} {text[:40]!r}", where=where)
    return int(text)
