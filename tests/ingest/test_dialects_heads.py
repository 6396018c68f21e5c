"""MultiHeadAttention, Attention and the one-step decoder's attention against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfmc.errors import InputError
from pfmc.ingest import load

from .conftest import make_session, run_model
from .onenode import Weights, compare, normal, proto, whole

HEADS, HEAD, BATCH, STEPS = 2, 4, 2, 3
WIDTH = HEADS * HEAD
LENGTHS = np.array([2, 3], np.int32)
MASKS: dict[str, np.ndarray] = {
    "lengths": LENGTHS,
    "ends and starts": np.array([2, 3, 1, 0], np.int32),
    "lengths and sums": np.array([2, 3, 0, 3, 6, 0, 2, 5], np.int32),
    "columns": np.array([[1, 1, 0], [1, 0, 1]], np.int32),
    "squares": np.array([[[1, 0, 0], [1, 1, 0], [0, 1, 1]]] * 2, np.int32),
}


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_of_attention(mask: str, causal: int, tmp_path: Path) -> None:
    feeds = {"x": normal(BATCH, STEPS, WIDTH), "m": MASKS[mask]}
    weights = {"w": normal(WIDTH, 3 * WIDTH), "b": normal(3 * WIDTH)}
    more = {"unidirectional": causal, "num_heads": HEADS}
    compare(tmp_path, "Attention", ["x", "w", "b", "m"], feeds, weights, **more)
    compare(tmp_path, "Attention", ["x", "w", "b", "m"], feeds, weights, **more,
            mask_filter_value=-3.0, scale=0.2)  # fmt: skip
    if len(MASKS[mask].shape) == 1:  # the number of sequences is unknown: told by the count
        shapes = {"x": ["B", STEPS, WIDTH], "m": ["N"]}
        if mask != "lengths and sums":
            compare(tmp_path, "Attention", ["x", "w", "b", "m"], feeds, weights, symbols=shapes,
                    **more)  # fmt: skip


@pytest.mark.parametrize("mask", ["none", "columns", "squares", "lengths"])
def test_past_of_attention(mask: str, tmp_path: Path) -> None:
    feeds = {"x": normal(BATCH, STEPS, WIDTH), "p": normal(2, BATCH, HEADS, 2, HEAD)}
    weights = {"w": normal(WIDTH, 3 * WIDTH), "b": normal(3 * WIDTH)}
    shape = {"columns": (BATCH, 5), "squares": (BATCH, STEPS, 5)}
    if mask == "lengths":
        feeds["m"] = np.array([4, 5], np.int32)
    elif mask != "none":
        feeds["m"] = whole(0, 2, *shape[mask], kind=np.int32)
        feeds["m"][..., 0] = 1
    names = ["x", "w", "b", "m" * ("m" in feeds), "p"]
    for causal in (0, 1):
        compare(tmp_path, "Attention", names, feeds, weights, ["y", "present"],
                num_heads=HEADS, unidirectional=causal)  # fmt: skip


@pytest.mark.parametrize("mask", ["lengths", "lengths and sums", "columns", "squares"])
def test_masks_of_heads(mask: str, tmp_path: Path) -> None:
    feeds = {n: normal(BATCH, STEPS, WIDTH) for n in "qkv"} | {"m": MASKS[mask]}
    compare(tmp_path, "MultiHeadAttention", ["q", "k", "v", "", "m"], feeds, {}, num_heads=HEADS)


def test_past_mask_and_bias_of_heads(tmp_path: Path) -> None:
    feeds = {n: normal(BATCH, STEPS, WIDTH) for n in "qkv"}
    feeds |= {n: normal(BATCH, HEADS, 2, HEAD) for n in ("pk", "pv")}
    feeds["m"] = np.array([[1, 1, 0, 1, 1], [1, 0, 1, 1, 0]], np.int32)
    feeds["a"] = normal(1, HEADS, STEPS, 5)
    for causal in (0, 1):
        compare(tmp_path, "MultiHeadAttention", ["q", "k", "v", "", "m", "a", "pk", "pv"], feeds,
                {}, ["y", "K", "V"], num_heads=HEADS, unidirectional=causal)  # fmt: skip


def test_cross_attention_adds_the_bias_to_the_query_alone(tmp_path: Path) -> None:
    feeds = {"q": normal(BATCH, STEPS, WIDTH)}
    feeds |= {n: normal(BATCH, HEADS, 5, HEAD) for n in "kv"}
    compare(tmp_path, "MultiHeadAttention", ["q", "k", "v", "b"], feeds, {"b": normal(3 * WIDTH)},
            num_heads=HEADS)  # fmt: skip


def test_a_buffer_filled_in_part(tmp_path: Path) -> None:
    """Past and present of a fixed size, of which past_sequence_length rows count."""
    feeds = {n: normal(BATCH, 1, WIDTH) for n in "qkv"}
    feeds |= {n: normal(BATCH, HEADS, 6, HEAD) for n in ("pk", "pv")}
    feeds["n"] = np.array([2], np.int32)
    names = ["q", "k", "v", "", "", "", "pk", "pv", "n"]
    compare(tmp_path, "MultiHeadAttention", names, feeds, {}, ["y", "K", "V"], num_heads=HEADS)
    names = ["q", "k", "v", "", "", "pk", "pv", "n"]
    compare(tmp_path, "DecoderMaskedMultiHeadAttention", names, feeds, {}, ["y", "K", "V"],
            num_heads=HEADS, past_present_share_buffer=1)  # fmt: skip


def test_a_decoder_looking_at_its_encoder(tmp_path: Path) -> None:
    feeds = {"q": normal(BATCH, 1, WIDTH)} | {n: normal(BATCH, HEADS, 5, HEAD) for n in "kv"}
    feeds["m"] = np.array([[1, 1, 0, 1, 0], [1, 0, 1, 1, 1]], np.int32)
    compare(tmp_path, "DecoderMaskedMultiHeadAttention", ["q", "k", "v", "m"], feeds, {},
            num_heads=HEADS)  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("packed", ["qkv", "kv"])
def test_packed_layouts_equal_separate_ones(packed: str, bias: bool, tmp_path: Path) -> None:
    """ONNX Runtime's CPU provider knows no packed layouts: it runs the same numbers apart."""
    apart = {n: normal(BATCH, STEPS, WIDTH) for n in "qkv"}
    weights = {"b": normal(3 * WIDTH)} if bias else {}
    names = ["q", "k", "v", *weights]
    want = _run(proto("MultiHeadAttention", names, apart, weights, ["y"], {"num_heads": HEADS}),
                apart)  # fmt: skip
    split = {n: a.reshape(BATCH, STEPS, HEADS, HEAD) for n, a in apart.items()}
    feeds = {"q": np.stack(list(split.values()), 3)} if packed == "qkv" else {
        "q": apart["q"], "k": np.stack([split["k"], split["v"]], 3)}  # fmt: skip
    names = ["q", "k" * (packed == "kv"), "", *weights]
    while not names[-1]:
        names.pop()
    model = proto("MultiHeadAttention", names, feeds, weights, ["y"], {"num_heads": HEADS})
    model.graph.output[0].type.tensor_type.elem_type = 1
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    np.testing.assert_allclose(run_model(load(path).model, feeds)[0], want, atol=1e-5)


