"""A model that was read in, with the files it came from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from pfmc.errors import InputError
from pfmc.ingest.files import SourceFile
from pfmc.ingest.tensors import check_finite
from pfmc.ir import stored


@dataclass(frozen=True)
class Loaded:
    """A model at stage SOURCE and the files it came from.

    Attributes:
        model: the uniform graph: opset 24, no Constants, Identities or dead nodes.
        path: the .onnx file, or the ``config.json`` of a checkpoint.
        sha256: its hex digest.
        files: that file, then the external data files (or index and shards) in order of first use.
        exporter: who wrote it, e.g. ``"pytorch 2.13.0"`` or ``"huggingface LlamaForCausalLM"``.
        precision: the element type that most of the floating-point weights have.
        merged: whether the file holds two branches, of which the model is one
            (`pfmc.ingest.branches`): values inside it cannot be observed in the file.
    """

    model: ir.Model
    path: Path
    sha256: str
    files: tuple[SourceFile, ...]
    exporter: str
    precision: ir.DataType
    merged: bool = False

    @property
    def name(self) -> str:
        """What to call the model: the file's name without its ending, or a checkpoint's folder."""
        return self.title if self.from_checkpoint else self.path.stem

    @property
    def title(self) -> str:
        """The file's name, or a checkpoint's folder."""
        return self.path.absolute().parent.name if self.from_checkpoint else self.path.name

    @property
    def from_checkpoint(self) -> bool:
        """Whether the graph was built from a checkpoint; no ONNX file exists then."""
        return self.path.name == "config.json"

    def release(self) -> None:
        """Lets the system drop all weights that were paged in."""
        for file in self.files:
            file.release()

    def check_finite(self) -> None:
        """Reads every weight once and refuses NaN and infinity, naming tensor and index."""
        with named(self.path):
            for name, value in self.model.graph.initializers.items():
                tensor = value.const_value
                if tensor is not None and tensor.dtype.is_floating_point():
                    check_finite(name, stored.numbers(value))


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors about a node or tensor say of which file."""
    try:
        yield
    except InputError as error:
        where = f"{path}: {error.where}"
        raise InputError(error.what, where=where, mend=error.mend) from error
