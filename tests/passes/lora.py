"""A tiny float32 Llama in one ONNX file, and random LoRA adapters as PEFT saves them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from safetensors.numpy import load_file, save_file

_path = Path(__file__).resolve().parents[2] / "benchmarks" / "synthetic.py"
_spec = importlib.util.spec_from_file_location("pfmc_tests_synthetic", _path)
assert _spec is not None
assert _spec.loader is not None
synthetic = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = synthetic
_spec.loader.exec_module(synthetic)

SHAPE = synthetic.Shape(layers=2, hidden=32, heads=4, ffn=48, vocabulary=50)
RANK, ALPHA = 3, 6.0
ADAPTED = {
    "model.layers.0.self_attn.q_proj": (32, 32), "model.layers.0.self_attn.v_proj": (32, 32),
    "model.layers.1.mlp.down_proj": (48, 32), "lm_head": (32, 50),
}  # fmt: skip


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


def llama(folder: Path) -> Path:
    """Writes the tiny Llama into `folder`."""
    return single(synthetic.generate(folder, SHAPE))


def merged(base: Path, adapter: Path) -> Path:
    """The file `base` with ``alpha / rank * (B @ A)`` added to its weights."""
    held = load_file(adapter / "adapter_model.safetensors")
    proto = onnx.load(base)
    for tensor in proto.graph.initializer:
        name = f"base_model.model.{tensor.name.removesuffix('.weight')}.lora"
        if f"{name}_A.weight" in held:
            a, b = (held[f"{name}_{half}.weight"] for half in "AB")
            array = numpy_helper.to_array(tensor) + np.float32(ALPHA / len(a)) * (b @ a).T
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))
    made = adapter.parent / "by_hand.onnx"
    onnx.save(proto, made)
    return made
