"""Generates a Llama-shaped fp16 model of any size with external data, streaming, seeded."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from benchmarks.figure import Figure, table


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes; the defaults give 1.16e9 parameters, 2.3 GB in fp16."""

    layers: int = 20
    hidden: int = 2048
    heads: int = 32
    ffn: int = 5632
    vocabulary: int = 32000

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def weights(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every weight in file order; matrices are ``[in, out]``."""
        h, f = self.hidden, self.ffn
        yield "model.embed_tokens.weight", (self.vocabulary, h)
        for i in range(self.layers):
            scope = f"model.layers.{i}"
            yield f"{scope}.input_layernorm.weight", (h,)
            for name in "qkvo":
                yield f"{scope}.self_attn.{name}_proj.weight", (h, h)
            yield f"{scope}.post_attention_layernorm.weight", (h,)
            yield f"{scope}.mlp.gate_proj.weight", (h, f)
            yield f"{scope}.mlp.up_proj.weight", (h, f)
            yield f"{scope}.mlp.down_proj.weight", (f, h)
        yield "model.norm.weight", (h,)
        yield "lm_head.weight", (h, self.vocabulary)

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(s)) for _, s in self.weights())


def generate(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """Writes ``model.onnx`` and ``model.data`` into `folder`; returns the former.

    Weights are Gaussian with the standard deviation 1/sqrt(in), drawn from a block of 16 Mi
    samples at offsets that differ from weight to weight.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _write_data(folder / "model.data", shape, seed)
    graph = helper.make_graph(
        _nodes(shape), "llama",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"])],
        [helper.make_tensor_value_info(
            "logits", TensorProto.FLOAT16, ["batch", "seq", shape.vocabulary])],
        tensors + _constants(shape),
    )  # fmt: skip
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10,
        producer_name="pfmc benchmarks",
    )  # fmt: skip
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def _write_data(path: Path, shape: Shape, seed: int) -> list[onnx.TensorProto]:
    block = np.random.default_rng(seed).standard_normal(1 << 24, dtype=np.float32)
    offset, tensors = 0, []
    with path.open("wb") as f:
        for index, (name, dims) in enumerate(shape.weights()):
            data = _weight(block, dims, index)
            tensors.append(_external(name, dims, offset, data.nbytes, path.name))
            f.write(data.data)
            offset += data.nbytes
    return tensors


def _weight(block: np.ndarray, dims: tuple[int, ...], index: int) -> np.ndarray:
    if len(dims) == 1:
        return np.ones(dims, np.float16)
    size, start = int(np.prod(dims)), index * 7919 % 65536
    fits = start + size <= block.size
    samples = block[start : start + size] if fits else np.resize(block[start:], size)
    return (samples * np.float32(dims[0] ** -0.5)).astype(np.float16).reshape(dims)


