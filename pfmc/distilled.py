"""A distilled folder: what every layer learned, ready to be compiled in place of the quantiser's.

``name.distilled/`` holds ``layers/<layer>.safetensors`` (codes, scale, bias, input step, converter
ranges, statistics), ``fabric.safetensors`` (norms and tables that learned), ``history.csv``, and
last of all ``distilled.json``: a folder without it is not finished. The manifest says what the
layers were made from (digests of the source files, recipe, technology, options); compiling with
them for anything else is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pfmc.artifact import canonical_json, file_name, save_tensors, sha256_file
from pfmc.errors import CorruptError, UsageError
from pfmc.hardware import FixedLinear, LayerStatistics, QuantisedMatrix
from pfmc.ir import vocabulary
from pfmc.passes.lazy_codes import LazyCodes
from pfmc.passes.records import quantised_linears

MANIFEST = "distilled.json"
HISTORY = "history.csv"
FABRIC = "fabric.safetensors"
SCHEMA_VERSION = 1

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Distilled:
    """What was learned.

    Attributes:
        records: every fixed linear as it shall be lowered, statistics included.
        fabric: initialiser name -> new values.
        manifest: where it came from and how good it is.
    """

    records: Mapping[str, FixedLinear]
    fabric: Mapping[str, Array]
    manifest: Mapping[str, Any]

    @property
    def statistics(self) -> dict[str, LayerStatistics]:
        """What each layer saw in the distilled model."""
        return {n: r.statistics for n, r in self.records.items() if r.statistics is not None}

    @property
    def digest(self) -> str:
        """sha256 of the manifest, which holds that of every file."""
        return hashlib.sha256(canonical_json(dict(self.manifest))).hexdigest()

    def told(self) -> dict[str, Any]:
        """What the report says of it."""
        keys = ("kept", "steps", "start", "best")
        return {"pass": "distill", **{k: self.manifest[k] for k in keys if k in self.manifest}}

    def complete(self, record: FixedLinear) -> FixedLinear:
        """`record` as the graph gives it, with the converter ranges that were learned."""
        return replace(record, output_range=self.records[record.name].output_range)


# -- writing and reading ---------------------------------------------------------------------------


def write(folder: Path, made: Distilled) -> None:
    """Writes layers and fabric, then the manifest with their digests.

    Raises:
        FileError: the disk is full, or refuses.
    """
    (folder / "layers").mkdir(parents=True, exist_ok=True)
    files = [folder / FABRIC]
    for name, record in made.records.items():
        files.append(_layer_path(folder, name))
        save_tensors(files[-1], _arrays(record), json.dumps(_plain(record), sort_keys=True))
    save_tensors(folder / FABRIC, dict(sorted(made.fabric.items())), "fabric")
    body = {
        **made.manifest, "schema_version": SCHEMA_VERSION, "layers": list(made.records),
        "files": {p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(files)},
    }  # fmt: skip
    (folder / MANIFEST).write_bytes(canonical_json(body))


def _layer_path(folder: Path, name: str) -> Path:
    return folder / "layers" / f"{file_name(name)}.safetensors"


def _plain(record: FixedLinear) -> dict[str, Any]:
    m = record.matrix
    return {
        "name": record.name, "bits": m.bits, "group": m.group, "format": m.format,
        "choice": m.choice, "unit": m.unit, "input_bits": record.input_bits,
        "input_scale": record.input_scale,
        "diagnostics": dict(m.diagnostics), "weight": record.weight,
        "sources": list(record.sources),
    }  # fmt: skip


def _arrays(record: FixedLinear) -> dict[str, Array]:
    found: dict[str, Array] = {"codes": record.matrix.codes, "scale": record.matrix.scale}
    if record.bias is not None:
        found["bias"] = record.bias
    if record.output_range is not None:
        found["output_range"] = record.output_range
    if (seen := record.statistics) is not None:
        quantiles = sorted(seen.input_quantiles.items())
        found |= {
            "input_power": seen.input_power, "output_peak": seen.output_peak,
            "output_rms": seen.output_rms,
            "input_quantiles": np.array(quantiles, np.float64).reshape(-1, 2),
            "input_peak": np.array([seen.input_peak]), "samples": np.array([seen.samples]),
        }  # fmt: skip
    return found


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished folder, or None."""
    try:
        body: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    return body


