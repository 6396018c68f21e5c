"""GroupQueryAttention on padded batches and preallocated memories, against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pfmc.errors import InputError
from pfmc.ingest import load
from pfmc.passes import pipeline, recipe
from pfmc.passes.full_memory import NOTE

from .conftest import make_session, run_model
from .onenode import Weights, compare, make, normal, onnx, proto, rotary_tables

HEADS, GROUPS, HEAD = 4, 2, 16
NAMES = ["q", "k", "v", "pk", "pv", "n", "t", "cos", "sin", "p", "a", "sink"]
SYMBOLS = {
    "q": ["B", "S", HEADS * HEAD], "k": ["B", "S", GROUPS * HEAD], "v": ["B", "S", GROUPS * HEAD],
    "pk": ["B", GROUPS, "P", HEAD], "pv": ["B", GROUPS, "P", HEAD], "n": ["B"],
}  # fmt: skip


def feeds_of(steps: int, past: int, lengths: list[int], total: int) -> Weights:
    """The seven inputs that are always there, the lengths among them."""
    batch = len(lengths)
    return {
        "q": normal(batch, steps, HEADS * HEAD),
        "k": normal(batch, steps, GROUPS * HEAD),
        "v": normal(batch, steps, GROUPS * HEAD),
        "pk": normal(batch, GROUPS, past, HEAD),
        "pv": normal(batch, GROUPS, past, HEAD),
        "n": np.array(lengths, np.int32) - 1,
        "t": np.array(total, np.int32),
    }


def hold(folder: Path, feeds: Weights, more: dict[str, Any], dynamic: bool = True) -> None:
    weights = rotary_tables(24, HEAD) if more.get("do_rotary") else {}
    given_names = [n if n in feeds or n in weights else "" for n in NAMES]
    while not given_names[-1]:
        given_names.pop()
    compare(
        folder, "GroupQueryAttention", given_names, feeds, weights, ["y", "k_out", "v_out"],
        symbols=SYMBOLS if dynamic else None, num_heads=HEADS, kv_num_heads=GROUPS, **more,
    )  # fmt: skip


# A padded query whose window shows nothing real has no defined output, hence rows of 4 and 3.
CASES = {
    "full step": (1, 5, [6, 6], 6),
    "ragged step": (1, 5, [6, 3], 6),
    "ragged prompt": (4, 0, [4, 3], 4),
    "buffer": (1, 8, [5, 5], 5),
    "ragged buffer": (1, 8, [5, 3], 5),
    "ragged prompt in a buffer": (4, 8, [4, 3], 4),
    "chunk in a buffer": (3, 8, [7], 7),
}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotary": {"do_rotary": 1},
    "interleaved": {"do_rotary": 1, "rotary_interleaved": 1},
    "window": {"local_window_size": 2, "do_rotary": 1},
    "softcap": {"softcap": 1.5, "scale": 0.4},
    "smooth": {"smooth_softmax": 1},
    "bidirectional": {"causal": 0},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_rows_of_different_lengths(case: str, form: str, tmp_path: Path) -> None:
    """Outputs of all rows and every row of the present, zeros behind its end included."""
    steps, past, lengths, total = CASES[case]
    if form == "bidirectional" and past:
        pytest.skip("ONNX Runtime takes no memory in bidirectional attention")
    hold(tmp_path, feeds_of(steps, past, lengths, total), FORMS[form])


@pytest.mark.parametrize("case", CASES)
def test_positions_bias_and_sinks_of_ragged_rows(case: str, tmp_path: Path) -> None:
    """In a prompt ONNX Runtime reads one position and counts on, whatever the rest says.

    What a sink does to the outputs of padded queries, which nobody reads, is not defined.
    """
    steps, past, lengths, total = CASES[case]
    lengths = [total for _ in lengths] if steps == total else lengths
    feeds = feeds_of(steps, past, lengths, total)
    batch = len(lengths)
    feeds["p"] = np.arange(batch * steps).reshape(batch, steps)[:, ::-1].astype(np.int64).copy()
    feeds["a"] = normal(1, HEADS, steps, total)
    feeds["sink"] = normal(HEADS)
    more = {"do_rotary": 1, "softcap": 2.0}
    hold(tmp_path, feeds, more)
    hold(tmp_path, feeds | {"a": normal(batch, 1, steps, total)}, more | {"local_window_size": 3})


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_lengths(data: st.DataObject, tmp_path: Path) -> None:
    """Steps of one token on memories filled to any height, in buffers of any size."""
    past = data.draw(st.integers(1, 9))
    lengths = data.draw(st.lists(st.integers(1, past + 1), min_size=1, max_size=3))
    more = data.draw(st.sampled_from(list(FORMS.values())[:5]))
    total = max(2, *lengths, 2)
    hold(tmp_path, feeds_of(1, past, lengths, total), more)


def test_a_chain_of_padded_steps(tmp_path: Path) -> None:
    """The present of one call is the past of the next: prompts of 4 and 2 tokens, then steps."""
    more = {"num_heads": HEADS, "kv_num_heads": GROUPS, "do_rotary": 1}
    names, outputs = NAMES[:9], ["y", "present_k", "present_v"]
    feeds = feeds_of(4, 0, [4, 2], 4)
    model = proto("GroupQueryAttention", names, feeds, rotary_tables(24, HEAD), outputs, more,
                  symbols=SYMBOLS)  # fmt: skip
    for value in model.graph.output:
        value.type.tensor_type.elem_type = 1
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    session, loaded = make_session(path), load(path).model
    past = [feeds[n] for n in ("pk", "pv")] * 2
    for i in range(4):
        if i:
            feeds = feeds_of(1, 0, [4 + i, 2 + i], 4 + i)
        want = session.run(None, feeds | {"pk": past[0], "pv": past[1]})
        got = run_model(loaded, feeds | {"pk": past[2], "pv": past[3]})
        for a, b in zip(want, got, strict=True):
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-5)
        past = [*want[1:], *got[1:]]


@pytest.mark.parametrize("name", ["llama_fp32", "llama_int4"])
def test_a_machine_takes_full_sequences(name: str, zoo: Path) -> None:
    """The canonical decoder is plain, and says so; it has no mask to be fed with padding."""
    loaded = load(zoo / name / "model.onnx")
    done = pipeline.canonicalise(loaded.model, recipe.load("stream", ()).passes)
    graph = done.model.graph
    assert [v.name for v in graph.inputs if "mask" in str(v.name)] == []
    assert not {"GatherElements", "Where", "Less"} & {n.op_type for n in graph}
    attentions = [n for n in graph if n.op_type == "Attention"]
    assert all(len(n.inputs) == 6 and n.inputs[3] is None for n in attentions)
    assert NOTE in done.reasons().values()


def _decoder(folder: Path) -> Path:
    """One layer as onnxruntime-genai writes gpt-oss: a window, a sink, a memory."""
    rng = np.random.default_rng(0)
    shapes = {"table": (40, 32), "qkv": (32, 8 * HEAD), "o": (64, 32), "head": (32, 40)}
    arrays = {n: rng.normal(0, 0.3, s).astype(np.float32) for n, s in shapes.items()}
    arrays |= {
        "sink": rng.normal(0, 1, 4).astype(np.float32),
        "one": np.array([1]),
        "1": np.array(1),
    }
    arrays |= rotary_tables(24, HEAD)
    memory = ["past_key_values.0.key", "past_key_values.0.value"]
    presents = ["present.0.key", "present.0.value"]
    names = ["qkvs", "", "", *memory, "n", "t", "cos", "sin", "", "", "sink"]
    node = make.make_node
    nodes = [
        node("ReduceSum", ["attention_mask", "one"], ["sum"], keepdims=0),
        node("Sub", ["sum", "one"], ["less"]),
        node("Cast", ["less"], ["n"], to=6),
        node("Shape", ["attention_mask"], ["shape"]),
        node("Gather", ["shape", "1"], ["length"]),
        node("Cast", ["length"], ["t"], to=6),
        node("Gather", ["table", "input_ids"], ["x"]),
        node("MatMul", ["x", "qkv"], ["qkvs"], name="/model/layers.0/attn/qkv_proj/MatMul"),
        node("GroupQueryAttention", names, ["a", *presents], domain="com.microsoft", num_heads=4,
             kv_num_heads=2, do_rotary=1, local_window_size=4),
        node("MatMul", ["a", "o"], ["y"]),
        node("MatMul", ["y", "head"], ["logits"]),
    ]  # fmt: skip
    value = make.make_tensor_value_info
    inputs = [value("input_ids", 7, ["B", "S"]), value("attention_mask", 7, ["B", "T"])]
    inputs += [value(n, 1, ["B", GROUPS, "P", HEAD]) for n in memory]
    outputs = [value("logits", 1, ["B", "S", 40])]
    outputs += [value(n, 1, ["B", GROUPS, "T", HEAD]) for n in presents]
    kept = [onnx.numpy_helper.from_array(a, n) for n, a in arrays.items()]
    imports = [make.make_opsetid("", 21), make.make_opsetid("com.microsoft", 1)]
    graph = make.make_graph(nodes, "g", inputs, outputs, kept)
    path = folder / "decoder.onnx"
    path.write_bytes(
        make.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()
    )
    return path


def test_a_decoder_with_sink_and_window_keeps_its_memory(tmp_path: Path) -> None:
    path = _decoder(tmp_path)
    done = pipeline.canonicalise(load(path).model, recipe.load("stream", ()).passes)
    assert NOTE in done.reasons().values()
    names = [v.name for v in done.model.graph.inputs]
    assert names == ["input_ids", "past_key_values.0.key", "past_key_values.0.value"]
    feeds: Weights = {
        "input_ids": np.array([[3], [9]]), "attention_mask": np.ones((2, 7), np.int64),
        **{n: normal(2, GROUPS, 6, HEAD) for n in names[1:]},
    }  # fmt: skip
    want = make_session(path).run(None, feeds)
    for a, b in zip(want, run_model(done.model, feeds), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "extra", "message"),
    [
        ({"do_rotary": 1}, {}, "cos_cache"),
        ({"sliding_window_cache": 1}, {}, "sliding_window_cache"),
        ({"k_quant_type": "PER_TENSOR"}, {}, "quantised memory"),
        ({"qk_output": 1}, {}, "qk_output"),
        ({}, {"qn": normal(HEAD), "kn": normal(HEAD)}, "q_norm_weight"),
    ],
)
def test_what_is_refused(
    more: dict[str, Any], extra: Weights, message: str, tmp_path: Path
) -> None:
    feeds = feeds_of(1, 2, [3], 3)
    names = [*NAMES[:7], *([""] * 7 if extra else []), *extra]
    attributes = {"num_heads": HEADS, "kv_num_heads": GROUPS, **more}
    model = proto("GroupQueryAttention", names, feeds, extra, ["y"], attributes)
    model.graph.output[0].type.tensor_type.elem_type = 1
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=message) as caught:
        load(path)
    assert "node '/l/op'" in caught.value.where


def test_rows_of_unknown_lengths_are_not_taken_for_equal(tmp_path: Path) -> None:
    """Two attentions of one batch: the queries of each may be of another length."""
    values = [make.make_tensor_value_info(n, 1, ["B", None, 64]) for n in ("q", "u")]
    values += [make.make_tensor_value_info(n, 1, ["B", None, 32]) for n in ("k", "l")]
    values += [make.make_tensor_value_info("n", 6, ["B"]), make.make_tensor_value_info("t", 6, [])]
    nodes = [
        make.make_node(
            "GroupQueryAttention", [q, k, k, "", "", "n", "t"], [y], domain="com.microsoft",
            num_heads=HEADS, kv_num_heads=GROUPS,
        )
        for q, k, y in (("q", "k", "y"), ("u", "l", "z"))
    ]  # fmt: skip
    outputs = [make.make_tensor_value_info(n, 1, None) for n in "yz"]
    graph = make.make_graph(nodes, "g", values, outputs)
    imports = [make.make_opsetid("", 21), make.make_opsetid("com.microsoft", 1)]
    path = tmp_path / "m.onnx"
    onnx.save(make.make_model(graph, opset_imports=imports, ir_version=10), path)
    read = {
        str(n.inputs[0].name)
        for n in load(path).model.graph
        if n.op_type == "Shape" and n.inputs[0] is not None
    }
    assert {"q", "u"} <= read
