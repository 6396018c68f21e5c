"""Adapters beside and inside fixed linears equal ONNX Runtime on a file with merged weights."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper
from safetensors.numpy import save_file

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

_path = Path(__file__).resolve().parents[2] / "benchmarks" / "synthetic.py"
_spec = importlib.util.spec_from_file_location("pfmc_tests_synthetic", _path)
assert _spec is not None
assert _spec.loader is not None
synthetic = importlib.util.module_from_spec(_spec)
import sys  # noqa: E402

sys.modules[_spec.name] = synthetic
_spec.loader.exec_module(synthetic)

SHAPE = synthetic.Shape(layers=2, hidden=32, heads=4, ffn=48, vocabulary=50)
RANK, ALPHA = 3, 6.0
ADAPTED = {
    "model.layers.0.self_attn.q_proj": (32, 32), "model.layers.0.self_attn.v_proj": (32, 32),
    "model.layers.1.mlp.down_proj": (48, 32), "lm_head": (32, 50),
}  # fmt: skip
IDS = np.random.default_rng(5).integers(0, 50, (2, 7))


def single(path: Path) -> Path:
    """The fp16 model at `path` as a float32 file of one piece."""
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            array = numpy_helper.to_array(tensor).astype(np.float32)
            array = np.maximum(array, np.float32(-1e30))
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
    proto.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    made = path.parent / "single.onnx"
    onnx.save(proto, made)
    return made


def write_adapter(folder: Path, sizes: dict[str, tuple[int, int]], rank: int = RANK) -> Path:
    """A random adapter as PEFT saves it."""
    rng, held = np.random.default_rng(1), {}
    for module, (inputs, outputs) in sizes.items():
        for half, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            name = f"base_model.model.{module}.lora_{half}.weight"
            held[name] = rng.normal(0, 0.3, shape).astype(np.float32)
    folder.mkdir()
    save_file(held, folder / "adapter_model.safetensors")
    body = {"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA, "base_model_name_or_path": "b"}
    (folder / "adapter_config.json").write_text(json.dumps(body))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float32 Llama in one file."""
    return single(synthetic.generate(tmp_path_factory.mktemp("llama"), SHAPE))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on four of its layers, the head among them."""
    return write_adapter(tmp_path_factory.mktemp("lora") / "adapter", ADAPTED)


@pytest.fixture(scope="module")
def truth(base: Path, adapter: Path) -> np.ndarray:
    """What ONNX Runtime says of the file with ``scale * B @ A`` added to its weights."""
    from safetensors.numpy import load_file

    held = load_file(adapter / "adapter_model.safetensors")
    proto = onnx.load(base)
    for tensor in proto.graph.initializer:
        module = tensor.name.removesuffix(".weight")
        if module in ADAPTED:
            a, b = (held[f"base_model.model.{module}.lora_{half}.weight"] for half in "AB")
            array = numpy_helper.to_array(tensor) + np.float32(ALPHA / RANK) * (b @ a).T
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))
    merged = base.parent / "merged.onnx"
    onnx.save(proto, merged)
    with Oracle(merged) as oracle:
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
    assert [n.metadata_props[vocabulary.KEY_SCOPE] for n in paths] == list(ADAPTED)
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
    folder = write_adapter(tmp_path / "adapter", sizes)
    with pytest.raises(InputError, match=words):
        canonical(base, KeepBeside(str(folder)))


def test_factors_that_do_not_fit_each_other_are_illegal(base: Path, adapter: Path) -> None:
    model = canonical(base, KeepBeside(str(adapter)))
    node = next(n for n in model.graph if n.op_type == vocabulary.SIDE_PATH)
    node.replace_input_with(3, node.inputs[2])
    assert any("[in, rank]" in v.what for v in check.illegal(model, Stage.CANONICAL))
