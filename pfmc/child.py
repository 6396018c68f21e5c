"""A limited subprocess that answers questions: one line of JSON each way, arrays through files.

Whatever runs a model from elsewhere (ONNX Runtime, transformers) runs here: its memory and its CPU
time are bounded, and when it dies only it dies.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pfmc.errors import InputError

Array = npt.NDArray[Any]
Answer = dict[str, Any]

MEMORY_BYTES = 16 << 30
SECONDS = 1800


class Child:
    """A running ``python -m MODULE`` that calls `serve`.

    Args:
        module: what is run.
        who: whom it speaks for, in messages.
        memory: most bytes of address space.
        environment: variables besides the parent's.
    """

    def __init__(
        self, module: str, who: str, *, memory: int = MEMORY_BYTES,
        environment: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.who, self.memory = who, memory
        self._folder = tempfile.TemporaryDirectory(prefix="pfmc-oracle-")
        self._errors = (Path(self._folder.name) / "stderr").open("w+b")
        paths = os.pathsep.join(p for p in sys.path if p)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(memory)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            env={**os.environ, **(environment or {}), "PYTHONPATH": paths},
        )  # fmt: skip

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """Ends it and removes its files."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()
        self._process.kill()
        self._process.wait()
        self._errors.close()
        self._folder.cleanup()

    def ask(self, question: Mapping[str, object], where: str) -> Answer:
        """Its answer.

        Raises:
            InputError: it says an error, or is gone; `where` is the file at fault.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            raise InputError(
                f"{self.who} ended while running the file: {self._last_words()}",
                where=where,
                mend=f"its limits are {self.memory >> 30} GiB of memory and {SECONDS} CPU s",
            )
        answer: Answer = json.loads(line)
        if "error" in answer:
            raise InputError(f"{self.who} refuses: {answer['error']}", where=where)
        return answer

    def run(self, feeds: Mapping[str, Array], where: str) -> dict[str, Array]:
        """Sends arrays by name and gets arrays by name (`exchange` is the other end)."""
        there, back = (Path(self._folder.name) / n for n in ("feeds.npz", "results.npz"))
        np.savez(there, **{f"a{i}": v for i, v in enumerate(feeds.values())})  # type: ignore[arg-type]
        question = {"feeds": str(there), "names": list(feeds), "results": str(back)}
        answer = self.ask(question, where)
        with np.load(back) as held:
            return {n: held[f"a{i}"] for i, n in enumerate(answer["names"])}

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.poll()}"


# -- the other end -------------------------------------------------------------------------------


def serve(answer: Callable[[Answer], Answer]) -> None:
    """Limits this process, then answers every question until the parent closes the pipe."""
    import resource

    memory = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    out, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    for question in _questions():
        try:
            found = answer(question)
        except Exception as error:  # whatever the library says goes to the parent, in words
            lines = str(error).strip().splitlines()
            found = {"error": (lines[0] if lines else repr(error))[:500]}
        out.write(json.dumps(found) + "\n")
        out.flush()


def _questions() -> Iterator[Answer]:
    for line in sys.stdin.buffer:
        yield json.loads(line)


def exchange(question: Answer, run: Callable[[dict[str, Array]], Mapping[str, Array]]) -> Answer:
    """Answers `Child.run`: reads its arrays, runs, and writes the results."""
    with np.load(question["feeds"]) as held:
        feeds = {n: held[f"a{i}"] for i, n in enumerate(question["names"])}
    results = run(feeds)
    np.savez(question["results"], **{f"a{i}": r for i, r in enumerate(results.values())})  # type: ignore[arg-type]
    return {"names": list(results)}
