"""Whether pfmc says the same as ONNX Runtime about a graph, or refuses it cleanly."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from pfmc import ingest
from pfmc.errors import InputError, InternalError
from pfmc.ir import meaning, vocabulary
from pfmc.passes import pipeline, recipe

TOLERANCE = {"float16": 2e-2, "float32": 1e-4, "float64": 1e-4}
"""Of the largest element of an output; canonical graphs compute in float32."""

HALVES = "accepted, but its half precision decides a comparison or a rounding"
SHAKY = "accepted, but a millionth more in its inputs changes it as much"
_NUMERIC = re.compile("differs by|not finite|not equal")
_NO_KERNEL = re.compile("NOT_IMPLEMENTED|relu_clip_fusion")  # the latter fails on float64
_HALF = "in half precision"

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Outcome:
    """What became of a graph.

    Attributes:
        fate: ``accepted``, or where and why it was refused.
        wrong: what disagrees with ONNX Runtime; empty if nothing does.
        error: the largest difference, as a part of an output's largest element.
    """

    fate: str
    wrong: str = ""
    error: float = 0.0


@functools.cache
def _passes() -> tuple[Any, ...]:
    return recipe.load("stream").passes


def agree(path: Path, feeds: Arrays, otherwise: Arrays | None = None) -> Outcome:
    """Runs the file, the loaded graph and the canonical one in ONNX Runtime and in pfmc.

    Args:
        path: the file.
        feeds: its inputs.
        otherwise: what is right where ONNX Runtime lacks a kernel for the file.
    """
    ran = _ort(path.read_bytes(), feeds)
    truth = otherwise if isinstance(ran, str) else ran
    if truth is None:
        return Outcome("ONNX Runtime does not run it")
    errors, fate = [0.0], "load"
    try:
        model = ingest.load(path).model
        values = [*model.graph.initializers.values(), *(v for n in model.graph for v in n.outputs)]
        halves = any(v.dtype is ir.DataType.FLOAT16 for v in values)
        wrong = _compare("source", model, halves, feeds, truth, errors)
        fate = "canonical"
        if not wrong:
            model = pipeline.canonicalise(model, _passes()).model
            wrong = _compare("canonical", model, halves, feeds, truth, errors)
    except InternalError as error:
        return Outcome(fate, str(error))
    except InputError as error:
        return Outcome(f"{fate}: {_bare(error.what)}")
    if _HALF in wrong:
        return Outcome(HALVES)
    if _NUMERIC.search(wrong) and _is_shaky(path, feeds, truth):
        return Outcome(SHAKY)
    return Outcome("accepted", wrong, 0.0 if wrong else max(errors))


def _is_shaky(path: Path, feeds: Arrays, truth: Arrays) -> bool:
    """Whether the graph itself magnifies rounding: tangents of hundreds, infinity times zero."""
    moved = {k: _moved(v) for k, v in feeds.items()}
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        array = _moved(onnx.numpy_helper.to_array(tensor))
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    ran = _ort(proto.SerializeToString(), moved)
    if isinstance(ran, str):
        model = ingest.load(path).model
        if meaning.unsupported(model):
            return not all(np.isfinite(v).all() for v in truth.values() if v.dtype.kind == "f")
        ran = dict(zip(truth, meaning.evaluate(model, moved, list(truth)), strict=True))
    return any(_differs(ran[name], want, []) for name, want in truth.items())


def _moved(array: np.ndarray) -> np.ndarray:
    return array * array.dtype.type(1 + 3e-6) if array.dtype.kind == "f" else array


def _bare(what: str) -> str:
    """The reason without what is the graph's own."""
    what = re.sub(r" \(and \d+ more\)", "", what)
    return re.sub(r"'[^']*'|\[.*\]|\d+", "_", what.replace("\n", " "))[:110]


def _compare(
    stage: str, model: ir.Model, halves: bool, feeds: Arrays, truth: Arrays, errors: list[float]
) -> str:
    vocabulary.install(model)
    names = [str(v.name) for v in model.graph.outputs]
    given = {str(v.name): _typed(feeds[str(v.name)], v) for v in model.graph.inputs}
    got = _ort(ir.to_proto(model).SerializeToString(), given)
    if isinstance(got, str) and not _NO_KERNEL.search(got):
        return f"{stage}: ONNX Runtime: {got}"
    told = [] if isinstance(got, str) else [(f"{stage} in ONNX Runtime", got)]
    if not meaning.unsupported(model):
        try:
            own = meaning.evaluate(model, given, names)
        except InputError as error:
            if "no meaning" not in error.what and "not supported" not in error.what:
                return f"{stage} in pfmc: {error.what}"
        else:
            told.append((f"{stage} in pfmc", dict(zip(names, own, strict=True))))
    for who, values in told:
        for name, want in truth.items():
            wrong = _differs(values[name], want, errors)
            if wrong:
                return f"{who}: output {name!r} {wrong}" + (f" {_HALF}" if halves else "")
    return ""


def _typed(array: np.ndarray, value: ir.Value) -> np.ndarray:
    """Where the canonical graph became float32, its inputs did too."""
    widened = array.dtype.kind == "f" and value.dtype is not None
    return array.astype(value.dtype.numpy()) if widened and value.dtype else array


def _differs(got: np.ndarray, want: np.ndarray, errors: list[float]) -> str:
    if got.shape != want.shape:
        return f"has shape {got.shape}, not {want.shape}"
    if want.dtype.kind != "f":
        return "" if (got == want).all() else "is not equal"
    a, b = got.astype(np.float64), want.astype(np.float64)
    whole = np.isfinite(b)
    if (np.isnan(a) != np.isnan(b)).any() or (a[np.isinf(b)] != b[np.isinf(b)]).any():
        return "is not finite in other places"
    if not whole.any():
        return ""
    error = float(np.abs(a[whole] - b[whole]).max() / max(1.0, np.abs(b[whole]).max()))
    if not error <= TOLERANCE[want.dtype.name]:
        return f"differs by {error:.3g}"
    errors.append(error)
    return ""


def _ort(model: bytes, feeds: Arrays) -> Arrays | str:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        given = {i.name: feeds[i.name] for i in session.get_inputs()}
        names = [o.name for o in session.get_outputs()]
        return dict(zip(names, session.run(names, given), strict=True))
    except Exception as error:  # refused: in its own words
        return str(error).partition("\n")[0][:200]