def read(folder: Path) -> Distilled:
    """Reads a finished folder.

    Raises:
        UsageError: it is none. CorruptError: a file of it was changed.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise UsageError(
            "this is no finished distillation", where=str(folder),
            mend="run pfmc distill until its end; the same command resumes it",
        )  # fmt: skip
    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.is_file() or sha256_file(path) != digest:
            raise CorruptError("a file is missing or was changed", where=str(path))
    from safetensors.numpy import load_file

    records = {n: _read_layer(_layer_path(folder, n)) for n in manifest["layers"]}
    return Distilled(records, load_file(folder / FABRIC), manifest)


def _read_layer(path: Path) -> FixedLinear:
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        body = json.loads(file.metadata()["pfmc"])
        held = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    matrix = QuantisedMatrix(
        held["codes"], body["bits"], held["scale"], body["group"], body["diagnostics"],
        body["format"], body["choice"], body["unit"],
    )  # fmt: skip
    return FixedLinear(
        body["name"], matrix, held.get("bias"), body["input_bits"], body["input_scale"],
        _statistics(held), tuple(body["sources"]), body["weight"], held.get("output_range"),
    )  # fmt: skip


def _statistics(held: Mapping[str, Array]) -> LayerStatistics | None:
    if "input_power" not in held:
        return None
    return LayerStatistics(
        float(held["input_peak"][0]), {float(p): float(v) for p, v in held["input_quantiles"]},
        held["input_power"], held["output_peak"], held["output_rms"], int(held["samples"][0]),
    )  # fmt: skip


def require_same(manifest: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Refuses a folder made from something else.

    Args:
        manifest: of the folder; wanted: what it must say under ``origin``.

    Raises:
        UsageError: names what differs.
    """
    held = manifest.get("origin", {})
    for key, value in wanted.items():
        if held.get(key) != value:
            raise UsageError(
                f"this distillation was made for another {key.removesuffix('_sha256')}",
                where=str(folder), mend="distil again with the same model, target and recipe",
            )  # fmt: skip


# -- into the graph --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Held:
    """A matrix in the place of one that is rounded when read (`LazyCodes.source`)."""

    held: QuantisedMatrix

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.held.bits

    def matrix(self) -> QuantisedMatrix:
        """The codes and scales."""
        return self.held

    def release(self) -> None:
        """They are held by the distillation anyway."""


def install(model: ir.Model, made: Distilled) -> None:
    """Puts everything that was learned into a QUANTISED model."""
    for node in quantised_linears(model):
        record = made.records.get(str(node.name))
        if record is None:
            raise UsageError("the distillation lacks a layer", where=str(node.name))
        _install_layer(model.graph, node, record)
    for name, array in made.fabric.items():
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(array, name=name)


def _install_layer(graph: ir.Graph, node: ir.Node, record: FixedLinear) -> None:
    codes, scale = node.inputs[1], node.inputs[2]
    assert codes is not None
    assert scale is not None
    source, nibbles = _Held(record.matrix), _dtype(codes) is ir.DataType.INT4
    shapes = (record.inputs, record.outputs), _sizes(scale)
    for value, is_scale, shape in zip((codes, scale), (False, True), shapes, strict=True):
        lazy = LazyCodes(source, is_scale, shape, nibbles)
        lazy.name = str(value.name)
        value.const_value = lazy
    bias = np.zeros(record.outputs, np.float32) if record.bias is None else record.bias
    _replace_constant(graph, node, 3, bias)
    maker = node.inputs[0].producer() if node.inputs[0] is not None else None
    if record.input_scale is not None and maker is not None:
        assert maker.op_type == vocabulary.QUANTISE
        _replace_constant(graph, maker, 1, np.asarray(record.input_scale, np.float32))


def _dtype(value: ir.Value) -> ir.DataType:
    assert value.const_value is not None
    return value.const_value.dtype


def _sizes(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    return tuple(int(d) for d in value.const_value.shape.numpy())


def _replace_constant(graph: ir.Graph, node: ir.Node, index: int, array: Array) -> None:
    """Gives `node` a constant of its own in place of one that others may share."""
    before = node.inputs[index]
    assert before is not None
    name = f"{node.name}:distilled:{index}"
    if name in graph.initializers:  # the step of an input that several linears share
        return
    made = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=made, type=before.type, shape=before.shape)
    value.metadata_props.update(before.metadata_props)
    graph.register_initializer(value)
    node.replace_input_with(index, value)
    if not before.uses() and not before.is_graph_output() and before.name:
        graph.initializers.pop(before.name, None)