def _run(model: Any, feeds: Weights) -> np.ndarray:
    return make_session(model.SerializeToString()).run(None, feeds)[0]


@pytest.mark.parametrize(
    ("op", "names", "more", "message"),
    [
        ("Attention", ["x", "w", "b", "m4"], {}, "rank 4"),
        ("Attention", ["x", "w", "b"], {"do_rotary": 1}, "do_rotary"),
        ("Attention", ["x", "w", "b", "", "p", "", "n"], {}, "shared buffer"),
        ("MultiHeadAttention", ["x"], {}, "'key' is missing"),
        ("MultiHeadAttention", ["x", "x", "x", "", "", "", "", "", "", "n"], {}, "cache_ind"),
        ("DecoderMaskedMultiHeadAttention", ["x", "x", "x"], {}, "neither those of cross"),
    ],
)
def test_what_is_refused(
    op: str, names: list[str], more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    every = {
        "x": normal(1, STEPS, WIDTH), "m4": whole(0, 2, 1, 1, 3, 3, kind=np.int32),
        "p": normal(2, 1, HEADS, 2, HEAD), "n": np.array([1], np.int32),
    }  # fmt: skip
    weights = {"w": normal(WIDTH, 3 * WIDTH), "b": normal(3 * WIDTH)}
    used = {n: a for n, a in weights.items() if n in names}
    feeds = {n: a for n, a in every.items() if n in names}
    model = proto(op, names, feeds, used, ["y"], {"num_heads": HEADS, **more})
    model.graph.output[0].type.tensor_type.elem_type = 1
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=message):
        load(path)
