"""The lowered model as files: the runnable graph, the report, the metrics, the tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from pfmc import cost, formats
from pfmc.artifact import Writer
from pfmc.errors import InternalError
from pfmc.hardware import FabricOp, Workload
from pfmc.ir import provenance, vocabulary
from pfmc.passes.pieces import left_in_pieces
from pfmc.report.table import Table
from pfmc.store import LayerRecord
from pfmc.targets.base import Target
from pfmc.targets.fabric import gpu
from pfmc.technology import Technology

DATA_FILE = "model.data"
_ALIGNMENT = 64  # bytes; where ONNX Runtime maps a tensor
_INLINE = 1024  # bytes; smaller constants stay inside model.onnx


# -- the graph -----------------------------------------------------------------------------------


def write_model(writer: Writer, model: ir.Model, records: Sequence[LayerRecord]) -> None:
    """Stages ``model.onnx``, whose weights are ranges of the layers' files and of ``model.data``.

    It runs in ONNX Runtime as it lies (graph optimisation BASIC or off).
    """
    vocabulary.install(model)
    in_layers = _layer_tensors(model, records)
    rest = _large(model, set(in_layers))
    entry = writer.write_stream(DATA_FILE, _chunks(v for v, _ in rest))
    outside = {**in_layers, **_placed(rest)}
    if rest and entry.size != sum(_padded(t.nbytes) for _, t in rest):
        raise InternalError("model.data has not the size its tensors have")
    originals = {name: model.graph.initializers[name].const_value for name in outside}
    try:
        for name, tensor in outside.items():
            model.graph.initializers[name].const_value = tensor
        writer.write("model.onnx", ir.to_proto(model).SerializeToString(deterministic=True))
    finally:
        for name, held in originals.items():
            model.graph.initializers[name].const_value = held


def _layer_tensors(
    model: ir.Model, records: Sequence[LayerRecord]
) -> dict[str, ir.ExternalTensor]:
    """Codes, scale and bias of every fixed linear as ranges of its weights file."""
    by_name = {r.name: r for r in records}
    found: dict[str, ir.ExternalTensor] = {}
    for node in vocabulary.fixed_linears(model):
        record = by_name[str(node.name)]
        for value, key in zip(node.inputs[1:], ("codes", "scale", "bias"), strict=True):
            assert value is not None
            assert value.const_value is not None
            offset, length = record.ranges[key]
            tensor = value.const_value
            found[str(value.name)] = ir.ExternalTensor(
                record.weights_path, offset, length, tensor.dtype,
                shape=_shape(tensor), name=str(value.name),
            )  # fmt: skip
    return found


def _shape(tensor: ir.TensorProtocol) -> ir.Shape:
    return ir.Shape([int(d) for d in tensor.shape.numpy()])


Large = list[tuple[ir.Value, ir.TensorProtocol]]


def _large(model: ir.Model, done: set[str]) -> Large:
    return [
        (v, v.const_value)
        for name, v in sorted(model.graph.initializers.items())
        if name not in done and v.const_value is not None and v.const_value.nbytes > _INLINE
    ]


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _chunks(values: Iterable[ir.Value]) -> Iterator[bytes]:
    for value in values:
        assert value.const_value is not None
        data = value.const_value.tobytes()
        yield data
        yield b"\0" * (_padded(len(data)) - len(data))


def _placed(rest: Large) -> dict[str, ir.ExternalTensor]:
    offset, found = 0, {}
    for value, tensor in rest:
        found[str(value.name)] = ir.ExternalTensor(
            DATA_FILE, offset, tensor.nbytes, tensor.dtype, shape=_shape(tensor),
            name=str(value.name),
        )  # fmt: skip
        offset += _padded(tensor.nbytes)
    return found


# -- the report ----------------------------------------------------------------------------------


def report(
    target: Target, tech: Technology, model: ir.Model, records: Sequence[LayerRecord],
    ops: Sequence[FabricOp], context: int, notes: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The body of ``report/report.json``: model, passes, cost, the GPU beside it."""
    decodes = any(str(v.name).startswith("past") for v in model.graph.inputs)
    workload = Workload("decode" if decodes else "encode", context)
    layers = [r.summary for r in records]
    costs = target.cost(layers, ops, tech, workload)
    costs = replace(costs, workload=f"{workload.kind}, {context} positions of context")
    return {
        "schema_version": 1,
        "model": _facts(model, records, ops),
        "passes": dict(notes),
        "pieces": left_in_pieces(model, ops, notes),
        "cost": cost.to_json(costs),
        "baseline": cost.to_json(gpu.baseline(float(max(1, _parameters(model, records))))),
        "layers": {r.name: r.diagnostics for r in records},
        "rounding": rounding_facts(records),
    }


