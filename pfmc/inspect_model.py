"""Looks into a model file or an artifact without loading weights; one tile with its numbers."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from pfmc import artifact, ingest, store
from pfmc.errors import InputError, UsageError, did_you_mean
from pfmc.ir import vocabulary
from pfmc.report.tree import Item
from pfmc.store import LayerRecord

_TILE = re.compile(r"(.+)\[(\d+),(\d+)\]")


@dataclass(frozen=True)
class View:
    """What can be seen of a model or an artifact.

    Attributes:
        path: the file or folder; kind: ``model`` or ``artifact``.
        title: one line about it.
        items: its operations; layers: of an artifact, its fixed linears.
    """

    path: Path
    kind: str
    title: str
    items: tuple[Item, ...]
    layers: tuple[LayerRecord, ...] = ()


def look(path: Path, trust_root: Path | None = None) -> View:
    """Opens a model file, a stage dump or an artifact.

    Raises:
        UsageError: there is nothing, or an artifact that is not finished.
        InputError: the model is refused.
    """
    if artifact.is_artifact(path) or (path / artifact.STAGE).is_dir():
        return _artifact(path)
    loaded = ingest.load(path, trust_root=trust_root)
    opset = loaded.model.graph.opset_imports.get("", 0)
    title = f"{loaded.title}: {loaded.exporter}, {loaded.precision.name}, opset {opset}"
    model = loaded.model
    opened = vocabulary.DOMAIN in model.graph.opset_imports and not loaded.from_checkpoint
    if opened:  # a dump: ingest opened its operators up
        model = _as_it_lies(loaded.path)
    return View(path, "model", title, tuple(_items(model)))


def _as_it_lies(path: Path) -> ir.Model:
    """The file, which ingest has checked, with its operators untouched."""
    try:
        return ir.load(path)
    except ir.serde.SerdeError as error:
        raise InputError("The graph cannot be read as it lies", where=str(path)) from error


def _artifact(path: Path) -> View:
    manifest = artifact.read_manifest(path)
    model = ir.load(path / "model.onnx")
    config = manifest["config"]
    title = f"{path.name}: {config['target']}, {', '.join(config['inputs'])}, tree {manifest.tree}"
    return View(path, "artifact", title, tuple(_items(model)), tuple(store.layer_records(path)))


def _items(model: ir.Model) -> Iterator[Item]:
    seen: set[str] = set()
    for node in model.graph:
        weights = size = 0
        for value in node.inputs:
            if value is None or value.const_value is None or str(value.name) in seen:
                continue
            seen.add(str(value.name))
            weights += int(value.const_value.size)
            size += int(value.const_value.nbytes)
        prefix = f"{node.domain}." if node.domain else ""
        yield Item(
            str(node.name), prefix + node.op_type, _scope(node), weights, size,
            tuple(str(v.name) for v in node.inputs if v is not None),
            tuple(str(v.name) for v in node.outputs),
        )  # fmt: skip


def _scope(node: ir.Node) -> str:
    if node.domain == vocabulary.DOMAIN and node.op_type in vocabulary.LINEARS:
        return str(node.name)
    return str(node.metadata_props.get(vocabulary.KEY_SCOPE, ""))


def select_layers(view: View, pattern: str) -> list[LayerRecord]:
    """The layers of an artifact whose name fits the glob `pattern`.

    Raises:
        UsageError: `view` is no artifact, or none fits.
    """
    if view.kind != "artifact":
        raise UsageError("--layer looks into an artifact", mend="use --op on a model file")
    found = [r for r in view.layers if fnmatch.fnmatchcase(r.name, pattern)]
    if not found:
        raise UsageError(
            f"no layer fits {pattern!r}", mend=did_you_mean(pattern, [r.name for r in view.layers])
        )
    return found


def select_items(view: View, op: str) -> list[Item]:
    """The operations of type `op` (``MatMul``, ``pfmc.QuantisedLinear`` or its last part).

    Raises:
        UsageError: there is none; the message names the nearest.
    """
    found = [i for i in view.items if op in (i.op, i.op.rpartition(".")[2])]
    if not found:
        known = {i.op for i in view.items}
        raise UsageError(f"no operation {op!r}", mend=did_you_mean(op, known))
    return found


def tile(view: View, text: str) -> dict[str, Any]:
    """One tile of an artifact: ``LAYER[r,c]`` is its row and column in the grid of tiles.

    Returns its row of the tile table, its source nodes, its share of the layer's products, and
    the statistics of its weights, the only ones that are read.

    Raises:
        UsageError: `view` is no artifact, or the layer or the tile does not exist.
        CorruptError: the layer's weights cannot be read.
    """
    if view.kind != "artifact":
        raise UsageError("--tile looks into an artifact", mend="pfmc compile makes one")
    match = _TILE.fullmatch(text)
    if not match:
        raise UsageError(f"cannot read the tile {text!r}", mend="write LAYER[row,column]")
    record = store.find_layer(view.layers, match[1])
    stored = store.read_layer(view.path, record)
    index = _index(stored.tiles, record.name, int(match[2]), int(match[3]))
    row = {k: v[index].item() for k, v in stored.tiles.items()}
    codes = stored.tensors["codes"][
        row["row0"] : row["row0"] + row["rows"], row["col0"] : row["col0"] + row["cols"]
    ].astype(np.int32)
    return {
        "layer": record.name,
        "weight": record.weight,
        "sources": record.sources,
        "tile": row,
        "codes": {
            "shape": list(codes.shape), "min": int(codes.min()), "max": int(codes.max()),
            "zero_fraction": float((codes == 0).mean()), "rms": float((codes**2).mean() ** 0.5),
        },
        "share_of_layer": codes.size / (record.inputs * record.outputs),
        "first_codes": codes[:8, :8].tolist(),
    }  # fmt: skip


def _index(tiles: Mapping[str, Any], layer: str, row: int, column: int) -> int:
    rows, columns = (sorted(set(tiles[k].tolist())) for k in ("row0", "col0"))
    if row >= len(rows) or column >= len(columns):
        raise UsageError(
            f"{layer} has {len(rows)} × {len(columns)} tiles, not [{row},{column}]",
            mend=f"[0,0] to [{len(rows) - 1},{len(columns) - 1}]",
        )
    at = (tiles["row0"] == rows[row]) & (tiles["col0"] == columns[column])
    return int(np.flatnonzero(at)[0])
