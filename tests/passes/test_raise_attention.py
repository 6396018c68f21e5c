"""Softmax attention of every writing becomes Attention; masks are found out by computing them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from pfmc.passes.fold import Fold
from pfmc.passes.raise_attention import RaiseAttention
from pfmc.passes.shape_arithmetic import ShapeArithmetic

Floats = Callable[..., np.ndarray]
LOW = np.float32(np.finfo(np.float32).min)
PASSES = (Fold(), ShapeArithmetic(), RaiseAttention(), Fold())

INTS = {
    "zero": 0,
    "one": 1,
    "two": 2,
    "three": 3,
    "window": -3,
}
CAUSAL = (
    "n0 = Shape<start=2, end=3>(q) n = Squeeze(n0) i = Range(zero, n, one) r = Unsqueeze(i, ax1)"
    " ok = LessOrEqual(i, r)"
)
WINDOW = (
    f"{CAUSAL.replace(' ok', ' past')} e = Add(r, window) near = Greater(i, e) ok = And(past, near)"
)
PADDING = "pb = Cast<to=9>(attention_mask) ok = Unsqueeze(pb, ax12)"
BOTH = (
    f"{CAUSAL.replace(' ok', ' c')} pb = Cast<to=9>(attention_mask) pu = Unsqueeze(pb, ax12)"
    " ok = And(c, pu)"
)
BOTH_WINDOW = (
    f"{WINDOW.replace(' ok', ' c')} pb = Cast<to=9>(attention_mask) pu = Unsqueeze(pb, ax12)"
    " ok = And(c, pu)"
)
KT = "kt = Transpose<perm=[0,1,3,2]>(k)"


def _model(
    lab: Any,
    body: str,
    inputs: str = "float[B,4,S,8] q, float[B,4,S,8] k, float[B,4,S,8] v",
    output: str = "float[B,4,S,8] y",
    **more: np.ndarray,
) -> ir.Model:
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    used = {n: np.array(v, np.int64) for n, v in INTS.items() if n in words}
    extra = {
        "ax1": np.array([1], np.int64),
        "ax2": np.array([2], np.int64),
        "ax12": np.array([1, 2], np.int64),
        "scale": np.array(0.25, np.float32),
        "root": np.array(0.5, np.float32),
        "f0": np.array(0, np.float32),
        "low": np.array(LOW, np.float32),
        "inf": np.array(-np.inf, np.float32),
    }
    used |= {n: a for n, a in extra.items() if n in words} | more
    return lab.make(f"({inputs}) => ({output}) {{ {body} }}", **used)


def _feeds(floats: Floats, groups: int = 4, length: int = 5) -> dict[str, np.ndarray]:
    return {n: floats(2, h, length, 8) for n, h in (("q", 4), ("k", groups), ("v", groups))}


def _attention(model: ir.Model) -> ir.Node:
    (node,) = [n for n in model.graph if n.op_type == "Attention"]
    assert not [n for n in model.graph if n.op_type in ("Softmax", "MatMul")]
    return node


SCALINGS = {
    "none": ("s = MatMul(q, kt)", 1.0),
    "scores": ("p = MatMul(q, kt) s = Mul(p, scale)", 0.25),
    "scores divided": ("p = MatMul(q, kt) s = Div(p, scale)", 4.0),
    "query": ("h = Mul(q, scale) s = MatMul(h, kt)", 0.25),
    "both halves": ("h = Mul(root, q) g = Mul(kt, root) s = MatMul(h, g)", 0.25),
}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_scalings(lab: Any, floats: Floats, scaling: str) -> None:
    text, scale = SCALINGS[scaling]
    model = _model(lab, f"{KT} {text} w = Softmax<axis=-1>(s) y = MatMul(w, v)")
    assert lab.same(model, PASSES, _feeds(floats)) == []
    node = _attention(model)
    assert node.attributes["scale"].value == pytest.approx(scale)
    assert lab.counts(model) == {"Attention": 1}
    assert node.metadata_props["pfmc.mask"] == "none"


@pytest.mark.parametrize(
    "text",
    [
        "p = MatMul(q, kt) s = Div(p, f0)",
        "p = MatMul(q, kt) s = Mul(p, f0)",
    ],
)
def test_scores_scaled_by_nothing_stay_in_pieces(lab: Any, floats: Floats, text: str) -> None:
    model = _model(lab, f"{KT} {text} w = Softmax<axis=-1>(s) y = MatMul(w, v)")
    lab.apply(model, PASSES)
    assert "Attention" not in lab.counts(model)


@pytest.mark.parametrize("product", ["Mul(q, f0)", "Mul(f0, q)"])
def test_a_query_scaled_by_nothing_stays_so(lab: Any, floats: Floats, product: str) -> None:
    body = f"{KT} h = {product} s = MatMul(h, kt) w = Softmax<axis=-1>(s) y = MatMul(w, v)"
    model = _model(lab, body)
    lab.same(model, PASSES, _feeds(floats))
    assert lab.counts(model) == {"Mul": 1, "Attention": 1}


def test_guard_against_nan_goes(lab: Any, floats: Floats) -> None:
    body = (
        f"{KT} s = MatMul(q, kt) w = Softmax<axis=-1>(s) t = IsNaN(w) u = Where(t, f0, w)"
        " y = MatMul(u, v)"
    )
    model = _model(lab, body)
    lab.same(model, PASSES, _feeds(floats))
    assert lab.counts(model) == {"Attention": 1}


def _masked(mask: str, low: str = "low") -> str:
    return (
        f"{mask} m = Where(ok, f0, {low}) {KT} p = MatMul(q, kt) s0 = Mul(p, scale)"
        " s = Add(s0, m) w = Softmax<axis=-1>(s) y = MatMul(w, v)"
    )


@pytest.mark.parametrize("low", ["low", "inf"])
def test_causal_mask_goes(lab: Any, floats: Floats, low: str) -> None:
    model = _model(lab, _masked(CAUSAL, low))
    lab.same(model, PASSES, _feeds(floats))
    node = _attention(model)
    assert (node.metadata_props["pfmc.mask"], node.attributes["is_causal"].value) == ("causal", 1)
    assert lab.counts(model) == {"Attention": 1}


MASKED = "float[B,4,S,8] q, float[B,4,S,8] k, float[B,4,S,8] v, int64[B,S] attention_mask"


@pytest.mark.parametrize(
    ("mask", "kind", "causal", "window"),
    [
        (PADDING, "padding", 0, None),
        (BOTH, "causal+padding", 1, None),
        (BOTH_WINDOW, "explicit", 1, "3"),
    ],
)
def test_padding_becomes_one_plain_mask(
    lab: Any, floats: Floats, mask: str, kind: str, causal: int, window: str | None
) -> None:
    model = _model(lab, _masked(mask), MASKED)
    padding = np.ones((2, 5), np.int64)
    padding[1, 3:] = 0
    lab.same(model, PASSES, _feeds(floats) | {"attention_mask": padding})
    node = _attention(model)
    assert node.metadata_props["pfmc.mask"] == kind
    assert node.metadata_props.get("pfmc.window") == window
    assert node.attributes["is_causal"].value == causal
    assert node.inputs[3].name.startswith("attention_mask:")


def test_a_window_is_not_taken_for_causal(lab: Any, floats: Floats) -> None:
    """Window 300: no probe of a few positions could see it."""
    model = _model(lab, _masked(WINDOW), window=np.array(-300, np.int64))
    lab.same(model, PASSES, _feeds(floats, length=400))
    node = _attention(model)
    assert (node.metadata_props["pfmc.mask"], node.metadata_props["pfmc.window"]) == (
        "explicit",
        "300",
    )
    assert node.inputs[3] is not None


def test_a_constant_too_large_to_probe_keeps_the_mask(lab: Any, floats: Floats) -> None:
    model = _model(lab, _masked(WINDOW), window=np.array(-5000, np.int64))
    declined = lab.same(model, PASSES, _feeds(floats))
    node = _attention(model)
    assert node.metadata_props["pfmc.mask"] == "explicit"
    assert node.attributes["is_causal"].value == 0
    assert "beyond" in declined[0].reason


def test_a_bias_that_is_no_mask_stays(lab: Any, floats: Floats) -> None:
    inputs = f"{MASKED}, float[1,4,S,S] bias".replace(", int64[B,S] attention_mask", "")
    body = f"{KT} p = MatMul(q, kt) s = Add(bias, p) w = Softmax<axis=-1>(s) y = MatMul(w, v)"
    model = _model(lab, body, inputs)
    lab.same(model, PASSES, _feeds(floats) | {"bias": floats(1, 4, 5, 5)})
    node = _attention(model)
    assert node.metadata_props["pfmc.mask"] == "bias"
    assert node.inputs[3].name == "bias"


def test_a_mask_that_twists_its_input_stays(lab: Any, floats: Floats) -> None:
    """Hides the columns where the input is one: the opposite of padding."""
    mask = (
        "n = Shape(q) a = Slice(n, st, en) pb0 = Cast<to=9>(attention_mask) pb = Not(pb0)"
        " ok0 = Unsqueeze(pb, ax12) sh = Concat<axis=0>(o2, a, o1) ok = Expand(ok0, sh)"
    )
    model = _model(
        lab,
        _masked(mask),
        MASKED,
        st=np.array([2], np.int64),
        en=np.array([3], np.int64),
        o1=np.array([1], np.int64),
        o2=np.array([1, 1], np.int64),
    )
    padding = np.array([[1, 0, 0, 0, 0], [0, 0, 0, 1, 1]])
    lab.same(model, PASSES, _feeds(floats) | {"attention_mask": padding})
    assert _attention(model).metadata_props["pfmc.mask"] == "explicit"


GROUPED = (
    "u = Unsqueeze(k, {axis}) e = Expand(u, to) kk = Reshape(e, flat)"
    " u2 = Unsqueeze(v, {axis}) e2 = Expand(u2, to) vv = Reshape(e2, flat)"
    " kt = Transpose<perm=[0,1,3,2]>(kk) s = MatMul(q, kt) w = Softmax<axis=-1>(s)"
    " y = MatMul(w, vv)"
)


def _grouped(lab: Any, axis: str) -> ir.Model:
    to = np.array([1, 2, 2, 1, 1], np.int64)
    return _model(
        lab,
        GROUPED.format(axis=axis),
        "float[B,4,S,8] q, float[B,2,S,8] k, float[B,2,S,8] v",
        to=to,
        flat=np.array([0, 4, -1, 8], np.int64),
    )


def test_repeated_heads_become_native_groups(lab: Any, floats: Floats) -> None:
    model = _grouped(lab, "ax2")
    lab.same(model, PASSES, _feeds(floats, groups=2))
    assert lab.counts(model) == {"Attention": 1}
    assert [v.name for v in _attention(model).inputs] == ["q", "k", "v"]


def test_interleaved_heads_are_not_taken_for_groups(lab: Any, floats: Floats) -> None:
    """Heads 0, 1, 0, 1: the same operators as grouping, another meaning."""
    model = _grouped(lab, "ax1")
    lab.same(model, PASSES, _feeds(floats, groups=2))
    node = _attention(model)
    assert node.inputs[2].name == "vv"


def test_keys_transposed_with_the_split_into_heads(lab: Any, floats: Floats) -> None:
    body = (
        "kt = Transpose<perm=[0,2,3,1]>(k) s = MatMul(q, kt) w = Softmax<axis=-1>(s)"
        " y = MatMul(w, v)"
    )
    model = _model(lab, body, "float[B,4,S,8] q, float[B,S,4,8] k, float[B,4,S,8] v")
    feeds = _feeds(floats)
    feeds["k"] = feeds["k"].transpose(0, 2, 1, 3).copy()
    lab.same(model, PASSES, feeds)
    assert lab.counts(model) == {"Transpose": 1, "Attention": 1}


def test_weights_that_are_read_elsewhere_are_declined(lab: Any, floats: Floats) -> None:
    body = f"{KT} s = MatMul(q, kt) w = Softmax<axis=-1>(s) y = MatMul(w, v)"
    model = _model(lab, body, output="float[B,4,S,8] y, float[B,4,S,S] w")
    declined = lab.same(model, PASSES, _feeds(floats))
    assert [d.reason for d in declined] == ["the attention weights are an output"]


def test_past_keys_and_values_become_the_operators_own(lab: Any, floats: Floats) -> None:
    inputs = (
        "float[B,4,S,8] q, float[B,4,S,8] k, float[B,4,S,8] v, float[B,4,P,8] pk, float[B,4,P,8] pv"
    )
    body = (
        "kk = Concat<axis=2>(pk, k) vv = Concat<axis=-2>(pv, v) kt = Transpose<perm=[0,1,3,2]>(kk)"
        " s = MatMul(q, kt) w = Softmax<axis=-1>(s) y = MatMul(w, vv)"
    )
    outputs = "float[B,4,S,8] y, float[B,4,T,8] kk, float[B,4,T,8] vv"
    model = _model(lab, body, inputs, outputs)
    feeds = _feeds(floats, length=2) | {"pk": floats(2, 4, 3, 8), "pv": floats(2, 4, 3, 8)}
    lab.same(model, PASSES, feeds)
    node = _attention(model)
    assert [v.name if v is not None else None for v in node.inputs] == [
        "q",
        "k",
        "v",
        None,
        "pk",
        "pv",
    ]
    assert [v.name for v in node.outputs] == ["y", "kk", "vv"]
    assert lab.counts(model) == {"Attention": 1}


def test_joined_keys_that_others_read_stay_in_order(lab: Any, floats: Floats) -> None:
    """Found by the fuzzer: a reader of the joined keys stood before the attention that makes them;
    and one that leads to this attention keeps them outside."""
    inputs = (
        "float[B,4,S,8] q, float[B,4,S,8] k, float[B,4,S,8] v, float[B,4,P,8] pk, float[B,4,P,8] pv"
    )
    join = "kk = Concat<axis=2>(pk, k) vv = Concat<axis=-2>(pv, v)"
    rest = (
        " kt = Transpose<perm=[0,1,3,2]>(kk) s = MatMul(qq, kt) w = Softmax<axis=-1>(s)"
        " y = MatMul(w, vv)"
    )
    feeds = _feeds(floats, length=2) | {"pk": floats(2, 4, 3, 8), "pv": floats(2, 4, 3, 8)}
    outputs = "float[B,4,S,8] y, float[B,4,T,8] kk, float[B,4,T,8] vv"
    aside = _model(lab, f"{join} e = Neg(kk) qq = Relu(q){rest}", inputs,
                   f"{outputs}, float[B,4,T,8] e")  # fmt: skip
    lab.same(aside, PASSES, feeds)
    before = _model(lab, f"{join} m = ReduceMax<keepdims=0, noop_with_empty_axes=0>(kk)"
                    f" qq = Mul(q, m){rest}", inputs, outputs)  # fmt: skip
    lab.same(before, PASSES, feeds)


SHARED_HEADS = (
    "jk = Concat<axis=2>(pk, k) jv = Concat<axis=2>(pv, v) u = Unsqueeze(jk, ax2) {more}"
    " e = Expand(u, to) kk = Reshape(e, flat) u2 = Unsqueeze(jv, ax2) e2 = Expand(u2, to)"
    " vv = Reshape(e2, flat) kt = Transpose<perm=[0,1,3,2]>(kk) s = MatMul(qq, kt)"
    " w = Softmax<axis=-1>(s) y = MatMul(w, vv)"
)


@pytest.mark.parametrize(
    ("more", "extra"),
    [("aside = Neg(u) qq = Relu(q)", ", float[B,2,1,T,8] aside"),
     ("m = ReduceMax<keepdims=0, noop_with_empty_axes=0>(u) qq = Add(q, m)", "")],
    ids=["beside", "on the way"],
)  # fmt: skip
def test_joined_keys_of_shared_heads_that_others_read(
    more: str, extra: str, lab: Any, floats: Floats
) -> None:
    """Found by the fuzzer: the widening of the keys lives on, before the attention or into it."""
    inputs = (
        "float[B,4,S,8] q, float[B,2,S,8] k, float[B,2,S,8] v, float[B,2,P,8] pk, float[B,2,P,8] pv"
    )
    outputs = f"float[B,4,S,8] y, float[B,2,T,8] jk, float[B,2,T,8] jv{extra}"
    model = _model(lab, SHARED_HEADS.format(more=more), inputs, outputs,
                   to=np.array([1, 1, 2, 1, 1], np.int64),
                   flat=np.array([0, 4, -1, 8], np.int64))  # fmt: skip
    feeds = _feeds(floats, length=2, groups=2)
    feeds |= {"pk": floats(2, 2, 3, 8), "pv": floats(2, 2, 3, 8)}
    lab.same(model, PASSES, feeds)
    assert lab.counts(model)["Attention"] == (1 if extra else 0), "into itself: left in pieces"


@pytest.mark.parametrize("form", ["Div(p, cap)", "Mul(p, inverse)"])
@pytest.mark.parametrize("masked", [False, True])
def test_softcap(lab: Any, floats: Floats, form: str, masked: bool) -> None:
    """Gemma 2: ``cap * tanh(s / cap)`` before the mask; the scale is that of the scores."""
    mask = f"{CAUSAL} m = Where(ok, nought, low) a = Add(h, m)" if masked else "a = Identity(h)"
    body = (
        f"{KT} p0 = MatMul(q, kt) p = Mul(p0, scale) d = {form} t = Tanh(d) h = Mul(t, cap)"
        f" {mask} w = Softmax<axis=-1>(a) y = MatMul(w, v)"
    )
    more = {"cap": np.array(1.5, np.float32)}
    if "inverse" in form:
        more["inverse"] = np.array(1 / 1.5, np.float32)
    if masked:
        more |= {"nought": np.array(0, np.float32), "low": np.array(LOW)}
    model = _model(lab, body, **more)
    feeds = {n: 3 * floats(2, 4, 5, 8) for n in "qkv"}
    lab.same(model, PASSES, feeds)
    (node,) = [n for n in model.graph if n.op_type == "Attention"]
    assert node.attributes["softcap"].value == pytest.approx(1.5)
    assert node.attributes["scale"].value == pytest.approx(0.25)
    assert node.attributes["is_causal"].value == int(masked)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("mask", [f"{CAUSAL}", f"{WINDOW}"])
def test_sink(lab: Any, floats: Floats, mask: str, centred: bool) -> None:
    """gpt-oss: one learnt score a head takes part in the softmax and is dropped again."""
    centre = "z0 = ReduceMax<keepdims=1>(j, last) z = Sub(j, z0)" if centred else "z = Identity(j)"
    body = (
        f"{KT} p0 = MatMul(q, kt) p = Mul(p0, scale) {mask} m = Where(ok, nought, low)"
        " a = Add(p, m) b = Shape<start=0, end=1>(q) s = Shape<start=2, end=3>(q)"
        " sh = Concat<axis=0>(b, heads, s, single) sink = Expand(learnt, sh)"
        f" j = Concat<axis=-1>(a, sink) {centre} w0 = Softmax<axis=-1>(z)"
        " w = Slice(w0, first, last, last) y = MatMul(w, v)"
    )
    more = {
        "nought": np.array(0, np.float32), "low": np.array(LOW), "learnt": floats(1, 4, 1, 1),
        "heads": np.array([4]), "single": np.array([1]), "first": np.array([0]),
        "last": np.array([-1]),
    }  # fmt: skip
    model = _model(lab, body, **more)
    lab.same(model, PASSES, {n: floats(2, 4, 5, 8) for n in "qkv"})
    (node,) = [n for n in model.graph if n.op_type == "Attention"]
    assert node.metadata_props["pfmc.sink"] == "1"
    assert "Softmax" not in lab.counts(model)


def test_one_head_of_keys_for_all_queries(lab: Any, floats: Floats) -> None:
    """Falcon: multi-query attention by broadcasting, without repeating."""
    body = f"{KT} p0 = MatMul(q, kt) p = Mul(p0, scale) w = Softmax<axis=-1>(p) y = MatMul(w, v)"
    inputs = "float[B,4,S,8] q, float[B,1,S,8] k, float[B,1,S,8] v"
    model = _model(lab, body, inputs=inputs)
    lab.same(
        model, PASSES, {"q": floats(2, 4, 5, 8), "k": floats(2, 1, 5, 8), "v": floats(2, 1, 5, 8)}
    )
    (node,) = [n for n in model.graph if n.op_type == "Attention"]
    assert [v.name for v in node.inputs] == ["q", "k", "v"]


@pytest.mark.parametrize(
    "fill", ["s = Where(ok, p, low)", "no = Not(ok) s = Where(no, inf, p)"], ids=["show", "hide"]
)
def test_filled_scores_are_masked_scores(lab: Any, floats: Floats, fill: str) -> None:
    """GPT-2 of old and MPT: the mask chooses between scores and a very low number."""
    body = f"{CAUSAL} {KT} p = MatMul(q, kt) {fill} w = Softmax<axis=-1>(s) y = MatMul(w, v)"
    model = _model(lab, body)
    assert lab.same(model, PASSES, _feeds(floats)) == []
    assert _attention(model).metadata_props["pfmc.mask"] == "causal"
    assert lab.counts(model) == {"Attention": 1}


def test_a_mask_that_is_scaled_with_the_scores(lab: Any, floats: Floats) -> None:
    """CodeGen and Falcon: (scores + mask) / root."""
    body = (
        f"{CAUSAL} m = Where(ok, f0, low) {KT} p = MatMul(q, kt) s0 = Add(p, m) s = Mul(s0, scale)"
        " w = Softmax<axis=-1>(s) y = MatMul(w, v)"
    )
    model = _model(lab, body)
    assert lab.same(model, PASSES, _feeds(floats)) == []
    node = _attention(model)
    assert (node.attributes["scale"].value, node.attributes["is_causal"].value) == (0.25, 1)


@pytest.mark.parametrize(
    "joined", ["b = Add(m, bias) s = Add(p, b)", "c = Add(p, bias) s = Add(c, m)"]
)
def test_a_bias_is_kept_and_the_causal_mask_goes(lab: Any, floats: Floats, joined: str) -> None:
    """ALiBi and T5: what is added besides the mask, one row for all queries or one for each."""
    for rows in (1, 5):
        body = (
            f"{CAUSAL} m = Where(ok, f0, low) {KT} p = MatMul(q, kt) {joined}"
            " w = Softmax<axis=-1>(s) y = MatMul(w, v)"
        )
        inputs = f"float[B,4,S,8] q, float[B,4,S,8] k, float[B,4,S,8] v, float[1,4,{rows},5] bias"
        model = _model(lab, body, inputs.replace("S", "5"), "float[B,4,5,8] y")
        feeds = _feeds(floats) | {"bias": floats(1, 4, rows, 5)}
        (remark,) = lab.same(model, PASSES, feeds)
        assert "a bias is added" in remark.reason
        node = _attention(model)
        assert node.metadata_props["pfmc.mask"] == "causal+bias"
        assert node.attributes["is_causal"].value == 1
        assert lab.counts(model)["Where"] == 0


FLAT_INPUTS = "float[B,4,S,8] q, float[B,4,T,8] k, float[B,4,T,8] v"


@pytest.mark.parametrize(
    "middle",
    [
        "s4 = Reshape(p, four) w4 = Softmax<axis=-1>(s4) w = Reshape(w4, three)",
        "w = Softmax<axis=-1>(p)",
        "h = Mul(p, scale) s4 = Reshape(h, four) w4 = Softmax<axis=-1>(s4) w = Reshape(w4, three)",
    ],
    ids=["softmax of four", "softmax of three", "scaled"],
)
def test_flattened_heads(lab: Any, floats: Floats, middle: str) -> None:
    """BLOOM, DeBERTa and torch's MultiheadAttention multiply ``[B * H, S, D]``."""
    body = (
        "q3 = Reshape(q, wide) k3 = Reshape(k, wide) v3 = Reshape(v, wide)"
        f" kt = Transpose<perm=[0,2,1]>(k3) p = MatMul(q3, kt) {middle} z = MatMul(w, v3)"
        " y = Reshape(z, back)"
    )
    shapes = {"wide": [-1, 5, 8], "four": [-1, 4, 5, 5], "three": [-1, 5, 5], "back": [-1, 4, 5, 8]}
    more = {n: np.array(d, np.int64) for n, d in shapes.items() if f"{n})" in body}
    inputs = FLAT_INPUTS.replace("S", "5").replace("T", "5")
    model = _model(lab, body, inputs, "float[B,4,5,8] y", **more)
    assert lab.same(model, PASSES, _feeds(floats)) == []
    node = _attention(model)
    assert node.metadata_props["pfmc.mask"] == "none"
    if "four" in body:
        assert [v.name for v in node.inputs] == ["q", "k", "v"], "the very heads, not copies"


def test_a_bias_on_flattened_heads(lab: Any, floats: Floats) -> None:
    body = (
        "q3 = Reshape(q, wide) k3 = Reshape(k, wide) v3 = Reshape(v, wide)"
        " kt = Transpose<perm=[0,2,1]>(k3) p = MatMul(q3, kt) s = Add(p, bias)"
        " s4 = Reshape(s, four)"
        " w4 = Softmax<axis=-1>(s4) w = Reshape(w4, three) z = MatMul(w, v3) y = Reshape(z, back)"
    )
    shapes = {"wide": [-1, 5, 8], "four": [-1, 4, 5, 5], "three": [-1, 5, 5], "back": [-1, 4, 5, 8]}
    inputs = FLAT_INPUTS.replace("B", "2").replace("S", "5").replace("T", "5")
    model = _model(
        lab, body, f"{inputs}, float[8,1,5] bias", "float[2,4,5,8] y",
        **{n: np.array(d, np.int64) for n, d in shapes.items()},
    )  # fmt: skip
    (remark,) = lab.same(model, PASSES, _feeds(floats) | {"bias": floats(8, 1, 5)})
    assert "the mask holds other values" in remark.reason
    assert _attention(model).metadata_props["pfmc.mask"] == "bias"
