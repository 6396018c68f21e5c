"""Norms, embeddings, activations and plain operators of com.microsoft against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .onenode import Weights, compare, normal, rotary_tables, whole


@pytest.mark.parametrize("op", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
@pytest.mark.parametrize("shape", [(2, 3, 8), (1, 3, 8), (3, 8)])
def test_skips_of_every_shape(op: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    feeds = {"x": normal(2, 3, 8), "s": normal(*shape)}
    weights = {"g": normal(8), "b": normal(8)}
    bias = ["", "b"] if "Simplified" not in op else ["b"]
    compare(tmp_path, op, ["x", "s", "g", *bias], feeds, weights, ["y", "", "", "total"],
            epsilon=1e-3)  # fmt: skip


def test_the_inverse_deviation(tmp_path: Path) -> None:
    compare(tmp_path, "SimplifiedLayerNormalization", ["x", "g"], {"x": normal(2, 3, 8)},
            {"g": normal(8)}, ["y", "v"], domain="", epsilon=1e-3)  # fmt: skip


@pytest.mark.parametrize("parts", ["kinds", "mask", "places", "none"])
def test_embeddings(parts: str, tmp_path: Path) -> None:
    """mask_index counts the words that the mask shows, and is zero without one."""
    feeds: Weights = {"i": whole(0, 9, 2, 5, kind=np.int32)}
    weights = {
        "w": normal(9, 8),
        "p": normal(6, 8),
        "e": normal(2, 8),
        "g": normal(8),
        "b": normal(8),
    }
    names = ["i", "", "w", "p", "", "g", "b", "", ""]
    if parts == "kinds":
        feeds["k"], names[1], names[4] = whole(0, 2, 2, 5, kind=np.int32), "k", "e"
    else:
        del weights["e"]
    if parts == "mask":
        feeds["m"] = np.array([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]], np.int32)
        names[7] = "m"
    if parts == "places":
        feeds["q"] = whole(0, 6, 2, 5, kind=np.int32)
        names[8] = "q"
    while not names[-1]:
        names.pop()
    compare(tmp_path, "EmbedLayerNormalization", names, feeds, weights, ["y", "n", "total"])


ELEMENTWISE: dict[str, tuple[str, Weights, dict[str, Any]]] = {
    "scaled silu": ("ScaledSiLU", {"x": normal(2, 3, 8)}, {"alpha": 1.5}),
    "scaled silu by an input": (
        "ScaledSiLU", {"x": normal(2, 3, 8), "s": np.array(0.7, np.float32)}, {}),
    "gated add": (
        "GatedAdd", {"x": normal(2, 3, 8), "y0": normal(2, 3, 8), "g": normal(2, 3, 1)}, {}),
    "gated norm": (
        "GatedRMSNorm", {"x": normal(2, 3, 8), "s": normal(4), "g": normal(2, 3, 8)}, {}),
    "gated norm of all": (
        "GatedRMSNorm", {"x": normal(2, 3, 8), "s": normal(8), "g": normal(2, 3, 8)},
        {"activation": "sigmoid", "epsilon": 1e-3}),
    "branches": ("BranchwiseRMSNorm", {"x": normal(2, 3, 8), "s": normal(8)}, {"num_branches": 2}),
    "branches apart": ("BranchwiseRMSNorm", {"x": normal(2, 3, 2, 4), "s": normal(2, 4)}, {}),
    "branches, one scale": (
        "BranchwiseRMSNorm", {"x": normal(2, 3, 8), "s": normal(4)}, {"num_branches": 2}),
    "mixed streams": (
        "HyperConnectionPreMix", {"x": normal(2, 3, 8), "m": normal(2, 3, 2)},
        {"num_branches": 2, "reduction_scale": 0.5}),
    "features of streams": (
        "HyperConnectionPreMix", {"x": normal(2, 3, 2, 4), "m": normal(2, 3, 2, 4)}, {}),
    "injected block": (
        "HyperConnectionPostMix",
        {"x": normal(2, 3, 2, 4), "b": normal(2, 3, 4), "m": normal(2, 3, 2),
         "s": normal(2, 3, 2, 2)}, {}),
    "injected block, flat": (
        "HyperConnectionPostMix",
        {"x": normal(2, 3, 8), "b": normal(2, 3, 4), "m": normal(2, 3, 2, 1)},
        {"num_branches": 2}),
    "echo": ("SampleOp", {"x": normal(2, 3)}, {}),
    "unfold": ("UnfoldTensor", {"x": normal(2, 7)}, {"dim": -1, "size": 3, "step": 2}),
    "unfold inside": ("UnfoldTensor", {"x": normal(7, 2)}, {"dim": 0, "size": 3, "step": 1}),
    "range": ("Range", {"a": np.array(1.0, np.float32), "b": np.array(4.0, np.float32)}, {}),
    "range by": (
        "Range", {"a": np.array([1]), "b": np.array([9]), "c": np.array([3])}, {}),
    "gather": ("GatherND", {"x": normal(2, 3), "i": np.array([[1], [0]])}, {}),
    "triangle": ("Trilu", {"x": normal(3, 3), "k": np.array(1)}, {"upper": 0}),
}  # fmt: skip


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_small_operators(name: str, tmp_path: Path) -> None:
    op, feeds, more = ELEMENTWISE[name]
    compare(tmp_path, op, list(feeds), feeds, {}, **more)


def test_gates_of_linear_attention_and_engrams(tmp_path: Path) -> None:
    feeds = {"a": normal(2, 3, 4), "t": normal(4), "d": normal(4), "b": normal(2, 3, 4)}
    compare(tmp_path, "LinearAttentionGate", list(feeds), feeds, {}, ["y", "beta"])
    feeds = {n: normal(2, 3, 2, 4) for n in "kq"} | {"v": normal(2, 3, 4)}
    weights = {n: normal(2, 4) for n in "abc"}
    compare(tmp_path, "EngramGate", [*feeds, *weights], feeds, weights, ["y", "normed"])


def test_constants_as_inputs(tmp_path: Path) -> None:
    axis = {"a": np.array(-1, np.int32)}
    compare(tmp_path, "ExpandDims", ["x", "a"], {"x": normal(2, 3)}, axis)
    pads = {"p": np.array([[0, 1, 0, 2]]), "v": np.array([1.5], np.float32)}
    compare(tmp_path, "Pad", ["x", "p", "v"], {"x": normal(2, 3)}, pads)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("flat", [False, True])
def test_three_positions(flat: bool, layout: int, interleaved: int, tmp_path: Path) -> None:
    shape = (2, 4, 3 * 16) if flat else (2, 3, 4, 16)
    feeds = {"x": normal(*shape), "p": whole(0, 16, 3, 2, 4, kind=np.int64)}
    more = {"num_heads": 3, "rotary_embedding_dim": 16} if flat else {}
    compare(tmp_path, "MRotaryEmbedding", ["x", "p", "cos", "sin"], feeds, rotary_tables(16, 16),
            mrope_section=[3, 3, 2], mrope_layout=layout, interleaved=interleaved,
            **more)  # fmt: skip
