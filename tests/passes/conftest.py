"""Graphs written as ONNX text, and ONNX Runtime as the outside truth for passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import numpy_helper

from pfmc.ingest.load import load
from pfmc.ir import check, provenance, vocabulary
from pfmc.passes.base import Context, Declined, Pass
from pfmc.passes.fold import Fold
from pfmc.passes.kv_memory import KvMemory
from pfmc.passes.linears import Linears
from pfmc.passes.merge_equal import MergeEqual
from pfmc.passes.plain_operators import PlainOperators
from pfmc.passes.raise_activations import RaiseActivations
from pfmc.passes.raise_attention import RaiseAttention
from pfmc.passes.raise_norms import RaiseNorms
from pfmc.passes.raise_rotary import RaiseRotary
from pfmc.passes.shape_arithmetic import ShapeArithmetic
from pfmc.passes.ties import Ties

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = REPOSITORY.parent / "shared"

CANONICAL: tuple[Pass, ...] = (
    Fold(),
    ShapeArithmetic(),
    PlainOperators(),
    MergeEqual(),
    RaiseNorms(),
    RaiseActivations(),
    RaiseRotary(),
    RaiseAttention(),
    KvMemory(),
    Linears(),
    Ties(),
    ShapeArithmetic(),
    MergeEqual(),
    Fold(),
)

Feeds = dict[str, np.ndarray]


@dataclass(frozen=True)
class Lab:
    """What the tests of passes need; see the methods."""

    canonical: tuple[Pass, ...] = CANONICAL
    shared: Path = SHARED
    repository: Path = REPOSITORY

    def make(self, text: str, **arrays: np.ndarray) -> ir.Model:
        """A model of opset 24 from the text of its graph, with `arrays` as initialisers."""
        graph = onnx.parser.parse_graph(f"g {text}")
        graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays.items())
        opsets = [onnx.helper.make_opsetid("", vocabulary.OPSET)]
        proto = onnx.helper.make_model(graph, opset_imports=opsets)
        proto.ir_version = vocabulary.IR_VERSION
        model = ir.from_proto(proto)
        provenance.stamp(model)
        return model

    def load(self, path: Path | str) -> ir.Model:
        """An ONNX file through ingest; a bare name is one of the zoo."""
        if isinstance(path, str):
            path = SHARED / "zoo" / f"{path}.onnx"
        if not path.is_file():
            pytest.skip(f"{path.name} is absent")
        return load(path).model

    def run(self, model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name, by ONNX Runtime with BASIC optimisation, after onnx.checker."""
        session = self.session(model)
        wanted = {i.name for i in session.get_inputs()}
        names = [o.name for o in session.get_outputs()]
        given = {n: a for n, a in feeds.items() if n in wanted}
        return dict(zip(names, session.run(names, given), strict=True))

    def session(self, model: ir.Model) -> onnxruntime.InferenceSession:
        """A session of ONNX Runtime on the serialised model."""
        data = ir.to_proto(model).SerializeToString()
        onnx.checker.check_model(data)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def apply(self, model: ir.Model, passes: Sequence[Pass]) -> list[Declined]:
        """Applies passes; after each the graph must be whole and pass onnx.checker."""
        declined: list[Declined] = []
        for item in passes:
            result = item.apply(model, Context())
            assert result.model is model
            declined.extend(result.declined)
            assert [str(v) for v in check.broken(model)] == [], item.name
            onnx.checker.check_model(ir.to_proto(model).SerializeToString())
        return declined

    def counts(self, model: ir.Model) -> Counter[str]:
        """Nodes by operator."""
        return Counter(n.op_type for n in model.graph)

    def same(
        self,
        model: ir.Model,
        passes: Sequence[Pass],
        feeds: Mapping[str, np.ndarray],
        tolerance: float = 1e-5,
    ) -> list[Declined]:
        """Applies `passes` and holds the outputs equal to what they were."""
        before = self.run(model, feeds)
        declined = self.apply(model, passes)
        after = self.run(model, feeds)
        assert before.keys() == after.keys()
        for name, array in before.items():
            np.testing.assert_allclose(after[name], array, rtol=tolerance, atol=tolerance)
        return declined


@pytest.fixture(scope="session")
def lab() -> Lab:
    """The laboratory."""
    return Lab()


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers, the same in every run."""
    return np.random.default_rng(7)


@pytest.fixture
def floats(rng: np.random.Generator) -> Callable[..., np.ndarray]:
    """Makes a normal float32 array of the shape given."""

    def make(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return make
