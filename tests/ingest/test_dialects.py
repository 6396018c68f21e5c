"""Each com.microsoft operator against ONNX Runtime running the original."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pfmc.errors import InputError
from pfmc.ingest import load
from pfmc.ingest.dialects import unpack
from pfmc.ir import provenance

onnx = pytest.importorskip("onnx")
make = onnx.helper
F32, I64, I32 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.INT32

Compare = Callable[..., ir.Model]
Weights = dict[str, np.ndarray]
RNG = np.random.default_rng(7)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(0, 1, shape).astype(np.float32)


@pytest.fixture
def compare(
    save: Callable[[Any], Path],
    session_of: Callable[[Any], Any],
    run_loaded: Callable[..., list[np.ndarray]],
) -> Compare:
    """Builds a one-node model, runs it in ONNX Runtime before and after loading, compares."""

    def check(
        op: str,
        inputs: list[str],
        feeds: Weights,
        weights: Weights,
        outputs: list[str],
        domain: str = "com.microsoft",
        atol: float = 1e-5,
        **attributes: Any,
    ) -> ir.Model:
        model = _model(op, inputs, feeds, weights, outputs, domain, attributes)
        path = save(model)
        expected = session_of(path).run(None, feeds)
        loaded = load(path).model
        assert not [n for n in loaded.graph if n.domain == "com.microsoft"]
        for want, got in zip(expected, run_loaded(loaded, feeds), strict=True):
            assert want.shape == got.shape
            np.testing.assert_allclose(got, want, rtol=0, atol=atol)
        return loaded

    return check


def _model(
    op: str,
    inputs: list[str],
    feeds: Weights,
    weights: Weights,
    outputs: list[str],
    domain: str,
    attributes: dict[str, Any],
) -> Any:
    kinds = {np.dtype(np.float32): F32, np.dtype(np.int64): I64, np.dtype(np.int32): I32}
    node = make.make_node(op, inputs, outputs, name="/l/op", domain=domain, **attributes)
    graph = make.make_graph(
        [node],
        "g",
        [make.make_tensor_value_info(k, kinds[v.dtype], v.shape) for k, v in feeds.items()],
        [make.make_tensor_value_info(o, F32, None) for o in outputs if o],
        [onnx.numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    imports = [make.make_opsetid("", 21), make.make_opsetid("com.microsoft", 1)]
    return make.make_model(graph, opset_imports=imports, ir_version=10)


def test_simplified_layer_norm(compare: Compare) -> None:
    compare(
        "SimplifiedLayerNormalization",
        ["x", "g"],
        {"x": normal(2, 3, 8)},
        {"g": normal(8)},
        ["y"],
        domain="",
        axis=-1,
        epsilon=1e-3,
        stash_type=1,
    )


@pytest.mark.parametrize("inputs", [["x", "s", "g"], ["x", "s", "g", "b"]])
def test_skip_simplified_layer_norm(inputs: list[str], compare: Compare) -> None:
    weights = {"g": normal(8), "b": normal(8)}
    compare(
        "SkipSimplifiedLayerNormalization",
        inputs,
        {"x": normal(2, 3, 8), "s": normal(2, 3, 8)},
        {k: weights[k] for k in inputs if k in weights},
        ["y", "", "", "sum"],
        epsilon=1e-3,
    )


@pytest.mark.parametrize(
    "inputs", [["x", "s", "g"], ["x", "s", "g", "beta"], ["x", "s", "g", "beta", "b"]]
)
def test_skip_layer_norm(inputs: list[str], compare: Compare) -> None:
    weights = {"g": normal(8), "beta": normal(8), "b": normal(8)}
    compare(
        "SkipLayerNormalization",
        inputs,
        {"x": normal(2, 3, 8), "s": normal(2, 3, 8)},
        {k: weights[k] for k in inputs if k in weights},
        ["y", "", "", "sum"],
        epsilon=1e-5,
    )


def test_embed_layer_norm(compare: Compare) -> None:
    feeds = {
        "ids": RNG.integers(0, 9, (2, 5)).astype(np.int32),
        "kinds": RNG.integers(0, 2, (2, 5)).astype(np.int32),
    }
    weights = {
        "word": normal(9, 8),
        "pos": normal(6, 8),
        "seg": normal(2, 8),
        "g": normal(8),
        "b": normal(8),
    }
    compare(
        "EmbedLayerNormalization",
        ["ids", "kinds", "word", "pos", "seg", "g", "b"],
        feeds,
        weights,
        ["y", "", "sum"],
        epsilon=1e-6,
    )


@pytest.mark.parametrize(
    ("op", "bias", "attributes"),
    [
        ("Gelu", False, {}),
        ("FastGelu", False, {}),
        ("FastGelu", True, {}),
        ("BiasGelu", True, {}),
        ("QuickGelu", False, {}),
        ("QuickGelu", False, {"alpha": 1.3}),
    ],
)
def test_gelu_family(op: str, bias: bool, attributes: dict[str, Any], compare: Compare) -> None:
    compare(
        op,
        ["x", "b"][: 1 + bias],
        {"x": 3 * normal(2, 3, 8)},
        {"b": normal(8)} if bias else {},
        ["y"],
        **attributes,
    )


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
def test_fused_mat_mul(trans_a: int, trans_b: int, compare: Compare) -> None:
    a = normal(2, 4, 3) if trans_a else normal(2, 3, 4)
    b = normal(2, 5, 4) if trans_b else normal(2, 4, 5)
    compare(
        "FusedMatMul",
        ["a", "b"],
        {"a": a, "b": b},
        {},
        ["y"],
        transA=trans_a,
        transB=trans_b,
        alpha=0.25,
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("k", [32, 40, 96])
def test_mat_mul_n_bits(bits: int, zero_points: bool, k: int, compare: Compare) -> None:
    n, block = 6, 32
    blocks = -(-k // block)
    weights = {
        "B": RNG.integers(0, 256, (n, blocks, block * bits // 8)).astype(np.uint8),
        "s": RNG.uniform(0.01, 0.1, (n, blocks)).astype(np.float32),
    }
    if zero_points:
        row = -(-blocks * bits // 8)
        weights["z"] = RNG.integers(0, 256, (n, row)).astype(np.uint8)
    model = compare(
        "MatMulNBits",
        ["x", *weights],
        {"x": normal(2, 3, k)},
        weights,
        ["y"],
        atol=1e-4,
        K=k,
        N=n,
        bits=bits,
        block_size=block,
    )
    weight = model.graph[0].inputs[1]
    assert weight is not None
    assert isinstance(weight.const_value, ir.LazyTensor)
    assert list(weight.const_value.shape) == [k, n]


@given(
    hnp.arrays(np.uint8, st.tuples(st.integers(1, 4), st.integers(1, 6))),
    st.sampled_from([2, 4, 8]),
)
def test_unpack_is_little_end_first(packed: np.ndarray, bits: int) -> None:
    numbers = unpack(packed, bits)
    for row, codes in zip(packed, numbers, strict=True):
        whole = sum(int(c) << (bits * i) for i, c in enumerate(codes))
        assert whole == int.from_bytes(row.tobytes(), "little")


def _tables(rows: int, width: int) -> Weights:
    angles = np.outer(np.arange(rows), 1 / 10 ** np.arange(width // 2)).astype(np.float32)
    return {"cos": np.cos(angles), "sin": np.sin(angles)}


@pytest.mark.parametrize("layout", ["packed", "separate"])
@pytest.mark.parametrize(("batch", "steps", "past"), [(1, 5, 0), (2, 5, 0), (2, 1, 4), (1, 3, 4)])
@pytest.mark.parametrize(
    "more",
    [
        {"do_rotary": 1},
        {"do_rotary": 0},
        {"do_rotary": 1, "rotary_interleaved": 1},
        {"do_rotary": 1, "scale": 0.3},
        {"do_rotary": 1, "local_window_size": 2},
    ],
    ids=["rotary", "plain", "interleaved", "scale", "window"],
)
def test_group_query_attention(
    layout: str, batch: int, steps: int, past: int, more: dict[str, Any], compare: Compare
) -> None:
    heads, groups, head = 4, 2, 16
    total = steps + past
    feeds: Weights = {}
    if layout == "packed":
        feeds["q"] = normal(batch, steps, (heads + 2 * groups) * head)
    else:
        feeds["q"] = normal(batch, steps, heads * head)
        feeds["k"], feeds["v"] = (normal(batch, steps, groups * head) for _ in "kv")
    feeds["pk"], feeds["pv"] = (normal(batch, groups, past, head) for _ in "kv")
    weights = {"n": np.full(batch, total - 1, np.int32), "t": np.array(total, np.int32)}
    weights |= _tables(16, head) if more["do_rotary"] else {}
    names = ["q", "k" * ("k" in feeds), "v" * ("v" in feeds), "pk", "pv", "n", "t"]
    names += ["cos", "sin"] if more["do_rotary"] else []
    compare(
        "GroupQueryAttention",
        names,
        feeds,
        weights,
        ["y", "k_out", "v_out"],
        num_heads=heads,
        kv_num_heads=groups,
        **more,
    )


@pytest.mark.parametrize("width", [16, 32])
def test_group_query_attention_with_positions_and_partial_rotary(
    width: int, compare: Compare
) -> None:
    heads, groups, head, batch, steps = 4, 2, 32, 2, 3
    feeds = {
        "q": normal(batch, steps, (heads + 2 * groups) * head),
        "pk": normal(batch, groups, 0, head),
        "pv": normal(batch, groups, 0, head),
        "p": np.broadcast_to(np.arange(steps), (batch, steps)).astype(np.int64).copy(),
    }
    weights = {
        "n": np.full(batch, steps - 1, np.int32),
        "t": np.array(steps, np.int32),
        **_tables(16, width),
    }
    compare(
        "GroupQueryAttention",
        ["q", "", "", "pk", "pv", "n", "t", "cos", "sin", "p"],
        feeds,
        weights,
        ["y", "k_out", "v_out"],
        num_heads=heads,
        kv_num_heads=groups,
        do_rotary=1,
    )


@pytest.mark.parametrize("extra", ["none", "bias", "padding", "additive", "causal", "both", "past"])
def test_multi_head_attention(extra: str, compare: Compare) -> None:
    heads, head, batch, steps, keys = 4, 8, 2, 3, 5
    if extra in ("causal", "past"):
        keys = steps
    past = 4 if extra == "past" else 0
    width = heads * head
    feeds = {
        "q": normal(batch, steps, width),
        "k": normal(batch, keys, width),
        "v": normal(batch, keys, width),
    }
    weights: Weights = {}
    names = ["q", "k", "v"]
    outputs = ["y"]
    if extra in ("bias", "both"):
        weights["b"] = normal(3 * width)
    if extra in ("padding", "both"):
        feeds["m"] = np.array([[1] * keys, [1] * 3 + [0] * (keys - 3)], np.int32)
    if extra in ("additive", "both"):
        feeds["a"] = normal(batch, heads, steps, keys)
    names += ["b" * ("b" in weights), "m" * ("m" in feeds), "a" * ("a" in feeds)]
    if past:
        feeds["pk"], feeds["pv"] = (normal(batch, heads, past, head) for _ in "kv")
        names += ["pk", "pv"]
        outputs += ["k_out", "v_out"]
    while not names[-1]:
        names.pop()
    attributes = {"unidirectional": 1} if extra == "causal" else {}
    compare("MultiHeadAttention", names, feeds, weights, outputs, num_heads=heads, **attributes)


@pytest.mark.parametrize("extra", ["none", "mask", "causal", "bias", "past", "sizes"])
def test_fused_attention(extra: str, compare: Compare) -> None:
    heads, head, batch, steps = 4, 8, 2, 3
    width = heads * head
    value = 2 * width if extra == "sizes" else width
    past = 4 if extra == "past" else 0
    feeds = {"x": normal(batch, steps, width)}
    weights = {"w": normal(width, 2 * width + value), "b": normal(2 * width + value)}
    more: dict[str, Any] = {"unidirectional": int(extra in ("causal", "past"))}
    names, outputs = ["x", "w", "b", "", "", ""], ["y"]
    if extra == "mask":
        feeds["m"], names[3] = np.array([[1, 1, 1], [1, 1, 0]], np.int32), "m"
    if extra == "bias":
        feeds["a"], names[5] = normal(batch, heads, steps, steps), "a"
    if extra == "past":
        feeds["p"], names[4] = normal(2, batch, heads, past, head), "p"
        outputs.append("present")
    if extra == "sizes":
        more["qkv_hidden_sizes"] = [width, width, value]
    while not names[-1]:
        names.pop()
    compare("Attention", names, feeds, weights, outputs, num_heads=heads, **more)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("form", ["flat", "heads", "offset", "partial"])
def test_rotary_embedding(form: str, interleaved: int, compare: Compare) -> None:
    heads, head, batch, steps = 3, 8, 2, 4
    width = 4 if form == "partial" else head
    shape = (
        (batch, steps, heads * head) if form in ("flat", "offset") else (batch, heads, steps, head)
    )
    positions = np.array([2]) if form == "offset" else RNG.integers(0, 9, (batch, steps))
    more = {"rotary_embedding_dim": width, "num_heads": heads} if form == "partial" else {}
    compare(
        "RotaryEmbedding",
        ["x", "p", "cos", "sin"],
        {"x": normal(*shape), "p": positions.astype(np.int64)},
        _tables(16, width),
        ["y"],
        interleaved=interleaved,
        **more,
    )


@pytest.mark.parametrize(
    ("op", "attributes", "inputs", "message"),
    [
        ("GroupQueryAttention", {"num_heads": 4}, ["q"], "'kv_num_heads' must be positive, not 0"),
        ("GroupQueryAttention", {"num_heads": 3, "kv_num_heads": 2}, ["q"], "width of a head"),
        ("GroupQueryAttention", {"num_heads": 2, "kv_num_heads": 1}, ["q"], "seqlens_k"),
        ("GroupQueryAttention", {"num_heads": 1.5}, ["q"], "'num_heads' is no integer"),
        ("MatMulNBits", {"K": 32, "N": 4, "block_size": 32}, ["q", "q"], "must be constants"),
        ("MatMulNBits", {"K": 32, "N": 4, "block_size": 24}, ["q", "q"], "blocks of 24"),
        ("MultiHeadAttention", {"num_heads": 4}, ["q"], "'key' is missing"),
        ("QuickGelu", {}, [], "'X' is missing"),
    ],
)
def test_what_has_no_equal_is_refused(
    op: str,
    attributes: dict[str, Any],
    inputs: list[str],
    message: str,
    save: Callable[[Any], Path],
) -> None:
    model = _model(op, inputs, {"q": normal(1, 2, 16)}, {}, ["y"], "com.microsoft", attributes)
    with pytest.raises(InputError, match=message) as caught:
        load(save(model))
    assert "node '/l/op'" in caught.value.where


def _genai_feeds(batch: int, steps: int, past: int) -> Weights:
    rng = np.random.default_rng(0)
    feeds: Weights = {
        "input_ids": rng.integers(3, 200, (batch, steps)),
        "attention_mask": np.ones((batch, steps + past), np.int64),
    }
    for name in (f"past_key_values.{i}.{part}" for i in (0, 1) for part in ("key", "value")):
        feeds[name] = rng.normal(0, 1, (batch, 2, past, 16)).astype(np.float32)
    return feeds


@pytest.mark.parametrize("name", ["llama_fp32", "llama_int4"])
@pytest.mark.parametrize(("batch", "steps", "past"), [(1, 5, 0), (2, 5, 0), (2, 1, 4), (1, 3, 4)])
def test_whole_genai_export(
    name: str,
    batch: int,
    steps: int,
    past: int,
    zoo: Path,
    session_of: Callable[[Any], Any],
    run_loaded: Callable[..., list[np.ndarray]],
) -> None:
    """int4 with float activations: accuracy_level 4 would let ONNX Runtime quantise them."""
    path = zoo / name / "model.onnx"
    original = onnx.load(path)
    for node in original.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    feeds = _genai_feeds(batch, steps, past)
    expected = session_of(original.SerializeToString()).run(None, feeds)
    model = load(path).model
    assert {(n.domain, n.op_type) for n in model.graph} & {("pfmc", "Rotary"), ("", "Attention")}
    for want, got in zip(expected, run_loaded(model, feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_genai_weights_and_rotary_tables_are_named_and_shared(zoo: Path) -> None:
    graph = load(zoo / "llama_int4" / "model.onnx").model.graph
    product = next(n for n in graph if n.op_type == "MatMul")
    assert provenance.scope(product) == "model.layers.0.attn.qkv_proj"
    assert product.outputs[0].name == "/model/layers.0/attn/qkv_proj/MatMul/output_0"
    assert product.inputs[1] is not None
    assert provenance.weight(product.inputs[1]) == "model.layers.0.attn.qkv_proj.MatMul.weight"
    turns = [n for n in graph if n.op_type == "Rotary"]
    assert len(turns) == 4
    assert len({n.inputs[1] for n in turns}) == 1
    assert not [v for n in graph for v in n.outputs if v.shape is None]
