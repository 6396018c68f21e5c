"""ONNX Runtime as the outside truth: runs a file in a limited subprocess, never in our process.

The child gets the file's own bytes; values to be observed are added as graph outputs by appending
a second serialised ``ModelProto`` (protobuf merges concatenated messages), so nothing is parsed,
rewritten or optimised on the way. Graph optimisation is BASIC: from EXTENDED on ONNX Runtime fuses
int4 DequantizeLinear + MatMul into an 8-bit kernel and is no oracle any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pfmc import child
from pfmc.child import Child

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of a file: name, ONNX Runtime type, dims (int or symbol)."""

    inputs: tuple[tuple[str, str, tuple[int | str, ...]], ...]
    outputs: tuple[str, ...]


class Oracle:
    """A running ONNX Runtime session in a child process; a context manager.

    Args:
        path: the ONNX file; its external data is read beside it.
        observe: names of inner values to return besides the graph's outputs.
        threads: threads of the session.

    Raises:
        InputError: ONNX Runtime refuses the file; the message is its own.
    """

    def __init__(self, path: Path, *, observe: Sequence[str] = (), threads: int = 1) -> None:
        self.path, self.observe, self.threads = path, tuple(observe), threads

    def __enter__(self) -> Oracle:
        self._child = Child("pfmc.oracle", "ONNX Runtime")
        question = {"path": str(self.path), "observe": self.observe, "threads": self.threads}
        try:
            opened = self._child.ask(question, str(self.path))
        except BaseException:
            self._child.close()
            raise
        self.signature = Signature(
            tuple((n, t, tuple(d)) for n, t, d in opened["inputs"]), tuple(opened["outputs"])
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._child.close()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Runs the file once; returns every output and observed value by name.

        A merged decoder's switch, if it is not given, chooses the branch with memory.
        """
        from pfmc.ingest.branches import SWITCH  # here: the child needs no onnx

        switches = {n: d for n, kind, d in self.signature.inputs if kind == "tensor(bool)"}
        if SWITCH in switches and SWITCH not in feeds:
            shape = [d if isinstance(d, int) else 1 for d in switches[SWITCH]]
            feeds = {**feeds, SWITCH: np.ones(shape, np.bool_)}
        return self._child.run(feeds, str(self.path))


def with_outputs(model: bytes, names: Sequence[str]) -> bytes:
    """The bytes of `model` with further graph outputs `names`, by protobuf concatenation."""
    graph = b"".join(
        _field(12, _field(1, name.encode())) for name in names
    )  # GraphProto.output, ValueInfoProto.name
    return model + _field(7, graph) if names else model  # ModelProto.graph


def _field(number: int, payload: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(payload)) + payload


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


# -- the child ---------------------------------------------------------------------------------


class _Session:
    """What the child holds: one session, opened by the first question."""

    def __init__(self) -> None:
        self.session: Any = None

    def __call__(self, question: dict[str, Any]) -> dict[str, Any]:
        if self.session is not None:
            return child.exchange(question, self._run)
        self.session = _open(question)
        return {
            "inputs": [[i.name, i.type, i.shape] for i in self.session.get_inputs()],
            "outputs": [o.name for o in self.session.get_outputs()],
        }

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        names = [o.name for o in self.session.get_outputs()]
        return dict(zip(names, self.session.run(None, dict(feeds)), strict=True))


def _open(question: Mapping[str, Any]) -> Any:
    import onnxruntime as ort

    ort.set_default_logger_severity(4)
    path = Path(question["path"])
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.intra_op_num_threads = options.inter_op_num_threads = question["threads"]
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent)
    )
    model = with_outputs(path.read_bytes(), question["observe"])
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    child.serve(_Session())
