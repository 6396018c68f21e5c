"""Writes a copy of a model with an adapter added to its weights: the truth beside which one runs.

Which stored tensor a layer's weight came from is proved by its numbers, not only by its name: a
file may hold it transposed, or under a name that an exporter made up.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from pfmc.errors import InputError
from pfmc.ingest.checkpoint import CONFIG
from pfmc.ingest.external import ExternalData
from pfmc.ingest.hf.stored import FLOATS, SINGLE, read_all
from pfmc.ingest.load import load

Array = npt.NDArray[np.float32]

STEM = "merged"
_FAR = 0.7
"""Relative error above which a tensor is another weight; codes of 2 bits are off by 0.5."""
_LARGEST = 1 << 30
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

    A changed weight keeps its element type in an ONNX file; a checkpoint is written in float32.

    Args:
        source: an ONNX file, or the ``config.json`` of a checkpoint.
        changes: one for each adapted layer.
        folder: an empty folder.

    Returns:
        the ONNX file, or the ``config.json``.

    Raises:
        InputError: a layer's weight is not a tensor of the source by itself: packed with others,
            shared with another operator, or computed.
    """
    if source.name == CONFIG:
        return _checkpoint(source, changes, folder)
    load(source)  # the guard
    model = onnx.load(source)
    held = {t.name: t for t in model.graph.initializer if len(t.dims) == 2}
    arrays = _Floats({k: t for k, t in held.items() if t.data_type in _KINDS})
    for change in changes:
        name, turned = _place(arrays, change, str(source))
        old = numpy_helper.to_array(held[name])
        added = change.added.T if turned else change.added
        array = np.ascontiguousarray((old.astype(np.float32) + added).astype(old.dtype))
        _redirect(model.graph, name, f"{name}:merged", change, str(source))
        model.graph.initializer.append(numpy_helper.from_array(array, f"{name}:merged"))
    made = folder / f"{STEM}.onnx"
    size = sum(len(t.raw_data) for t in model.graph.initializer)
    outside = {"save_as_external_data": True, "location": f"{STEM}.data"} if size > _LARGEST else {}
    onnx.save(model, made, **outside)  # type: ignore[arg-type]
    return made


def _redirect(graph: onnx.GraphProto, name: str, new: str, change: Change, where: str) -> None:
    """Makes the one product that reads `name` read `new`; an embedding keeps reading `name`."""
    readers = [n for n in graph.node if n.op_type != "Gather" and name in n.input]
    if len(readers) != 1:
        raise _refused(change, f"{len(readers)} nodes read {name!r}", where)
    inputs = [new if i == name else i for i in readers[0].input]
    del readers[0].input[:]
    readers[0].input.extend(inputs)


class _Floats(Mapping[str, Array]):
    """Matrices of an ONNX file, read as float32 when asked for."""

    def __init__(self, held: Mapping[str, onnx.TensorProto]) -> None:
        self.held = held

    def __getitem__(self, name: str) -> Array:
        return numpy_helper.to_array(self.held[name]).astype(np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


def _checkpoint(source: Path, changes: Sequence[Change], folder: Path) -> Path:
    from safetensors.numpy import save_file

    stored, _ = read_all(ExternalData(source, source.parent))
    arrays = {
        k: s.view().astype(np.float32) for k, s in stored.items() if s.dtype in FLOATS
    }  # fmt: skip
    config = json.loads(source.read_bytes())
    for change in changes:
        name, turned = _place(arrays, change, str(source.parent))
        array = arrays[name] + (change.added.T if turned else change.added)
        own = change.layer.rpartition(".")[2]
        if own != name.split(".")[-2]:  # a head that shares the embedding's table, until now
            name = f"{change.layer}.weight"
        if not any(part.isdecimal() for part in change.layer.split(".")):
            config["tie_word_embeddings"] = False
        arrays[name] = array
    tensors = {k: np.ascontiguousarray(a) for k, a in arrays.items()}
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config))
    return folder / CONFIG


def _place(held: Mapping[str, Array], change: Change, where: str) -> tuple[str, bool]:
    """Which tensor holds the weight, and whether transposed; its own name is tried first."""
    named = [n for n in change.weight.split() if n in held]
    for names in (named, list(held)):
        found = sorted(_distances(held, names, change))
        if found and found[0][0] < _FAR:
            return found[0][1], found[0][2]
    raise _refused(change, "no tensor by itself holds its weight", where)


def _distances(
    held: Mapping[str, Array], names: Iterable[str], change: Change
) -> Iterator[tuple[float, str, bool]]:
    """Relative distance of each fitting tensor, and of its transpose, from the layer's weight."""
    size = float(np.linalg.norm(change.near)) or 1.0
    for name in names:
        array = held[name]
        for turned in (False, True):
            weight = array.T if turned else array
            if weight.shape == change.near.shape:
                off = np.linalg.norm(weight + change.added - change.near)
                yield float(off) / size, name, turned


def _refused(change: Change, why: str, where: str) -> InputError:
    return InputError(
        f"the adapter cannot be merged into a copy of the source, the truth of verify: {why}",
        where=f"{where}, layer {change.layer}",
        mend="verify with --level 2, or compile from the Hugging Face checkpoint",
    )
