"""Shrinks a model that fails a check to a small one that still fails it."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pfmc.errors import InputError, PfmcError, UsageError
from pfmc.ingest import cuts, shrink
from pfmc.ingest.shrink import Subject
from pfmc.oracle import Oracle

Progress = Callable[[str], None]
Model = Any
"""An ``onnx.ModelProto``; only `pfmc.ingest` knows what is in it."""

_ROUNDS = 4
_KEPT_OUTPUT = 1 << 20
_TAIL = 3  # lines of a check's output that are shown
_OBSERVED = 2000
_SYMBOL = 2  # size of a dynamic dimension in the run that records values


def _silent(_: str) -> None:
    """No progress shown."""


@dataclass
class Command:
    """A check: a command that is run with the path of a candidate and fails or not.

    Attributes:
        text: split as a shell would; the path stands for ``{}``, or comes last. No shell runs it.
        timeout_s: wall-clock seconds after which a command is ended.
        timeout_fails: whether one that was ended counts as failing.
        exit_code: the only exit code that counts as failing; None takes all but 0.
        match: regular expression that stdout or stderr must hold too; None asks nothing.
        last: how the last run ended, in words.
    """

    text: str
    timeout_s: float = 60.0
    timeout_fails: bool = False
    exit_code: int | None = None
    match: str | None = None
    last: str = ""

    def __post_init__(self) -> None:
        try:
            if not shlex.split(self.text):
                raise UsageError("the check is empty", where="--check")
            re.compile(self.match or "")
        except ValueError as error:
            raise UsageError(f"cannot read the check: {error}", where="--check") from error
        except re.error as error:
            raise UsageError(f"no regular expression: {error}", where="--match") from error

    def words(self, path: Path) -> list[str]:
        """The command for the candidate at `path`."""
        words = shlex.split(self.text)
        if any("{}" in w for w in words):
            return [w.replace("{}", str(path)) for w in words]
        return [*words, str(path)]

    def __call__(self, path: Path) -> bool:
        """Whether the candidate at `path` still fails.

        Raises:
            UsageError: there is no such command.
        """
        with tempfile.TemporaryFile() as output:
            code = self._code(self.words(path), output)
            output.seek(0)
            said = output.read(_KEPT_OUTPUT).decode(errors="replace")
        ended = "ran out of time" if code is None else f"ended with exit code {code}"
        tail = said.strip().splitlines()[-_TAIL:]
        self.last = f"the check {ended}" + "".join(f"\n         {line}" for line in tail)
        if code is None:
            return self.timeout_fails
        if code == 0 or self.exit_code not in (None, code):
            return False
        return self.match is None or re.search(self.match, said) is not None

    def _code(self, words: list[str], output: Any) -> int | None:
        """The exit code; None after the time is over, when all that it started is ended."""
        try:
            child = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise UsageError(
                f"cannot run the check: {error.strerror}", where=words[0],
                mend="--check takes a program and its arguments; for a pipe write a script",
            ) from error  # fmt: skip
        try:
            return child.wait(self.timeout_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


@dataclass(frozen=True)
class Reduction:
    """A small model that fails as the large one did.

    Attributes:
        path: the file; sha256: its hex digest.
        nodes, bytes: before and after; data beside the files is not counted.
        checks: how often the check ran.
        finished: False if it was stopped before nothing more could be taken away; the result can
            be reduced further.
        interrupted: whether Ctrl-C stopped it, and not the total time.
    """

    path: Path
    sha256: str
    nodes: tuple[int, int]
    bytes: tuple[int, int]
    checks: int
    finished: bool
    interrupted: bool = False


def reduce_model(
    path: Path, fails: Callable[[Path], bool], out: Path, *,
    total_s: float | None = None, progress: Progress = _silent,
) -> Reduction:  # fmt: skip
    """Writes the smallest model it can find that still `fails` to `out`.

    Everything tried is as valid an ONNX file as the given one (onnx's full check where that
    passes), and the same model and check give the same bytes.

    Args:
        path: the model that fails.
        fails: takes the path of a candidate; says whether it still fails.
        out: the file to write.
        total_s: wall-clock seconds after which the best so far is taken.
        progress: takes one line at a time.

    Raises:
        UsageError: the model does not fail, or `out` is the model itself.
        InputError: the file is no ONNX model, or fails no more once it is written anew.
    """
    _refuse_places(path, out)
    subject = shrink.open_subject(path)
    if not fails(path):
        raise UsageError(
            "the check does not fail on this model, so there is nothing to reduce",
            where=str(path),
            mend=getattr(fails, "last", "") or "the check must fail on the model that is given",
        )  # fmt: skip
    subject.learn(_record(subject))
    with tempfile.TemporaryDirectory(prefix="pfmc-reduce-") as folder:
        deadline = None if total_s is None else time.monotonic() + total_s
        search = _Search(subject, fails, Path(folder), deadline, progress)
        finished = search.run()
    shrink.write(search.best, out, subject.external)
    data = out.read_bytes()
    return Reduction(
        out, hashlib.sha256(data).hexdigest(),
        (len(subject.proto.graph.node), len(search.best.graph.node)),
        (path.stat().st_size, len(data)), search.checks, finished, search.interrupted,
    )  # fmt: skip


def _refuse_places(path: Path, out: Path) -> None:
    if out.exists() and path.exists() and out.samefile(path):
        raise UsageError("the result would replace the model", where=str(out), mend="-o OTHER.onnx")
    if not out.parent.is_dir():
        raise UsageError("there is no such folder", where=str(out.parent))


class _TimeOverError(Exception):
    """The total time is spent."""


@dataclass
class _Search:
    """The reduction under way; `best` is the smallest model known to fail.

    Ctrl-C ends it as the end of the total time does: with the best so far.
    """

    subject: Subject
    fails: Callable[[Path], bool]
    folder: Path
    deadline: float | None
    progress: Progress
    checks: int = 1
    interrupted: bool = False
    known: dict[bytes, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.best: Model = self.subject.proto

    def run(self) -> bool:
        """Takes away all that can be taken away; False if the time was over before."""
        try:
            if not self.accepts(self.best) and not self.accepts(cuts.cleaned(self.best)):
                raise InputError(
                    "Written anew, without any change, the model fails no more",
                    where=str(self.subject.path), mend="the check may depend on the file's path",
                )  # fmt: skip
            self.accepts(cuts.cleaned(self.best))
            for _ in range(_ROUNDS):
                before = self.best
                self.fewer_nodes()
                self.fewer_values()
                if before is self.best:
                    break
        except (_TimeOverError, KeyboardInterrupt) as stop:
            self.interrupted = isinstance(stop, KeyboardInterrupt)
            return False
        return True

    def accepts(self, model: Model | None) -> bool:
        """Whether `model` is valid and still fails; if so it is the best from now on.

        Raises:
            _TimeOverError: the total time is spent.
        """
        if model is None:
            return False
        key = hashlib.sha256(model.SerializeToString(deterministic=True)).digest()
        if key not in self.known:
            if self.deadline is not None and time.monotonic() > self.deadline:
                raise _TimeOverError
            self.known[key] = self._try(model)
        if self.known[key]:
            self.best = model
        return self.known[key]

    def _try(self, model: Model) -> bool:
        path = self.folder / f"{len(self.known):05d}.onnx"
        shrink.write(model, path, self.subject.external)
        wanted = self.subject.strictness
        try:
            if wanted and shrink.strictness_of(path) < wanted:
                return False
            self.checks += 1
            nodes = len(model.graph.node)
            self.progress(f"check {self.checks}: {nodes} of {len(self.best.graph.node)} nodes")
            return self.fails(path)
        finally:
            for file in self.folder.glob(f"{path.name}*"):
                file.unlink()

    def first(self, models: Iterable[Model | None]) -> bool:
        """Accepts the first of `models` that still fails."""
        return any(map(self.accepts, models))

    # -- nodes -----------------------------------------------------------------------------------

    def fewer_nodes(self) -> None:
        """Cuts behind, before and within, until no single node can go."""
        self.cut_behind()
        self.cut_before()
        size = len(self.best.graph.node) // 2
        while size >= 1:
            again = self.sweep(size)
            if not again or size > 1:
                size //= 2
        self.first(cuts.fewer_outputs(self.best))

    def cut_behind(self) -> None:
        """Finds the shortest run of first nodes that fails, then what its last node needs."""
        model, fine, bad = self.best, 0, len(self.best.graph.node)
        while bad - fine > 1:
            middle = (fine + bad) // 2
            if self.first(self.pieces(model, range(middle))):
                bad = middle
            else:
                fine = middle
        last = len(self.best.graph.node) - 1
        self.first(self.pieces(self.best, cuts.ancestors(self.best, last)))

    def cut_before(self) -> None:
        """Finds the shortest run of last nodes that fails, what comes before being given."""
        model = self.best
        bad, fine = 0, len(model.graph.node)
        while fine - bad > 1:
            middle = (fine + bad) // 2
            if self.first(self.pieces(model, range(middle, len(model.graph.node)))):
                bad = middle
            else:
                fine = middle

    def sweep(self, size: int) -> bool:
        """Takes away runs of `size` nodes, from the end on; whether any could go."""
        gone = False
        for start in range(len(self.best.graph.node) - size, -size, -size):
            count = len(self.best.graph.node)
            low, high = max(start, 0), max(start, 0) + size
            if high > count or size >= count:
                continue
            keep = [i for i in range(count) if not low <= i < high]
            gone |= self.first(self.pieces(self.best, keep)) or (
                size == 1 and self.first(cuts.bypasses(self.best, low, self.subject.types))
            )
        return gone

    def pieces(self, model: Model, keep: Iterable[int]) -> Iterator[Model | None]:
        """The model of the nodes `keep`: cut values as inputs, integers recorded, all constant."""
        indices = list(keep)
        for constant in (
            cuts.no_constant,
            partial(self.subject.constant, real=False),
            partial(self.subject.constant, real=True),
        ):
            yield cuts.subset(model, indices, self.subject.types, constant)

    # -- weights and sizes -----------------------------------------------------------------------

    def fewer_values(self) -> None:
        """Weights become inputs, sizes small, numbers zeros; attributes and texts go."""
        names = cuts.weights(self.best)
        if names and not self.accepts(cuts.as_inputs(self.best, names)):
            for name in names:
                self.accepts(cuts.as_inputs(self.best, [name]))
        for size in cuts.sizes(self.best):
            tries = sorted({n for n in (1, 2, 4, size // 2) if n < size})
            self.first(cuts.resized(self.best, size, n, self.subject.read) for n in tries)
        for name in cuts.weights(self.best):
            self.accepts(cuts.emptied(self.best, name, self.subject.read))
        for place in cuts.attributes(self.best):
            self.accepts(cuts.without_attribute(self.best, place))
        self.accepts(cuts.cleaned(self.best))


# -- recorded values -------------------------------------------------------------------------------


def _record(subject: Subject) -> dict[str, Any]:
    """The values that `subject` asks for, in one run of ONNX Runtime on ones.

    A model that it refuses, or that needs other inputs than those made up here, records nothing.
    """
    names = subject.questions()[:_OBSERVED]
    if not names:
        return {}
    try:
        with Oracle(subject.path, observe=names) as oracle:
            feeds = {n: _feed(kind, dims) for n, kind, dims in oracle.signature.inputs}
            found = oracle.run(feeds)
    except (PfmcError, ValueError, KeyError):
        return {}
    return {n: found[n] for n in names if n in found}


def _feed(kind: str, dims: tuple[int | str, ...]) -> Any:
    """Ones of the type ``tensor(int64)``; a dynamic dimension has two elements.

    Raises:
        KeyError: a type that NumPy has not.
    """
    names = {"float": "float32", "double": "float64", "bool": "bool", "float16": "float16"}
    word = kind.removeprefix("tensor(").removesuffix(")")
    sizes = [d if isinstance(d, int) else _SYMBOL for d in dims]
    try:
        return np.ones(sizes, np.dtype(names.get(word, word)))
    except TypeError as error:
        raise KeyError(kind) from error