def _external(
    name: str, dims: tuple[int, ...], offset: int, length: int, location: str
) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, data_type=TensorProto.FLOAT16, dims=dims)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _constants(shape: Shape) -> list[onnx.TensorProto]:
    d = shape.head_dim
    frequencies = (10000.0 ** (-np.arange(0, d, 2) / d)).astype(np.float32)[None, :, None]
    arrays = {
        "two": np.array(2.0, np.float16), "epsilon": np.array(1e-5, np.float16),
        "minus_one": np.array([-1], np.int64), "zero": np.array(0, np.int64),
        "one": np.array(1, np.int64), "axis0": np.array([0], np.int64),
        "axis1": np.array([1], np.int64), "axis01": np.array([0, 1], np.int64),
        "split": np.array([0, 0, shape.heads, d], np.int64),
        "merge": np.array([0, 0, shape.hidden], np.int64),
        "half": np.array([d // 2], np.int64), "end": np.array([2**62], np.int64),
        "start": np.array([0], np.int64), "last": np.array([3], np.int64),
        "scale": np.array(d**-0.5, np.float16), "frequencies": frequencies,
        "lowest": np.array(-65504.0, np.float16), "nothing": np.array(0.0, np.float16),
    }  # fmt: skip
    return [onnx.numpy_helper.from_array(v, k) for k, v in arrays.items()]


def _nodes(shape: Shape) -> list[onnx.NodeProto]:
    nodes: list[onnx.NodeProto] = []

    def add(op: str, inputs: str, output: str, scope: str = "model", **attributes: object) -> str:
        name = f"/{scope.replace('.', '/')}/{op}_{len(nodes)}"
        node = helper.make_node(op, inputs.split(), [output], name=name, **attributes)
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=repr(["", scope]))
        nodes.append(node)
        return output

    def norm(x: str, scope: str) -> str:
        add("Pow", f"{x} two", f"{scope}.square", scope)
        add("ReduceMean", f"{scope}.square minus_one", f"{scope}.mean", scope, keepdims=1)
        add("Add", f"{scope}.mean epsilon", f"{scope}.shifted", scope)
        add("Sqrt", f"{scope}.shifted", f"{scope}.root", scope)
        add("Div", f"{x} {scope}.root", f"{scope}.unit", scope)
        return add("Mul", f"{scope}.unit {scope}.weight", f"{scope}.out", scope)

    def linear(x: str, scope: str) -> str:
        return add("MatMul", f"{x} {scope}.weight", f"{scope}.out", scope)

    def heads(x: str, scope: str) -> str:
        add("Reshape", f"{x} split", f"{x}.split", scope)
        return add("Transpose", f"{x}.split", f"{x}.heads", scope, perm=[0, 2, 1, 3])

    def rotate(x: str, scope: str) -> str:
        add("Slice", f"{x} start half last", f"{x}.left", scope)
        add("Slice", f"{x} half end last", f"{x}.right", scope)
        add("Neg", f"{x}.right", f"{x}.negative", scope)
        add("Concat", f"{x}.negative {x}.left", f"{x}.turned", scope, axis=-1)
        add("Mul", f"{x} cos", f"{x}.even", scope)
        add("Mul", f"{x}.turned sin", f"{x}.odd", scope)
        return add("Add", f"{x}.even {x}.odd", f"{x}.rotated", scope)

    def attention(x: str, scope: str) -> str:
        q, k, v = (heads(linear(x, f"{scope}.{n}_proj"), scope) for n in "qkv")
        q, k = rotate(q, scope), rotate(k, scope)
        add("Transpose", k, f"{scope}.kt", scope, perm=[0, 1, 3, 2])
        add("MatMul", f"{q} {scope}.kt", f"{scope}.raw", scope)
        add("Mul", f"{scope}.raw scale", f"{scope}.scaled", scope)
        add("Add", f"{scope}.scaled mask", f"{scope}.masked", scope)
        add("Softmax", f"{scope}.masked", f"{scope}.weights", scope, axis=-1)
        add("MatMul", f"{scope}.weights {v}", f"{scope}.mixed", scope)
        add("Transpose", f"{scope}.mixed", f"{scope}.back", scope, perm=[0, 2, 1, 3])
        add("Reshape", f"{scope}.back merge", f"{scope}.joined", scope)
        return linear(f"{scope}.joined", f"{scope}.o_proj")

    def mlp(x: str, scope: str) -> str:
        gate, up = linear(x, f"{scope}.gate_proj"), linear(x, f"{scope}.up_proj")
        add("Sigmoid", gate, f"{scope}.squashed", scope)
        add("Mul", f"{gate} {scope}.squashed", f"{scope}.active", scope)
        add("Mul", f"{scope}.active {up}", f"{scope}.gated", scope)
        return linear(f"{scope}.gated", f"{scope}.down_proj")

    _prologue(add)
    x = "embedded"
    for i in range(shape.layers):
        scope = f"model.layers.{i}"
        mixed = attention(norm(x, f"{scope}.input_layernorm"), f"{scope}.self_attn")
        x = add("Add", f"{x} {mixed}", f"{scope}.middle", scope)
        fed = mlp(norm(x, f"{scope}.post_attention_layernorm"), f"{scope}.mlp")
        x = add("Add", f"{x} {fed}", f"{scope}.out", scope)
    add("MatMul", f"{norm(x, 'model.norm')} lm_head.weight", "logits", "lm_head")
    return nodes


def _prologue(add) -> None:  # type: ignore[no-untyped-def]
    """Embedding, rotary tables and the causal mask, as exporters write them."""
    rotary = "model.rotary_emb"
    add("Gather", "model.embed_tokens.weight input_ids", "embedded", "model.embed_tokens")
    add("Shape", "input_ids", "shape")
    add("Gather", "shape one", "length", axis=0)
    add("Range", "zero length one", "positions")
    add("Cast", "positions", "positions.float", rotary, to=TensorProto.FLOAT)
    add("Unsqueeze", "positions.float axis01", "positions.row", rotary)
    add("MatMul", "frequencies positions.row", "angles", rotary)
    add("Transpose", "angles", "angles.t", rotary, perm=[0, 2, 1])
    add("Concat", "angles.t angles.t", "angles.both", rotary, axis=-1)
    for name in ("Cos", "Sin"):
        add(name, "angles.both", f"{name}.wide", rotary)
        add("Cast", f"{name}.wide", f"{name}.half", rotary, to=TensorProto.FLOAT16)
        add("Unsqueeze", f"{name}.half axis1", name.lower(), rotary)
    add("Unsqueeze", "positions axis0", "columns")
    add("Unsqueeze", "positions axis1", "rows")
    add("LessOrEqual", "columns rows", "visible")
    add("Where", "visible nothing lowest", "mask")


@contextmanager
def placed(
    folder: Path | None, file: str, make: Callable[[Path, Shape], object], shape: Shape
) -> Iterator[Path]:
    """The folder of a synthetic model, made there unless its `file` is; a temporary one if None."""
    with tempfile.TemporaryDirectory(prefix="pfmc-bench-") as temporary:
        place = folder or Path(temporary)
        if not (place / file).is_file():
            make(place, shape)
        yield place


def main(figures: Callable[[Path | None, int], Iterable[Figure]]) -> None:
    """Parses ``--folder`` and ``--layers``, measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", type=int, default=Shape.layers)
    chosen = parser.parse_args()
    print(table(figures(chosen.folder, chosen.layers)))
