"""Feeds for any transformer's file, made from its inputs alone, and its answers by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import numpy_helper

PAST, NEW, SAMPLES, HEAD = 4, 6, 1600, 16

Feeds = dict[str, np.ndarray]
_KINDS = {
    "tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_, "tensor(float16)": np.float16,
}  # fmt: skip


def session(model: Path | bytes) -> onnxruntime.InferenceSession:
    """ONNX Runtime with BASIC optimisation and one thread."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    where = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(where, options, providers=["CPUExecutionProvider"])


def feeds(running: onnxruntime.InferenceSession, seed: int = 0) -> Feeds:
    """Random inputs: two sequences, the second padded on the right where a mask can say so."""
    rng = np.random.default_rng(seed)
    sizes: dict[str, int] = {}
    inputs = running.get_inputs()
    for item in sorted(inputs, key=lambda i: "past" not in i.name):
        for axis, dim in enumerate(item.shape):
            if isinstance(dim, str):
                sizes.setdefault(dim, _size(item, axis, inputs))
    found = {i.name: _array(i, [sizes.get(d, d) for d in i.shape], rng) for i in inputs}
    if _is_genai(inputs):
        found["attention_mask"] = np.ones((2, PAST + 1), np.int64)
    return found


def _is_genai(inputs: list[Any]) -> bool:
    """GroupQueryAttention takes one new token with a past, and no padding."""
    return any("kv_cache_dim" in i.shape for i in inputs)


def _size(item: Any, axis: int, inputs: list[Any]) -> int:
    dim = item.shape[axis]
    if dim.isdecimal():
        return int(dim)
    if axis == 0:
        return 2
    if "past" in item.name:
        return PAST if axis == 2 else HEAD
    if item.name == "input_ids" and _is_genai(inputs):
        return 1
    if len(item.shape) == 4:
        return 3 if axis == 1 else 28
    if "mask" in item.name:
        new = next((i.shape[1] for i in inputs if i.name.endswith("input_ids")), NEW)
        past = any("past" in i.name for i in inputs)
        return (new if isinstance(new, int) else NEW) + PAST * past
    sound = len(item.shape) == 2 and item.type == "tensor(float)"
    return SAMPLES if sound else NEW


def _array(item: Any, shape: list[int], rng: np.random.Generator) -> np.ndarray:
    kind = _KINDS[item.type]
    if "mask" in item.name:
        mask = np.ones(shape, kind)
        if len(shape) == 2 and shape[1] > 2:
            mask[-1, -2:] = 0
        return mask
    if kind in (np.int64, np.int32):
        if "position" in item.name:
            past = PAST if shape[-1:] == [1] else 0
            return np.broadcast_to(np.arange(shape[-1], dtype=kind) + past, shape).copy()
        if not shape:
            return np.asarray(PAST, kind)
        return rng.integers(0, 2 if "type" in item.name else 60, shape).astype(kind)
    return rng.standard_normal(shape).astype(kind)


def answers(running: onnxruntime.InferenceSession, given: Mapping[str, np.ndarray]) -> Feeds:
    """All outputs by name; inputs that the model does not have are left out."""
    wanted = {i.name for i in running.get_inputs()}
    names = [o.name for o in running.get_outputs()]
    values = running.run(names, {n: a for n, a in given.items() if n in wanted})
    return dict(zip(names, values, strict=True))


def translated(model: ir.Model, given: Feeds) -> Feeds:
    """Feeds of the source file as feeds of the canonical `model`: new names, an empty past."""
    found: Feeds = {}
    for value in model.graph.inputs:
        name = value.metadata_props.get("pfmc.value", str(value.name))
        if name in given:
            found[str(value.name)] = given[name]
            continue
        assert "past" in str(value.name), f"the source has no input {name!r}"
        assert value.shape is not None
        sizes = [d if isinstance(d, int) else 0 for d in value.shape]
        found[str(value.name)] = np.zeros([2, *sizes[1:]], np.float32)
    return found


def source_names(model: ir.Model, results: Feeds) -> Feeds:
    """Outputs of the canonical `model` under the names of the source file."""
    names = {str(v.name): v.metadata_props.get("pfmc.value", "") for v in model.graph.outputs}
    return {**results, **{names[n]: a for n, a in results.items() if names.get(n)}}


def louder(path: Path, to: Path, factor: float = 8.0) -> Path:
    """A copy of the file with larger weights, so that no scale, cap or mask hides in the noise."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        small = array.dtype == np.float32 and array.size > 8 and np.abs(array).max() < 0.5
        if small and array.std() > 1e-4:
            tensor.CopyFrom(numpy_helper.from_array(array * np.float32(factor), tensor.name))
    onnx.save(model, to)
    return to


def difference(model: ir.Model, path: Path, seed: int = 0) -> float:
    """The largest |canonical - source| over all outputs of the file, over the largest number."""
    source = session(path)
    given = feeds(source, seed)
    wanted = answers(source, given)
    data = ir.to_proto(model).SerializeToString()
    found = source_names(model, answers(session(data), translated(model, given)))
    worst = 0.0
    for name, array in wanted.items():
        assert name in found, f"output {name!r} is lost"
        assert found[name].shape == array.shape, f"output {name!r} changed its shape"
        if array.size and array.dtype.kind == "f":
            assert np.isfinite(array).all(), f"output {name!r} of the source is not finite"
            error = float(np.abs(found[name] - array).max())
            worst = float(np.maximum(worst, error / max(1.0, float(np.abs(array).max()))))
        else:
            assert (found[name] == array).all(), name
    return worst