def rounding_facts(records: Sequence[LayerRecord]) -> dict[str, Any]:
    """What rounded each layer, and the share of its output's power that each search got wrong."""
    layers: dict[str, dict[str, Any]] = {}
    chosen: dict[str, int] = {}
    for r in records:
        errors = {
            k.removesuffix("_error_relative"): v
            for k, v in r.diagnostics.items()
            if k.endswith("_error_relative") and k != "code_error_relative"
        }
        if "code_error_relative" in r.diagnostics:
            errors["layer_wise_best"] = r.diagnostics["code_error_relative"]
        layers[r.name] = {
            "format": r.format, "bits": r.bits, "group": r.group, "choice": r.choice,
            "errors": errors,
        }  # fmt: skip
        chosen[r.choice or "unknown"] = chosen.get(r.choice or "unknown", 0) + 1
    weights = sum(r.inputs * r.outputs for r in records)
    stored = sum(
        r.inputs * r.outputs * formats.of(r.format, r.bits).weight_bits(r.inputs, r.group)
        for r in records
    )
    return {
        "layers": layers, "choices": dict(sorted(chosen.items())),
        "weight_bits_mean": stored / max(1, weights),
        "errors_geometric_mean": _means([v["errors"] for v in layers.values()]),
    }  # fmt: skip


def _means(errors: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The geometric mean of each error over the layers that have it and are not exact."""
    names = sorted({k for e in errors for k in e})
    held = {n: [e[n] for e in errors if e.get(n, 0.0) > 0] for n in names}
    return {n: math.exp(sum(map(math.log, v)) / len(v)) for n, v in held.items() if v}


def _facts(
    model: ir.Model, records: Sequence[LayerRecord], ops: Sequence[FabricOp]
) -> dict[str, Any]:
    kinds: dict[str, int] = {}
    for op in ops:
        kinds[op.kind] = kinds.get(op.kind, 0) + 1
    return {
        "fixed_linears": len(records),
        "fixed_weights": sum(r.inputs * r.outputs for r in records),
        "parameters": _parameters(model, records),
        "tiles": sum(r.tiles for r in records),
        "fabric_ops": len(ops),
        "fabric_kinds": dict(sorted(kinds.items())),
        **_adapters(model),
        **_experts(records),
    }


def _experts(records: Sequence[LayerRecord]) -> dict[str, Any]:
    """How often tokens use the layers that a router chooses; nothing where there is none."""
    shares = {r.name: r.activity for r in records if r.activity != 1.0}
    if not shares:
        return {}
    active = sum(r.inputs * r.outputs * r.activity for r in records)
    return {"activity": shares, "active_weights": round(active)}


def _adapters(model: ir.Model) -> dict[str, Any]:
    """Rank and parameters of every side path by its layer; nothing where there is none.

    Those of pass ``spread`` stand apart from adapters.
    """
    adapters: dict[str, dict[str, int]] = {}
    spread: dict[str, dict[str, int]] = {}
    for node in model.graph:
        if vocabulary.is_op(node, vocabulary.SIDE_PATH, vocabulary.DOMAIN):
            factors = [v.const_value for v in node.inputs[2:] if v is not None]
            sizes = [[int(d) for d in t.shape.numpy()] for t in factors if t is not None]
            parameters = sum(rows * columns for rows, columns in sizes)
            found = spread if vocabulary.KEY_SPREAD in node.metadata_props else adapters
            found[provenance.scope(node)] = {"rank": sizes[0][1], "parameters": parameters}
    named = {"adapters": adapters, "spread": spread}
    return {name: found for name, found in named.items() if found}


def _parameters(model: ir.Model, records: Sequence[LayerRecord]) -> int:
    """Weights of the fixed linears and every other real constant of more than one number."""
    linear_inputs = {
        str(v.name) for n in vocabulary.fixed_linears(model) for v in n.inputs[1:] if v is not None
    }
    others = sum(
        int(v.const_value.size)
        for name, v in model.graph.initializers.items()
        if name not in linear_inputs
        and v.const_value is not None
        and v.const_value.size > 1
        and v.const_value.dtype.is_floating_point()
    )
    return sum(r.inputs * r.outputs for r in records) + others


def metrics_csv(body: Mapping[str, Any]) -> str:
    """``report/metrics.csv``: metric, unit, low, typical, high, scope."""
    rows: list[tuple[str, ...]] = []
    for key, metric in body["cost"]["metrics"].items():
        rows.append(_metric_row(key, metric["unit"], metric, "model"))
        for term in metric.get("terms", []):
            rows.append(_metric_row(key, metric["unit"], term, term["name"]))
    return Table(("metric", "unit", "low", "typical", "high", "scope"), tuple(rows)).csv()


def _metric_row(key: str, unit: str, held: Mapping[str, Any], scope: str) -> tuple[str, ...]:
    numbers = (repr(float(held[k])) for k in ("low", "typical", "high"))
    return (key, unit, *numbers, scope)


def write_tokenizer(writer: Writer, path: Path) -> None:
    """Stages the tokenizer and the files beside it that name its special tokens."""
    writer.write("tokenizer/tokenizer.json", path.read_bytes())
    for name in ("config.json", "generation_config.json"):
        beside = path.parent / name
        if beside.is_file():
            held = json.loads(beside.read_bytes())
            tokens = {k: v for k, v in sorted(held.items()) if k.endswith("_token_id")}
            writer.write(f"tokenizer/{name}", json.dumps(tokens, indent=1).encode())
