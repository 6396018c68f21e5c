"""The node models of onnx's backend test generator through ingest and the canonical passes.

``python -m tests.ingest.backend_nodes`` writes ``backend_nodes.tsv`` anew: for every operator how
many of its models are accepted and why the others are refused. `test_backend_nodes.py` holds it.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from pfmc import ingest
from pfmc.errors import PfmcError
from pfmc.ir import meaning, vocabulary
from pfmc.passes import pipeline, recipe

TABLE = Path(__file__).with_name("backend_nodes.tsv")
ACCEPTED = "accepted"
_NO_MEANING = re.compile("no meaning|training|not supported")
PATIENCE = {"float16": 1e-2, "bfloat16": 3e-2}
UNRUN = frozenset({"ImageDecoder"})  # neither ONNX Runtime nor the reference can
RTOL, ATOL = 1e-3, 1e-5


@functools.cache
def groups() -> dict[str, list[Any]]:
    """Operator -> its cases, those of its decompositions (``…_expanded``) among them."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = {c.name: c for c in collect_testcases(None)}
    found: dict[str, list[Any]] = {}
    for name, case in sorted(cases.items()):
        plain = cases.get(re.sub(r"(_expanded(_ver\d+)?|_ver\d+)+$", "", name), case)
        found.setdefault(plain.model.graph.node[-1].op_type, []).append(case)
    return found


@dataclass(frozen=True)
class Result:
    """What became of a case: `fate` is ``accepted`` or the reason; `wrong` says what differs."""

    fate: str
    wrong: str = ""


def run(case: Any, path: Path, passes: tuple[Any, ...]) -> Result:
    """Loads and canonicalises a case; both graphs must give its outputs."""
    path.write_bytes(case.model.SerializeToString())
    try:
        source = ingest.load(path).model
    except PfmcError as error:
        return Result(f"load: {_reason(error)}")
    wrong = _compare(case, source) if case.model.graph.node[0].op_type not in UNRUN else ""
    if wrong:
        return Result(ACCEPTED, f"source: {wrong}")
    try:
        canonical = pipeline.canonicalise(source, passes).model
    except PfmcError as error:
        return Result(f"canonical: {_reason(error)}")
    wrong = _compare(case, canonical)
    return Result(ACCEPTED, f"canonical: {wrong}" if wrong else "")


def _reason(error: PfmcError) -> str:
    """The error without names that are the case's own; several findings in alphabetic order."""
    lines = [line.strip() for line in error.what.splitlines()]
    lines = lines[1:] if len(lines) > 1 and "things are wrong" in lines[0] else lines
    lines = [line for line in lines if not line.endswith("cannot be compiled:")]
    bare = {re.sub(r"\(value '[^']*'\)|: node '.*| x \d+|\d+ elements", "", x).strip()[:160]
            for x in lines}  # fmt: skip
    return "; ".join(sorted(bare)).replace("\t", " ")


def _compare(case: Any, model: ir.Model) -> str:
    """What is wrong with the graph's outputs; empty if nothing is."""
    vocabulary.install(model)
    proto = ir.to_proto(model)
    for given, expected in case.data_sets:
        arrays = [_array(x) for x in given]
        feeds = dict(zip([v.name for v in model.graph.inputs], arrays, strict=False))
        if len(model.graph.inputs) != len(arrays):  # an input that nothing reads
            names = [v.name for v in case.model.graph.input]
            feeds = dict(zip(names, arrays, strict=False))
        wanted = [_array(x) for x in expected]
        told = [_judge(run(model, proto, feeds), wanted, arrays) for run in (_ort, _reference)]
        if all(told):
            return f"ONNX Runtime: {told[0]}; reference: {told[1]}"
        own = _own(model, feeds, wanted, arrays)
        if own:
            return f"pfmc's own meaning: {own}"
    return ""


