"""Adapters beside and inside fixed linears equal ONNX Runtime on a file with merged weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from pfmc import ingest
from pfmc.distill.student import Student
from pfmc.errors import InputError
from pfmc.ir import check, vocabulary
from pfmc.ir.vocabulary import Stage
from pfmc.oracle import Oracle
from pfmc.passes import pipeline
from pfmc.passes import recipe as recipes
from pfmc.passes.adapters import KeepBeside, MergeAdapter
from pfmc.passes.base import Pass

_spec = importlib.util.spec_from_file_location(
    "pfmc_tests_lora", Path(__file__).with_name("lora.py")
)
assert _spec is not None
assert _spec.loader is not None
L = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(L)

IDS = np.random.default_rng(5).integers(0, 50, (2, 7))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float32 Llama in one file."""
    return L.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on four of its layers, the head among them."""
    return L.write_adapter(tmp_path_factory.mktemp("lora") / "adapter", L.ADAPTED)


@pytest.fixture(scope="module")
def truth(base: Path, adapter: Path) -> np.ndarray:
    """What ONNX Runtime says of the file with ``scale * B @ A`` added to its weights."""
    with Oracle(L.merged(base, adapter)) as oracle:
        return oracle.run({"input_ids": IDS})["logits"]


def canonical(base: Path, made: Pass | None) -> ir.Model:
    """The canonical model with the adapter's pass after ``linears``."""
    steps: list[Pass] = []
    for step in recipes.load("stream").passes:
        steps += [step, *([made] if made is not None and step.name == "linears" else [])]
    return pipeline.canonicalise(ingest.load(base).model, steps).model


def logits(model: ir.Model) -> np.ndarray:
    student = Student(model).eval()
    feeds: dict[str, Any] = {"input_ids": IDS}
    for value in model.graph.inputs[1:]:
        dims = [d if isinstance(d, int) else 2 * (not i) for i, d in enumerate(value.shape)]  # type: ignore[arg-type]
        feeds[str(value.name)] = np.zeros(dims, np.float32)
    return np.asarray(student(**feeds)["logits"].detach().numpy())


@pytest.mark.parametrize("kind", [KeepBeside, MergeAdapter])
def test_equals_onnx_runtime_on_merged_weights(
    kind: Any, base: Path, adapter: Path, truth: np.ndarray
) -> None:
    before = ingest.load(base).model.graph.initializers["lm_head.weight"].const_value.numpy()
    model = canonical(base, kind(str(adapter)))
    check.require_stage(model, Stage.CANONICAL)
    np.testing.assert_allclose(logits(model), truth, atol=2e-5, rtol=0)
    assert np.abs(logits(canonical(base, None)) - truth).max() > 0.1, "the adapter matters"
    after = ingest.load(base).model.graph.initializers["lm_head.weight"].const_value.numpy()
    np.testing.assert_array_equal(before, after)


def test_beside_equals_merged(base: Path, adapter: Path) -> None:
    beside, merged = (canonical(base, k(str(adapter))) for k in (KeepBeside, MergeAdapter))
    np.testing.assert_allclose(logits(beside), logits(merged), atol=1e-5, rtol=0)
    assert len(vocabulary.fixed_linears(beside)) == len(vocabulary.fixed_linears(merged)) == 15
    paths = [n for n in beside.graph if n.op_type == vocabulary.SIDE_PATH]
    assert [n.metadata_props[vocabulary.KEY_SCOPE] for n in paths] == list(L.ADAPTED)
    assert str(beside.graph.outputs[0].name) == "logits"
    assert beside.graph.outputs[0].producer() is paths[-1]


def test_the_canonical_graph_runs_in_onnx_runtime(
    base: Path, adapter: Path, truth: np.ndarray, tmp_path: Path
) -> None:
    model = canonical(base, KeepBeside(str(adapter)))
    ir.save(model, tmp_path / "model.onnx")
    feeds: dict[str, Any] = {"input_ids": IDS}
    for value in model.graph.inputs[1:]:
        dims = [d if isinstance(d, int) else 2 * (not i) for i, d in enumerate(value.shape)]  # type: ignore[arg-type]
        feeds[str(value.name)] = np.zeros(dims, np.float32)
    with Oracle(tmp_path / "model.onnx") as oracle:
        np.testing.assert_allclose(oracle.run(feeds)["logits"], truth, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("sizes", "words"), [
    ({"model.layers.7.mlp.up_proj": (32, 48)}, "layers.7.mlp.up_proj is no layer"),
    ({"lm_head": (16, 50)}, "16 to 3 and 3 to 50"),
])  # fmt: skip
def test_what_does_not_fit_is_named(
    sizes: dict[str, tuple[int, int]], words: str, base: Path, tmp_path: Path
) -> None:
    folder = L.write_adapter(tmp_path / "adapter", sizes)
    with pytest.raises(InputError, match=words):
        canonical(base, KeepBeside(str(folder)))


def test_factors_that_do_not_fit_each_other_are_illegal(base: Path, adapter: Path) -> None:
    model = canonical(base, KeepBeside(str(adapter)))
    node = next(n for n in model.graph if n.op_type == vocabulary.SIDE_PATH)
    node.replace_input_with(3, node.inputs[2])
    assert any("[in, rank]" in v.what for v in check.illegal(model, Stage.CANONICAL))
