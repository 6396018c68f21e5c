"""What watches a pipeline: dumps of the graph, and the folder that replays a crash."""

from __future__ import annotations

import hashlib
import json
import platform
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

import pfmc
from pfmc import passes
from pfmc.errors import UsageError
from pfmc.ir import text, vocabulary
from pfmc.passes.base import Context, Pass, PassResult

KEY_NOISE = "pfmc.noise"
"""On a graph input of a saved model: it stands for a weight; the text is the weight's data type."""

SMALL = 1024
"""Constants of at most so many elements are saved as they are."""
NOISE_SCALE = 0.02

_MODEL, _STORY, _TRACE = "model.onnx", "reproducer.json", "traceback.txt"
_WITNESSES = ("numpy", "onnx-ir", "onnx", "onnxruntime", "torch")


class Instrument(Protocol):
    """Called before and after every pass; `index` counts passes from 0."""

    def before(self, index: int, step: Pass, model: ir.Model) -> None:
        """The pass is about to run."""
        ...

    def after(self, index: int, step: Pass, result: PassResult) -> None:
        """The pass has run and its model was found whole."""
        ...


def label(index: int, step: Pass) -> str:
    """``03_fold``: the name of one run of a pass, in dumps and for ``--stop-after``."""
    return f"{index:02d}_{step.name}"


@dataclass(frozen=True)
class Dump:
    """Writes the graph after each pass that changed it: ``NN_pass.txt`` and ``NN_pass.onnx``.

    The ONNX file is small: weights are left out and stand as graph inputs (see `save_slim`).

    Attributes:
        folder: where to; made if it is not there.
        onnx: whether ONNX files are written beside the text.
    """

    folder: Path
    onnx: bool = True

    def before(self, index: int, step: Pass, model: ir.Model) -> None:
        """Writes the graph that the first pass gets as ``source``."""
        if index == 0:
            self.write("source", model)

    def after(self, index: int, step: Pass, result: PassResult) -> None:
        """Writes the graph if the pass changed it."""
        if result.changed:
            self.write(label(index + 1, step), result.model)

    def write(self, name: str, model: ir.Model) -> None:
        """Writes `model` as ``name.txt`` and ``name.onnx``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{name}.txt").write_text(text.model_text(model), encoding="utf-8")
        if self.onnx:
            save_slim(model, self.folder / f"{name}.onnx")


# -- models without weights ----------------------------------------------------------------------


def save_slim(model: ir.Model, path: Path) -> None:
    """Saves a copy of `model` whose large weights are graph inputs; `load_slim` fills in noise."""
    slim = model.clone()
    vocabulary.install(slim)
    graph = slim.graph
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.size <= SMALL or value.is_graph_input():
            continue
        del graph.initializers[name]
        value.const_value = None
        value.shape, value.type = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
        value.metadata_props[KEY_NOISE] = tensor.dtype.name
        graph.inputs.append(value)
    ir.save(slim, path)


def load_slim(path: Path, seed: int = 0) -> ir.Model:
    """Loads what `save_slim` saved, with seeded noise for the weights that were left out."""
    model = ir.load(path)
    graph = model.graph
    for value in [v for v in graph.inputs if KEY_NOISE in v.metadata_props]:
        graph.inputs.remove(value)
        kind = ir.DataType[value.metadata_props.pop(KEY_NOISE)]
        shape = value.shape.numpy() if value.shape is not None else ()
        value.const_value = _noise(str(value.name), shape, kind, seed)
        graph.register_initializer(value)
    return model


def _noise(name: str, shape: tuple[int, ...], kind: ir.DataType, seed: int) -> ir.TensorProtocol:
    """Normal numbers of standard deviation 0.02, or small integers; lazy, the same each time."""
    key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big")

    def read() -> ir.TensorProtocol:
        rng = np.random.Generator(np.random.Philox(key))
        if kind.is_floating_point():
            array: Any = rng.standard_normal(shape, dtype=np.float32) * np.float32(NOISE_SCALE)
        else:
            array = rng.integers(0, 2, shape)
        return ir.tensor(array.astype(kind.numpy()), dtype=kind, name=name)

    return ir.LazyTensor(read, kind, ir.Shape(shape), name=name)


# -- crash reproducer ----------------------------------------------------------------------------


def write_reproducer(
    folder: Path,
    model: ir.Model,
    steps: Sequence[Pass],
    context: Context,
    error: BaseException,
    keep_weights: bool = False,
) -> None:
    """Writes what is needed to see a crash again with `read_reproducer`.

    Args:
        folder: where to; made if it is not there.
        model: as it was before the pass that failed.
        steps: the passes that lead to the crash from there; usually one.
        context: of the pipeline; seed and limits are kept.
        error: what happened.
        keep_weights: whether the real weights are saved; by default noise stands in for them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if keep_weights:
        vocabulary.install(model)
        ir.save(model, folder / _MODEL)
    else:
        save_slim(model, folder / _MODEL)
    story = {
        "pfmc": pfmc.__version__,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _WITNESSES},
        "pass": [{"name": p.name, **asdict(p)} for p in steps],
        "seed": context.seed,
        "limits": asdict(context.limits) if context.limits is not None else None,
        "error": f"{type(error).__name__}: {error}",
    }
    (folder / _STORY).write_text(json.dumps(story, indent=2, sort_keys=True, default=str) + "\n")
    (folder / _TRACE).write_text("".join(traceback.format_exception(error)), encoding="utf-8")


def read_reproducer(folder: Path) -> tuple[ir.Model, list[Pass], Context]:
    """The model, the passes and the context of a reproducer; `pipeline.replay` runs them.

    Raises:
        UsageError: `folder` is not a reproducer.
    """
    from pfmc.hardware import Limits

    try:
        story = json.loads((folder / _STORY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"not a crash reproducer: {error}", where=str(folder)) from error
    steps = [
        passes.get(entry["name"]).from_options({k: v for k, v in entry.items() if k != "name"})
        for entry in story["pass"]
    ]
    given = story["limits"]
    limits = None if given is None else Limits(**{**given, "weight_bits": (*given["weight_bits"],)})
    return load_slim(folder / _MODEL), steps, Context(limits=limits, seed=int(story["seed"]))
