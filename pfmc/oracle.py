"""ONNX Runtime as the outside truth: runs a file in a limited subprocess, never in our process.

The child gets the file's own bytes; values to be observed are added as graph outputs by appending
a second serialised ``ModelProto`` (protobuf merges concatenated messages), so nothing is parsed,
rewritten or optimised on the way. Graph optimisation is BASIC: from EXTENDED on ONNX Runtime fuses
int4 DequantizeLinear + MatMul into an 8-bit kernel and is no oracle any more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pfmc.errors import InputError

Array = npt.NDArray[np.generic]

_MEMORY_BYTES = 16 << 30
_SECONDS = 1800


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
        self._folder = tempfile.TemporaryDirectory(prefix="pfmc-oracle-")
        self._errors = (Path(self._folder.name) / "stderr").open("w+b")
        self._child = subprocess.Popen(
            [sys.executable, "-m", "pfmc.oracle"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )  # fmt: skip
        opened = self._ask(
            {"path": str(self.path), "observe": self.observe, "threads": self.threads}
        )
        self.signature = Signature(
            tuple((n, t, tuple(d)) for n, t, d in opened["inputs"]), tuple(opened["outputs"])
        )
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe:
                pipe.close()
        self._child.kill()
        self._child.wait()
        self._errors.close()
        self._folder.cleanup()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Runs the file once; returns every output and observed value by name."""
        there, back = (Path(self._folder.name) / n for n in ("feeds.npz", "results.npz"))
        np.savez(there, **{f"a{i}": v for i, v in enumerate(feeds.values())})  # type: ignore[arg-type]
        answer = self._ask({"feeds": str(there), "names": list(feeds), "results": str(back)})
        with np.load(back) as held:
            return {n: held[f"a{i}"] for i, n in enumerate(answer["names"])}

    def _ask(self, question: Mapping[str, object]) -> dict[str, Any]:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps(question).encode() + b"\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            raise InputError(
                f"ONNX Runtime ended while running the file: {self._last_words()}",
                where=str(self.path),
                mend=f"its limits are {_MEMORY_BYTES >> 30} GiB of memory and {_SECONDS} CPU s",
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise InputError(f"ONNX Runtime refuses: {answer['error']}", where=str(self.path))
        return answer

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self._child.poll()}"


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


def _limit() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))


def _questions() -> Iterator[dict[str, Any]]:
    for line in sys.stdin.buffer:
        yield json.loads(line)


def _serve() -> None:
    _limit()
    import onnxruntime as ort

    ort.set_default_logger_severity(4)
    session: Any = None
    for question in _questions():
        try:
            if session is None:
                session = _open(question)
                answer: dict[str, Any] = {
                    "inputs": [[i.name, i.type, i.shape] for i in session.get_inputs()],
                    "outputs": [o.name for o in session.get_outputs()],
                }
            else:
                answer = _run(session, question)
        except Exception as error:  # whatever ONNX Runtime says goes to the parent, in words
            answer = {"error": str(error).strip().splitlines()[0][:500]}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _open(question: Mapping[str, Any]) -> Any:
    import onnxruntime as ort

    path = Path(question["path"])
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.intra_op_num_threads = options.inter_op_num_threads = question["threads"]
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent)
    )
    model = with_outputs(path.read_bytes(), question["observe"])
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _run(session: Any, question: Mapping[str, Any]) -> dict[str, Any]:
    with np.load(question["feeds"]) as held:
        feeds = {n: held[f"a{i}"] for i, n in enumerate(question["names"])}
    results = session.run(None, feeds)
    np.savez(question["results"], **{f"a{i}": r for i, r in enumerate(results)})
    return {"names": [o.name for o in session.get_outputs()]}


if __name__ == "__main__":
    _serve()
