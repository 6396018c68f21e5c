"""Writes a copy of a model with an adapter added to its weights: the truth beside which one runs.

Which stored tensor a layer's weight came from is proved by its numbers, not only by its name: a
file may hold it transposed, or under a name that an exporter made up.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from pfmc.errors import InputError
from pfmc.ingest.checkpoint import CONFIG
from pfmc.ingest.external import ExternalData
from pfmc.ingest.hf.stored import FLOATS, SINGLE, Stored, read_all
from pfmc.ingest.load import load

Array = npt.NDArray[np.float32]

STEM = "merged"
_FAR = 0.7
"""Relative error above which a tensor is another weight; codes of 2 bits are off by 0.5."""
_INLINE = 1 << 20
"""Bytes of a changed tensor that stay in the ONNX file itself."""
_KINDS = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16})


@dataclass(frozen=True)
class Change:
    """What an adapter does to one layer.

    Attributes:
        layer: its name; weight: what its weight was called in the source, as far as is known.
        added: float32 ``[in, out]``, added to the weight.
        near: float32 ``[in, out]``, the sum up to the rounding of a quantised weight.
    """

    layer: str
    weight: str
    added: Array
    near: Array


def write_merged(source: Path, changes: Sequence[Change], folder: Path) -> Path:
    """Writes the model at `source`, its weights changed, into `folder`.

    A changed weight keeps its element type in an ONNX file and becomes float32 in a checkpoint. One
    weight stands in memory at a time; the rest is copied from file to file.

    Args:
        source: an ONNX file, or the ``config.json`` of a checkpoint.
        changes: one for each adapted layer.
        folder: an empty folder.

    Returns:
        the ONNX file, or the ``config.json``.

    Raises:
        InputError: a layer's weight is neither a tensor of the source nor a part of a packed one.
    """
    if source.name == CONFIG:
        return _checkpoint(source, changes, folder)
    load(source)  # the guard
    model = onnx.load(source, load_external_data=False)
    _bring(model, source.parent, folder)
    held = {t.name: t for t in model.graph.initializer if len(t.dims) == 2}
    arrays = _Floats({k: t for k, t in held.items() if t.data_type in _KINDS}, source.parent)
    places: dict[str, list[tuple[Place, Change]]] = {}
    for change in changes:
        place = _place(arrays, change, str(source))
        places.setdefault(place.name, []).append((place, change))
    for number, (name, found) in enumerate(places.items()):
        kind = onnx.helper.tensor_dtype_to_np_dtype(held[name].data_type)
        array = _changed(arrays[name], found).astype(kind)
        _redirect(model.graph, name, f"{name}:merged", found[0][1], str(source))
        tensor = numpy_helper.from_array(array, f"{name}:merged")
        if array.nbytes > _INLINE:
            _outside(tensor, folder / f"{STEM}.{number}.data")
        model.graph.initializer.append(tensor)
    made = folder / f"{STEM}.onnx"
    made.write_bytes(model.SerializeToString())
    return made


def _bring(model: onnx.ModelProto, source: Path, folder: Path) -> None:
    """Copies the files that hold the model's external data, which stays as it is."""
    names = {
        e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"
    }
    for name in sorted(names):
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, place)


def _outside(tensor: onnx.TensorProto, path: Path) -> None:
    """Moves a tensor's bytes into a file of their own."""
    path.write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=path.name)


def _changed(array: Array, found: Iterable[tuple[Place, Change]]) -> Array:
    """A copy of a stored matrix with each change added once at its place."""
    made, done = array.astype(np.float32), set()
    for place, change in found:
        if place in done:  # a module that is used twice is two layers
            continue
        done.add(place)
        part = made.T if place.turned else made
        part[:, place.first : place.first + change.added.shape[1]] += change.added
    return np.ascontiguousarray(made)


def _redirect(graph: onnx.GraphProto, name: str, new: str, change: Change, where: str) -> None:
    """Makes every product that reads `name` read `new`; an embedding keeps reading `name`."""
    readers = [n for n in graph.node if n.op_type != "Gather" and name in n.input]
    if not readers:
        raise _refused(change, f"no product reads {name!r}", where)
    for reader in readers:
        inputs = [new if i == name else i for i in reader.input]
        del reader.input[:]
        reader.input.extend(inputs)


