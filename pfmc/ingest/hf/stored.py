"""Safetensors files as mapped views: headers checked to the last byte, weights never copied.

The format: 8 bytes little-endian length N, N bytes of JSON ``{name: {dtype, shape, data_offsets}}``
and then the tensors without gaps (https://github.com/huggingface/safetensors, README "Format").
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import numpy as np
import onnx_ir as ir

from pfmc.errors import InputError
from pfmc.ingest.external import ExternalData
from pfmc.ingest.files import SourceFile
from pfmc.ingest.hf.strict_json import Object, parse_object
from pfmc.ingest.tensors import check_dims

HEADER_CAP = 100_000_000
"""Bytes of header that the safetensors library itself accepts."""

INDEX_CAP = 100_000_000
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

FLOATS = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}
"""Element types that a weight may have."""

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F32": 32, "F16": 16, "BF16": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file: `size` bytes from `offset` on.

    Attributes:
        name, dtype, shape: as the header says, e.g. ``BF16``.
        file, offset, size: where the bytes lie.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: SourceFile
    offset: int
    size: int

    def view(self) -> np.ndarray:
        """A read-only view ``shape`` of the mapped bytes; nothing is read now."""
        kind = FLOATS[self.dtype]
        count = self.size // (kind.bitwidth // 8)
        flat = np.frombuffer(self.file.data, kind.numpy(), count, self.offset)
        return flat.reshape(self.shape)


def read_all(places: ExternalData) -> tuple[dict[str, Stored], tuple[SourceFile, ...]]:
    """Every tensor of a checkpoint by name, and the files in order (index first).

    Args:
        places: opens the files beside ``config.json``.

    Raises:
        InputError: a header or the index is damaged or hostile, or there are no safetensors.
    """
    folder = places.model_path.parent
    if (folder / INDEX).exists():
        return _sharded(places)
    if (folder / SINGLE).exists():
        file = places.file(SINGLE, str(folder))
        return read_header(file), (file,)
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(
        p.name for pattern in ("*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern)
    )
    if pickles:
        raise InputError(
            f"The weights are pickles ({pickles[0]}), which can run any code when they are opened",
            where=str(folder),
            mend='where you trust them: python -c "from transformers import AutoModel; '
            "AutoModel.from_pretrained('.').save_pretrained('converted')\" writes safetensors "
            "(take the class that config.json names, to keep the head)",
        )
    raise InputError(
        f"There are no weights: neither {SINGLE} nor {INDEX}",
        where=str(folder),
        mend="download the whole checkpoint",
    )


def _sharded(places: ExternalData) -> tuple[dict[str, Stored], tuple[SourceFile, ...]]:
    """The tensors of all shards, where the index says they are."""
    where = str(places.model_path.parent / INDEX)
    index = places.file(INDEX, where)
    body = parse_object(bytes(index.data[:]), where, cap=INDEX_CAP)
    table = body.get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
        raise InputError("The index has no `weight_map` of names to file names", where=where)
    shards = {name: places.file(name, where) for name in sorted(set(table.values()))}
    found: dict[str, Stored] = {}
    for name, file in shards.items():
        for key, stored in read_header(file).items():
            if key in found:
                raise InputError(f"The tensor {key!r} stands in two shards", where=str(file.path))
            if table.get(key) != name:
                raise InputError(
                    f"The index says that {key!r} is in {table.get(key)}, not in {name}",
                    where=str(file.path),
                    mend="download the checkpoint again; its files do not belong together",
                )
            found[key] = stored
    absent = [key for key in table if key not in found]
    if absent:
        raise InputError(
            f"The index names {len(absent)} tensors that no shard has: {', '.join(absent[:8])}",
            where=where,
            mend="download the checkpoint again; its files do not belong together",
        )
    return found, (index, *shards.values())


def read_header(file: SourceFile) -> dict[str, Stored]:
    """The tensors of one safetensors file, checked against each other and the file's size."""
    where = str(file.path)
    if file.size < 10:
        raise InputError(f"{file.size} bytes are no safetensors file", where=where)
    length = int.from_bytes(file.data[:8], "little")
    if length > min(HEADER_CAP, file.size - 8) or length < 2:
        raise InputError(
            f"The header claims {length} bytes; the file has {file.size}, "
            f"and more than {HEADER_CAP} are never accepted",
            where=where,
            mend="download the file again: it is cut off, or no safetensors file",
        )
    header = parse_object(bytes(file.data[8 : 8 + length]), where, cap=HEADER_CAP)
    _check_metadata(header.pop("__metadata__", {}), where)
    found = {name: _entry(name, entry, file, 8 + length) for name, entry in header.items()}
    _check_extents(found.values(), file, 8 + length)
    return found


def _check_metadata(found: object, where: str) -> None:
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise InputError("`__metadata__` must map names to text", where=where)


def _entry(name: str, entry: object, file: SourceFile, start: int) -> Stored:
    where = f"{file.path}: tensor {name[:200]!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError("An entry needs just dtype, shape and data_offsets", where=where)
    bits = _BITS.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if bits is None:
        raise InputError(f"The element type {str(entry['dtype'])[:40]!r} is unknown", where=where)
    shape, (begin, end) = _naturals(entry, "shape", where), _offsets(entry, where)
    need = check_dims(shape, where) * bits // 8
    if end - begin != need:
        raise InputError(
            f"{end - begin} bytes are given for shape {shape} of {entry['dtype']}, not {need}",
            where=where,
        )
    return Stored(name, entry["dtype"], tuple(shape), file, start + begin, need)


def _offsets(entry: Object, where: str) -> tuple[int, int]:
    numbers = _naturals(entry, "data_offsets", where)
    if len(numbers) != 2 or numbers[0] > numbers[1]:
        raise InputError(f"`data_offsets` {numbers[:4]} are no begin and end", where=where)
    return numbers[0], numbers[1]


def _naturals(entry: Object, key: str, where: str) -> list[int]:
    found = entry[key]
    if isinstance(found, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in found):
        return found
    raise InputError(f"`{key}` is no list of whole numbers", where=where)


def _check_extents(tensors: Iterable[Stored], file: SourceFile, start: int) -> None:
    """The tensors follow each other without gap or overlap up to the last byte."""
    place, before = start, "the header"
    for stored in sorted(tensors, key=lambda t: (t.offset, t.size)):
        if stored.offset != place:
            fault = "overlaps" if stored.offset < place else "leaves a gap after"
            raise InputError(f"{stored.name!r} {fault} {before}", where=str(file.path))
        place, before = stored.offset + stored.size, repr(stored.name)
    if place != file.size:
        raise InputError(
            f"The tensors end at byte {place}, the file at {file.size}",
            where=str(file.path),
            mend="download the file again",
        )


def names(found: Iterable[Stored]) -> str:
    """A few names for a message."""
    listed = sorted(t.name for t in found)
    return ", ".join(chain(listed[:8], ["…"] if len(listed) > 8 else []))