def _judge(got: list[Any] | str, wanted: list[Any], given: list[Any]) -> str:
    if isinstance(got, str):
        return got
    kinds = [getattr(x, "dtype", np.dtype(np.float32)).name for x in (*given, *wanted)]
    rough = max((PATIENCE.get(k, 0.0) for k in kinds), default=0.0)
    for mine, want in zip(got, wanted, strict=True):
        if want is None or isinstance(want, (list, str)):
            continue
        a, b = np.asarray(mine), np.asarray(want)
        if a.shape != b.shape:
            return f"shape {a.shape}, not {b.shape}"
        if a.dtype != b.dtype and (a.dtype.kind != "f" or b.dtype.kind not in "fV"):
            return f"type {a.dtype}, not {b.dtype}"
        kind = np.complex128 if b.dtype.kind == "c" else np.float64
        with np.errstate(all="ignore"):
            fits = np.allclose(a.astype(kind), b.astype(kind), rough or RTOL, rough or ATOL, True)
        if not fits:
            return f"differs by {np.nanmax(np.abs(a.astype(kind) - b.astype(kind))):.3g}"
    return ""


def _array(x: Any) -> Any:
    if isinstance(x, onnx.TensorProto):
        return numpy_helper.to_array(x)
    return np.asarray(x) if isinstance(x, np.generic) else x


def _ort(_: ir.Model, proto: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any] | str:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    try:
        session = ort.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        kinds = {i.name: i.type for i in session.get_inputs()}
        return session.run(None, {n: _as(feeds[n], k) for n, k in kinds.items()})
    except Exception as error:  # it has no kernel for many types; the reference is asked then
        return str(error)[:120]


def _as(array: Any, kind: str) -> Any:
    """Halves as reals where the canonical graph has become real."""
    return array.astype(np.float32) if kind == "tensor(float)" else array


def _reference(_: ir.Model, proto: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any] | str:
    names = {v.name for v in proto.graph.input}
    kinds = {v.name: v.type.tensor_type.elem_type for v in proto.graph.input}
    given = {
        n: _as(x, "tensor(float)" if kinds.get(n) == onnx.TensorProto.FLOAT else "")
        for n, x in feeds.items()
        if n in names
    }
    try:
        return ReferenceEvaluator(proto).run(None, given)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:120]}"


def _own(model: ir.Model, feeds: dict[str, Any], wanted: list[Any], given: list[Any]) -> str:
    """What pfmc itself computes; empty too where it has no meaning for an operator."""
    if meaning.unsupported(model):
        return ""
    kinds = {str(v.name): v.dtype for v in model.graph.inputs}
    fed = {n: _as(x, "tensor(float)" if kinds.get(n) is ir.DataType.FLOAT else "")
           for n, x in feeds.items()}  # fmt: skip
    try:
        got = meaning.evaluate(model, fed, [str(v.name) for v in model.graph.outputs])
    except PfmcError as error:
        return "" if _NO_MEANING.search(error.what) else error.what
    return _judge(got, wanted, given)


# -- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One operator: how many cases are accepted, and the reasons of the others, counted."""

    operator: str
    accepted: int
    refused: dict[str, int]

    def line(self) -> str:
        reasons = " | ".join(f"{n} x {r}" for r, n in sorted(self.refused.items()))
        return f"{self.operator}\t{self.accepted}\t{sum(self.refused.values())}\t{reasons}\n"


def row(operator: str, results: list[Result]) -> Row:
    """The row of an operator's results."""
    fates = Counter(r.fate for r in results)
    accepted = fates.pop(ACCEPTED, 0)
    return Row(operator, accepted, dict(fates))


def table() -> dict[str, Row]:
    """The committed table."""
    rows = {}
    for line in TABLE.read_text(encoding="utf-8").splitlines()[1:]:
        operator, accepted, _, reasons = line.split("\t")
        parts = [p.partition(" x ") for p in reasons.split(" | ") if p]
        rows[operator] = Row(operator, int(accepted), {r: int(n) for n, _, r in parts})
    return rows


def results(operator: str) -> list[Result]:
    """What became of each case of `operator`, in the order of their names."""
    passes = recipe.load("stream").passes
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        return [run(case, path, passes) for case in groups()[operator]]


def _lines() -> Iterator[str]:
    yield "operator\taccepted\trefused\treasons\n"
    for operator in sorted(groups()):
        found = results(operator)
        for case, result in zip(groups()[operator], found, strict=True):
            if result.wrong:
                print(case.name, result.wrong)
        yield row(operator, found).line()


if __name__ == "__main__":
    TABLE.write_text("".join(_lines()), encoding="utf-8")
    known = table()
    counts = [sum(r.accepted for r in known.values())]
    counts.append(sum(sum(r.refused.values()) for r in known.values()))
    print(f"{counts[0]} accepted, {counts[1]} refused")
