"""The calibrated artifact: the same tiles, a graph with corrections, its netlist and its costs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from pfmc import lowered, simulate, store
from pfmc.artifact import Manifest, Writer, canonical_json
from pfmc.calibration import beside
from pfmc.distill.shapes import probe_shapes
from pfmc.distill.side import Side
from pfmc.simulate import Machine
from pfmc.targets.fabric.assemble import assemble
from pfmc.targets.fabric.work import fabric_ops, fixed_positions

MODEL, NETLIST = "model.onnx", "netlist.json"
REPORT, METRICS = "report/report.json", "report/metrics.csv"
_CHUNK = 1 << 24


def write(
    writer: Writer, machine: Machine, sides: Mapping[str, Side], body: Mapping[str, Any],
    notes: Mapping[str, Any], origins: Mapping[str, Path],
) -> Manifest:  # fmt: skip
    """Writes and commits the artifact.

    Args:
        writer: of the new artifact. machine: the old one.
        sides: the corrections as stored; a layer without one has none.
        body: of the manifest; notes: of the calibration, for the report.
        origins: what ``provenance/<name>.txt`` leads to: ``source``, and ``adapter`` if there is
            one.
    """
    model = ir.load(machine.path / MODEL)
    beside.take(model)
    beside.put(model, sides)
    changed = {MODEL, lowered.DATA_FILE, NETLIST, REPORT, METRICS}
    for file in machine.manifest.files:
        if file.path not in changed:
            writer.write_stream(file.path, _chunks(machine.path / file.path))
    records = store.layer_records(machine.path)
    lowered.write_model(writer, model, records)
    shapes = probe_shapes(model)
    ops = fabric_ops(model, shapes)
    tech, target = machine.technology, machine.target
    definitions = {r.name: target.definition(r.summary, tech) for r in records}
    writer.write(NETLIST, assemble(model, definitions, ops).to_json().encode())
    context = fixed_positions(model, shapes) or machine.manifest["config"]["context"]
    passes = {**machine.report["passes"], "calibrate": notes}
    report = lowered.report(target, tech, model, records, ops, context, passes)
    writer.write(REPORT, canonical_json(report))
    writer.write(METRICS, lowered.metrics_csv(report).encode())
    for name, place in origins.items():
        told = os.path.relpath(place.resolve(), writer.path.resolve())
        writer.write(f"provenance/{name}.txt", f"{told}\n".encode())
    return writer.commit(body)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def report_of(path: Path) -> dict[str, Any]:
    """The report of a finished artifact."""
    return simulate.read_report(path)
