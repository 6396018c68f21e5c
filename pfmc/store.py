"""How a lowered layer and the lowered graph lie in an artifact, and how they are read back.

``weights/<layer>.safetensors`` holds ``codes`` (the ONNX layout: int8 ``[in, out]``, or two int4 a
byte, low nibble first), ``scale``, ``bias`` and the target's own tensors; ``model.onnx`` refers to
ranges inside these files as external data, so no weight is stored twice. ``tiles/<layer>.parquet``
holds the tile table. ``layers.json`` lists the layers in the order of the graph.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pfmc import formats
from pfmc.artifact import FileEntry, Writer, canonical_json, file_name
from pfmc.errors import CorruptError, UsageError, did_you_mean
from pfmc.hardware import FixedLinear, LayerSummary, TiledLinear
from pfmc.rounding import pack_int4, unpack_int4

if TYPE_CHECKING:
    from pfmc.targets.base import StoredLinear

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class LayerRecord:
    """A layer as ``layers.json`` lists it.

    Attributes:
        name, inputs, outputs, bits, group, input_bits, input_scale, sources, weight: as in
            `pfmc.hardware.FixedLinear`.
        file: the stem of its weights and tile files.
        tiles, counts, diagnostics, activity: as in `pfmc.hardware.LayerSummary`.
        ranges: tensor name -> offset and length in bytes inside the weights file.
        format, choice: as in `pfmc.hardware.QuantisedMatrix`.
    """

    name: str
    inputs: int
    outputs: int
    bits: int
    group: int
    input_bits: int
    input_scale: float | None
    sources: list[str]
    weight: str
    file: str
    tiles: int
    counts: dict[str, float]
    diagnostics: dict[str, float]
    ranges: dict[str, list[int]]
    activity: float = 1.0
    format: str = "int"
    choice: str = ""

    @property
    def summary(self) -> LayerSummary:
        """What cost, netlist and report need."""
        return LayerSummary(
            self.name, self.inputs, self.outputs, self.tiles, self.counts, self.diagnostics,
            self.activity,
        )  # fmt: skip

    @property
    def weights_path(self) -> str:
        """Relative path of the weights file."""
        return f"weights/{self.file}.safetensors"


def write_layer(
    out: Writer, linear: FixedLinear, tiled: TiledLinear
) -> tuple[list[FileEntry], dict[str, Any]]:
    """Stages the files of one layer; returns their entries and the layer's record as JSON."""
    stem = file_name(linear.name)
    weights = _safetensors(_tensors(linear, tiled), linear.name)
    entries = [
        out.write(f"weights/{stem}.safetensors", weights),
        out.write(f"tiles/{stem}.parquet", _parquet(tiled.tiles)),
    ]
    entries += [out.write(f"hardware/{path}", data) for path, data in sorted(tiled.files.items())]
    record = LayerRecord(
        linear.name, linear.inputs, linear.outputs, linear.matrix.bits, linear.matrix.group,
        linear.input_bits, linear.input_scale, list(linear.sources), linear.weight, stem,
        len(next(iter(tiled.tiles.values()))), _floats(tiled.counts),
        _floats({**linear.matrix.diagnostics, **tiled.diagnostics}),
        _ranges(weights), format=linear.matrix.format, choice=linear.matrix.choice,
    )  # fmt: skip
    return entries, vars(record)


def _floats(values: Mapping[str, float]) -> dict[str, float]:
    return {k: float(v) for k, v in values.items()}


def _tensors(linear: FixedLinear, tiled: TiledLinear) -> dict[str, Array]:
    codes = linear.matrix.codes
    nibbles = formats.of(linear.matrix.format, linear.matrix.bits).nibbles
    packed: Array = pack_int4(codes) if nibbles else np.ascontiguousarray(codes)
    bias = linear.bias if linear.bias is not None else np.zeros(linear.outputs, np.float32)
    return {**tiled.tensors, "codes": packed, "scale": linear.matrix.scale, "bias": bias}


def _safetensors(tensors: Mapping[str, Array], name: str) -> bytes:
    from safetensors.numpy import save

    arrays = {k: np.ascontiguousarray(v) for k, v in sorted(tensors.items())}
    # exactly one metadata key: two are serialised in random order
    return save(arrays, metadata={"pfmc": json.dumps({"layer": name}, sort_keys=True)})


def _ranges(safetensors: bytes) -> dict[str, list[int]]:
    length = int.from_bytes(safetensors[:8], "little")
    header = json.loads(safetensors[8 : 8 + length])
    return {
        k: [8 + length + v["data_offsets"][0], v["data_offsets"][1] - v["data_offsets"][0]]
        for k, v in sorted(header.items())
        if k != "__metadata__"
    }


def _parquet(columns: Mapping[str, Array]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    table = pa.table({k: np.ascontiguousarray(v) for k, v in columns.items()})
    pq.write_table(table, sink, compression="zstd", use_dictionary=False, store_schema=False)
    return sink.getvalue()


# -- reading back --------------------------------------------------------------------------------


def layer_records(artifact: Path) -> list[LayerRecord]:
    """The layers of an artifact in graph order.

    Raises:
        CorruptError: ``layers.json`` is missing or damaged.
    """
    try:
        rows = json.loads((artifact / "layers.json").read_bytes())
        return [LayerRecord(**row) for row in rows]
    except (OSError, ValueError, TypeError) as error:
        raise CorruptError("layers.json cannot be read", where=str(artifact)) from error


def find_layer(records: Iterable[LayerRecord], name: str) -> LayerRecord:
    """The record of layer `name`.

    Raises:
        UsageError: there is none; the message names the nearest.
    """
    known = {r.name: r for r in records}
    if name not in known:
        raise UsageError(f"there is no layer {name!r}", mend=did_you_mean(name, known))
    return known[name]


def read_tiles(artifact: Path, record: LayerRecord) -> dict[str, Array]:
    """The tile table of a layer as columns."""
    import pyarrow.parquet as pq

    table = pq.read_table(artifact / f"tiles/{record.file}.parquet")
    return {name: table.column(name).to_numpy() for name in table.column_names}


def read_layer(artifact: Path, record: LayerRecord) -> StoredLinear:
    """Reads one layer back: its tile table and tensors; ``codes`` as int8 ``[in, out]``.

    Raises:
        CorruptError: its weights are missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from pfmc.targets.base import StoredLinear  # with cost and technology, which inspect needs not

    path = artifact / record.weights_path
    try:
        tensors: dict[str, Array] = dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CorruptError(f"the weights cannot be read: {error}", where=str(path)) from error
    if formats.of(record.format, record.bits).nibbles:
        tensors["codes"] = unpack_int4(
            tensors["codes"].astype(np.uint8, copy=False), (record.inputs, record.outputs)
        )
    bias = tensors["bias"].astype(np.float32, copy=False)
    return StoredLinear(
        record.name, record.inputs, record.outputs, read_tiles(artifact, record), tensors,
        bias if bias.any() else None, record.input_bits, record.input_scale,
    )  # fmt: skip


def read_layers(artifact: Path) -> Iterator[StoredLinear]:
    """All layers of an artifact, one at a time."""
    for record in layer_records(artifact):
        yield read_layer(artifact, record)


def layers_json(records: Iterable[LayerRecord]) -> bytes:
    """The bytes of ``layers.json``."""
    return canonical_json([vars(r) for r in records])
