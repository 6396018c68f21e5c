"""What tests of whole compiles share: a tiny Llama, artifacts of it, and two ways to call pfmc."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
BARD = ROOT / "models" / "bard" / "model.onnx"
VOCABULARY = 128

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell does to what it runs behind
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Ended:
    """A call of the command line that has ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """What was printed, as JSON; it must be one document and succeed."""
        assert (self.code, self.err) == (0, "")
        return json.loads(self.out, parse_constant=_no_number)

    def refused(self, code: int, *phrases: str) -> None:
        """Asserts one clear message with `phrases`, exit code `code`, and no data."""
        assert (self.code, self.out) == (code, ""), (self.code, self.out, self.err)
        assert self.err.startswith("pfmc: "), self.err
        assert self.err.count("pfmc: ") == 1, self.err
        assert "Traceback" not in self.err
        for phrase in phrases:
            assert phrase in self.err, self.err


def _no_number(text: str) -> None:
    raise AssertionError(f"{text} is not JSON")


def environment(**changes: str) -> dict[str, str]:
    """The environment of a child that runs this checkout on one thread."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.Popen[str]]:
    """Starts the real command line in a process of its own."""

    def call(
        *args: object, cwd: Path | None = None, env: Mapping[str, str] | None = None, **more: Any
    ) -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(
            [sys.executable, "-m", "pfmc", *map(str, args)], cwd=cwd, text=True,
            env=environment(**(env or {})), **{**pipes, **more},
        )  # fmt: skip

    return call


@pytest.fixture(scope="session")
def pfmc(start: Callable[..., subprocess.Popen[str]]) -> Callable[..., Ended]:
    """Runs the real command line in a process of its own and waits for its end."""

    def call(*args: object, **more: Any) -> Ended:
        process = start(*args, **more)
        out, err = process.communicate(timeout=300)
        return Ended(process.returncode, out or "", err or "")

    return call


@pytest.fixture(scope="session")
def here() -> Callable[..., Ended]:
    """Runs the command line inside this process: the same, but quick."""
    from pfmc import cli

    def call(*args: object) -> Ended:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli._run([str(a) for a in args])
        return Ended(code, out.getvalue(), err.getvalue())

    return call


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random causal Llama of 2 layers with external weights and a tokenizer beside it."""
    import onnx

    synthetic = _module("pfmc_synthetic", ROOT / "benchmarks" / "synthetic.py")
    shape = synthetic.Shape(layers=2, hidden=64, heads=4, ffn=96, vocabulary=VOCABULARY)
    path: Path = synthetic.generate(tmp_path_factory.mktemp("tiny"), shape)
    model = onnx.load(path, load_external_data=False)
    (lowest,) = (t for t in model.graph.initializer if t.name == "lowest")
    lowest.CopyFrom(onnx.numpy_helper.from_array(np.array(-np.inf, np.float16), "lowest"))
    path.write_bytes(model.SerializeToString(deterministic=True))
    _write_tokenizer(path.parent / "tokenizer.json")
    return path


def _module(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _write_tokenizer(path: Path) -> None:
    """One token a word: ``w0`` to ``w127``."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(path))


@pytest.fixture(scope="session")
def artifacts(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny Llama on every target; read only, copy one to harm it."""
    from pfmc.compile import compile_model

    folder = tmp_path_factory.mktemp("artifacts")
    made = {target: folder / f"{target}.pfm" for target in ("rom", "crossbar", "optical")}
    for target, place in made.items():
        recipe = "stream" if target == "rom" else None  # the others cannot scale for every token
        settings = () if recipe else ("calibration.sequences=2", "calibration.length=16")
        compile_model(tiny, place, target=target, recipe=recipe, settings=settings)
    return made