class _Floats(Mapping[str, Array]):
    """Matrices of an ONNX file, read as float32 when asked for."""

    def __init__(self, held: Mapping[str, onnx.TensorProto], folder: Path) -> None:
        self.held, self.folder = held, str(folder)

    def __getitem__(self, name: str) -> Array:
        return numpy_helper.to_array(self.held[name], self.folder).astype(np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


class _Stored(Mapping[str, Array]):
    """Matrices of a checkpoint, read as float32 when asked for."""

    def __init__(self, held: Mapping[str, Stored]) -> None:
        self.held = {k: s for k, s in held.items() if s.dtype in FLOATS and len(s.shape) == 2}

    def __getitem__(self, name: str) -> Array:
        return self.held[name].view().astype(np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


def _checkpoint(source: Path, changes: Sequence[Change], folder: Path) -> Path:
    """Tensors are copied from the source's files one by one; those changed become float32."""
    stored, _ = read_all(ExternalData(source, source.parent))
    arrays = _Stored(stored)
    config = json.loads(source.read_bytes())
    changed: dict[str, tuple[str, list[tuple[Place, Change]]]] = {}
    for change in changes:
        place = _place(arrays, change, str(source.parent))
        name, own = place.name, change.layer.rpartition(".")[2]
        if own != name.split(".")[-2] and change.layer == "lm_head":
            name = f"{change.layer}.weight"  # shares the embedding's table until now
            config["tie_word_embeddings"] = False
        changed.setdefault(name, (place.name, []))[1].append((place, change))

    def make(name: str) -> bytes:
        old, found = changed[name]
        return _changed(arrays[old], found).astype(np.float32).tobytes()

    entries: dict[str, tuple[str, tuple[int, ...], int]] = {
        k: (s.dtype, s.shape, s.size) for k, s in stored.items()
    }
    for name, (old, _) in changed.items():
        shape = stored[old].shape
        entries[name] = ("F32", shape, 4 * shape[0] * shape[1])
    _write_safetensors(folder / SINGLE, entries, lambda name: (
        make(name) if name in changed else _bytes_of(stored[name])
    ))  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config))
    return folder / CONFIG


def _bytes_of(stored: Stored) -> bytes:
    return bytes(stored.file.data[stored.offset : stored.offset + stored.size])


def _write_safetensors(
    path: Path, entries: Mapping[str, tuple[str, tuple[int, ...], int]],
    read: Callable[[str], bytes],
) -> None:  # fmt: skip
    """Writes a safetensors file, one tensor in memory at a time."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, (dtype, shape, size) in entries.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in entries:
            file.write(read(name))


@dataclass(frozen=True)
class Place:
    """Where a layer's weight lies in the source.

    Attributes:
        name: of the tensor; turned: whether it holds the transpose.
        first: column from which on it stands there, in the orientation ``[in, out]``.
    """

    name: str
    turned: bool
    first: int = 0


def _place(held: Mapping[str, Array], change: Change, where: str) -> Place:
    """Which tensor holds the weight; its own name is tried first."""
    named = [n for n in change.weight.split() if n in held]
    for names in (named, list(held)):
        found = sorted(_distances(held, names, change), key=lambda f: (f[0], f[1].name))
        if found and found[0][0] < _FAR:
            return found[0][1]
    raise _refused(change, "no tensor holds its weight", where)


def _distances(
    held: Mapping[str, Array], names: Iterable[str], change: Change
) -> Iterator[tuple[float, Place]]:
    """Relative distance of each fitting tensor, of its transpose, and of parts of packed ones."""
    size = float(np.linalg.norm(change.near)) or 1.0
    inputs, outputs = change.near.shape
    for name in names:
        array = held[name]
        for turned in (False, True):
            weight = array.T if turned else array
            if weight.shape[0] != inputs or weight.shape[1] % outputs:
                continue
            for first in range(0, weight.shape[1], outputs):
                part = weight[:, first : first + outputs]
                off = np.linalg.norm(part + change.added - change.near)
                yield float(off) / size, Place(name, turned, first)


def _refused(change: Change, why: str, where: str) -> InputError:
    return InputError(
        f"the adapter cannot be merged into a copy of the source, the truth of verify: {why}",
        where=f"{where}, layer {change.layer}",
        mend="verify with --level 2, or compile from the Hugging Face checkpoint",
    )
