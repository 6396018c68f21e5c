"""Says what a file is from its first bytes, and scans its protobuf structure before parsing."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from pfmc.errors import InputError
from pfmc.ingest.files import SourceFile

_MAGIC = (
    (b"GGUF", 0, "a GGUF file (llama.cpp)"),
    (b"ORTM", 4, "a model in ONNX Runtime's own .ort format"),
    (b"TFL3", 4, "a TensorFlow Lite model"),
    (b"\x89HDF\r\n", 0, "an HDF5 file (Keras)"),
    (b"\x93NUMPY", 0, "a NumPy array"),
    (b"\x1f\x8b", 0, "a gzip archive"),
    (b"7z\xbc\xaf", 0, "a 7z archive"),
    (b"ustar", 257, "a tar archive"),
    (b"\x7fELF", 0, "a program or shared library (ELF)"),
    (b"ftrt", 0, "a TensorRT engine"),
    (b"ptrt", 0, "a TensorRT engine"),
    (b"version https://git-lfs", 0, "a Git LFS pointer, not the file it points to"),
    (b"<!DOCTYPE", 0, "a web page"),
    (b"<html", 0, "a web page"),
    (b"%PDF", 0, "a PDF document"),
    (b"ir_version:", 0, "an ONNX model in text form"),
)
_EXPORT = "export the model to ONNX (torch.onnx.export) and give the .onnx file"
_MENDS = {
    "a Git LFS pointer, not the file it points to": "fetch the real file: git lfs pull",
    "a web page": "download the file itself; the link gave a page",
    "a gzip archive": "unpack it first",
    "a tar archive": "unpack it first",
    "a 7z archive": "unpack it first",
    "an ONNX model in text form": "save it in binary form with onnx.save",
}

MAX_PROTO_BYTES = (1 << 31) - 1
MAX_STRUCTURE_BYTES = 1 << 29
MAX_ENTRIES = 1_000_000

_GRAPH = 7  # field number of ModelProto
_NODE, _INITIALISER, _OTHER = 1, 5, 0  # field numbers of GraphProto; 0 is none
_WORDS = {
    _NODE: "nodes", _INITIALISER: "initialisers", 11: "inputs", 12: "outputs", 13: "values",
    _OTHER: "other fields",
}  # fmt: skip


def recognise(file: SourceFile) -> None:
    """Refuses a file that is empty or evidently something other than ONNX; never unpickles.

    Raises:
        InputError: names what the file looks like.
    """
    head = bytes(file.data[:1024])
    if not head.strip(b"\0"):
        what = "The file is empty" if not file.size else "The file begins with zeros only"
        raise InputError(what, where=str(file.path), mend="download or export it again")
    kind = looks_like(head, file.size)
    if kind:
        raise InputError(
            f"This is {kind}, not an ONNX file",
            where=str(file.path),
            mend=_MENDS.get(kind, _EXPORT),
        )


def looks_like(head: bytes, size: int) -> str:
    """What a file with these first bytes is, in words; empty if it may be ONNX."""
    for magic, offset, words in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return words
    if head.startswith(b"PK\x03\x04"):
        torch = b"data.pkl" in head or b"archive/" in head
        return "a PyTorch checkpoint (zip with pickle)" if torch else "a ZIP archive"
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "a Python pickle (PyTorch checkpoint?), which is never opened"
    if len(head) > 9 and head[8:9] == b"{":
        (length,) = struct.unpack("<Q", head[:8])
        if 2 <= length <= size - 8:
            return "a safetensors file"
    if head.lstrip()[:1] in (b"{", b"["):
        return "a JSON file"
    return ""


@dataclass(frozen=True)
class _Field:
    number: int
    start: int
    end: int


def _varint(data: memoryview, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise _BrokenError(position, "a number that never ends")


class _BrokenError(Exception):
    def __init__(self, position: int, why: str) -> None:
        super().__init__(why)
        self.position, self.why = position, why


def _fields(data: memoryview, position: int, end: int) -> Iterator[_Field]:
    """The fields of the protobuf message in ``data[position:end]``."""
    while position < end:
        tag, start = _varint(data, position, end)
        wire = tag & 7
        if wire == 2:
            length, start = _varint(data, start, end)
            stop = start + length
        elif wire == 0:
            _, stop = _varint(data, start, end)
        elif wire in (1, 5):
            stop = start + (8 if wire == 1 else 4)
        else:
            raise _BrokenError(position, f"bytes of unknown meaning (wire type {wire})")
        if stop > end:
            raise _BrokenError(
                position, f"a field of {stop - start} bytes where {end - start} remain"
            )
        yield _Field(tag >> 3, start, stop)
        position = stop


def scan(file: SourceFile) -> None:
    """Walks the outer protobuf fields and refuses what is damaged or too large, before parsing.

    Raises:
        InputError: truncated, random, or beyond MAX_PROTO_BYTES, MAX_STRUCTURE_BYTES, MAX_ENTRIES.
    """
    where = str(file.path)
    if file.size > MAX_PROTO_BYTES:
        raise InputError(
            f"The file has {file.size} bytes; protobuf ends at 2 GiB",
            where=where,
            mend="save the weights as external data",
        )
    view = memoryview(file.data)
    counts = dict.fromkeys(_WORDS, 0)
    graphs = []
    try:
        for index, entry in enumerate(_fields(view, 0, file.size)):
            if index >= MAX_ENTRIES:
                raise InputError(f"The file has more than {MAX_ENTRIES} fields", where=where)
            if entry.number == _GRAPH:
                graphs.append(entry)
        for graph in graphs:
            _scan_graph(view, graph, where, counts)
    except _BrokenError as broken:
        raise InputError(
            f"Not a valid ONNX file: damaged or cut off at byte {broken.position} of {file.size}: "
            f"{broken.why}",
            where=where,
            mend="download or export it again",
        ) from broken
    finally:
        view.release()
    if not graphs:
        raise InputError("Not a valid ONNX file: it holds no graph", where=where)


def _scan_graph(view: memoryview, graph: _Field, where: str, counts: dict[int, int]) -> None:
    """Walks one message of the graph, of which a file may hold several; `counts` are of all."""
    bulk = 0
    for entry in _fields(view, graph.start, graph.end):
        kind = entry.number if entry.number in _WORDS else _OTHER
        counts[kind] += 1
        if counts[kind] > MAX_ENTRIES:
            raise InputError(f"The graph has more than {MAX_ENTRIES} {_WORDS[kind]}", where=where)
        if entry.number == _INITIALISER:
            bulk += entry.end - entry.start
    structure = graph.end - graph.start - bulk
    if structure > MAX_STRUCTURE_BYTES:
        raise InputError(
            f"The graph without its weights has {structure} bytes; at most {MAX_STRUCTURE_BYTES} "
            "are read",
            where=where,
            mend="store large constants as initialisers",
        )
