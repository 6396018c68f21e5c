"""Decoders get a memory that computes step by step what the source computes at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

WITHOUT = [
    f"{arch}__{mode}"
    for arch in ("llama", "mistral", "qwen2", "qwen3", "gpt2")
    for mode in ("t_dyn", "ts", "h_dyn")
] + ["llama_tied__ts", "llama__h_gen__prefill", "gpt2__h_gen__prefill"]
WITH = [f"{a}__t_kv" for a in ("llama", "qwen3", "gpt2")]
WITH += [f"{a}__h_gen__decode" for a in ("llama", "gpt2")]
BATCH, LENGTH = 2, 7


def _ids(seed: int = 3, batch: int = BATCH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 100, (batch, LENGTH))


def _feeds(
    model: ir.Model, ids: np.ndarray, padding: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Feeds of the source model for a whole sequence."""
    feeds = {"input_ids": ids}
    for value in model.graph.inputs:
        if "mask" in value.name:
            feeds[value.name] = np.ones_like(ids) if padding is None else padding
        if "position" in value.name:
            feeds[value.name] = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy()
    return feeds


def _empty(model: ir.Model, batch: int) -> dict[str, np.ndarray]:
    pasts = [v for v in model.graph.inputs if v.name.startswith("past_key_values.")]
    return {v.name: np.zeros((batch, v.shape[1], 0, v.shape[3]), np.float32) for v in pasts}


def _decode(lab: Any, model: ir.Model, feeds: dict[str, np.ndarray], cuts: list[int]) -> np.ndarray:
    """The first output, computed in pieces that end at `cuts`, with the memory handed on."""
    session = lab.session(model)
    names = [o.name for o in session.get_outputs()]
    past, pieces, start = _empty(model, len(feeds["input_ids"])), [], 0
    for end in cuts:
        step = {n: a[:, start:end] for n, a in feeds.items() if "mask" not in n}
        step |= {n: a[:, :end] for n, a in feeds.items() if "mask" in n}
        result = dict(zip(names, session.run(names, step | past), strict=True))
        pieces.append(result[names[0]])
        memory = {n: a for n, a in result.items() if n.startswith("present.")}
        past = {n.replace("present", "past_key_values"): a for n, a in memory.items()}
        start = end
    return np.concatenate(pieces, axis=1)


@pytest.mark.parametrize("name", WITHOUT)
def test_step_by_step_equals_at_once(lab: Any, name: str) -> None:
    model = lab.load(name)
    feeds = _feeds(model, _ids())
    first = model.graph.outputs[0].name
    wanted = lab.run(model, feeds)[first]
    assert lab.apply(model, lab.canonical) == []
    inputs = [v.name for v in model.graph.inputs if v.name.startswith("past")]
    assert inputs == [f"past_key_values.{i}.{k}" for i in (0, 1) for k in ("key", "value")]
    outputs = [v.name for v in model.graph.outputs if v.name.startswith("present")]
    assert outputs == [n.replace("past_key_values", "present") for n in inputs]
    assert len(model.graph.outputs) == 5
    for cuts in ([7], [1, 2, 3, 4, 5, 6, 7], [4, 5, 7]):
        np.testing.assert_allclose(_decode(lab, model, feeds, cuts), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama__ts", "llama__h_dyn", "gpt2__t_dyn", "mistral__t_dyn"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_with_padding(lab: Any, name: str, side: str) -> None:
    """Equal wherever the query is no padding itself; nobody reads the others."""
    model = lab.load(name)
    padding = np.ones((BATCH, LENGTH), np.int64)
    padding[1, :2] = side == "right"
    padding[1, -2:] = side == "left"
    feeds = _feeds(model, _ids(), padding)
    if side == "left" and name.startswith("gpt2"):
        feeds["input_ids"] = feeds["input_ids"].copy()
    wanted = lab.run(model, feeds)[model.graph.outputs[0].name]
    lab.apply(model, lab.canonical)
    got = _decode(lab, model, feeds, [3, 4, 7])
    real = padding > 0
    np.testing.assert_allclose(got[real], wanted[real], rtol=1e-5, atol=1e-5)
    assert np.isfinite(got).all()


def _bear(model: ir.Model, names: list[str]) -> None:
    """Gives inner values the names that the memory is about to get."""
    inner = (n for n in model.graph if n.op_type == "MatMul")
    for node, name in zip(inner, names, strict=False):
        node.outputs[0].name = name


TAKEN = ["past_key_values.0.key", "present.1.value"]


def test_a_name_that_an_inner_value_bears(lab: Any) -> None:
    """Found by the fuzzer: the name was given a second time."""
    model = lab.load("llama__h_dyn")
    feeds = _feeds(model, _ids())
    wanted = lab.run(model, feeds)["logits"]
    _bear(model, TAKEN)
    assert lab.apply(model, lab.canonical) == []
    got = _decode(lab, model, feeds, [3, 4, 7])
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("taken", [[], TAKEN])
@pytest.mark.parametrize("name", WITH)
@pytest.mark.parametrize("past", [1, 6])
def test_a_memory_that_is_there_gets_its_names(
    lab: Any, name: str, past: int, taken: list[str]
) -> None:
    rng = np.random.default_rng(5)
    model = lab.load(name)
    feeds: dict[str, np.ndarray] = {}
    for value in model.graph.inputs:
        if "past" in value.name:
            shape = (BATCH, value.shape[1], past, value.shape[3])
            feeds[value.name] = rng.standard_normal(shape).astype(np.float32)
        elif "mask" in value.name:
            feeds[value.name] = np.ones((BATCH, past + 1), np.int64)
        elif "position" in value.name:
            feeds[value.name] = np.full((BATCH, 1), past)
        else:
            feeds[value.name] = rng.integers(0, 100, (BATCH, 1))
    wanted = list(lab.run(model, feeds).values())
    if not {v.name for v in model.graph.inputs}.intersection(taken):
        _bear(model, taken)
    assert lab.apply(model, lab.canonical) == []
    old = {v.name: v.metadata_props.get("pfmc.value", v.name) for v in model.graph.inputs}
    got = list(lab.run(model, {new: feeds[name] for new, name in old.items()}).values())
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    names = [v.name for v in model.graph.outputs[1:]]
    assert names == [f"present.{i}.{k}" for i in (0, 1) for k in ("key", "value")]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama__t_static", "the sequence length is fixed: export with dynamic shapes"),
        ("bert__t_dyn", "an attention that is not causal: no decoder"),
        ("vit__t_dyn", "an attention that is not causal: no decoder"),
    ],
)
def test_declined(lab: Any, name: str, reason: str) -> None:
    model = lab.load(name)
    declined = lab.apply(model, lab.canonical)
    assert [d.reason for d in declined if d.pass_name == "kv-memory"] == [reason]
    assert all(not v.name.startswith("past") for v in model.graph.inputs)


@pytest.mark.parametrize("path", ["data/stories260K/model.onnx"])
def test_stories(lab: Any, path: str) -> None:
    model = lab.load(lab.shared / path)
    feeds = _feeds(model, _ids(batch=1))
    wanted = lab.run(model, feeds)[model.graph.outputs[0].name]
    lab.apply(model, lab.canonical)
    got = _decode(lab, model, feeds, [2, 3, 7])
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=3e-5)


def test_bard_and_its_own_memory_are_the_same_model(lab: Any) -> None:
    """models/bard is shipped with and without memory; both come out equal."""
    plain = lab.load(lab.repository / "models" / "bard" / "model.onnx")
    remembering = lab.load(lab.repository / "models" / "bard" / "model_kv.onnx")
    feeds = _feeds(plain, _ids())
    wanted = lab.run(plain, feeds)[plain.graph.outputs[0].name]
    for model in (plain, remembering):
        lab.apply(model, lab.canonical)
        got = _decode(lab, model, feeds, [3, 4, 7])
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)
    assert lab.counts(plain) == lab.counts(remembering)


def test_a_sink_is_not_remembered(lab: Any) -> None:
    """gpt-oss: memory of whole keys, a window in one layer, and the sinks kept."""
    model = lab.load("gpt_oss__h_dyn")
    feeds = _feeds(model, np.random.default_rng(3).integers(0, 100, (BATCH, 11)))
    wanted = lab.run(model, feeds)["logits"]
    lab.apply(model, lab.canonical)
    nodes = [n for n in model.graph if n.op_type == "Attention"]
    assert [n.metadata_props.get("pfmc.window") for n in nodes] == ["8", None]
    assert all(n.metadata_props["pfmc.sink"] == "1" for n in nodes)
    for cuts in ([11], [1, 2, 3, 9, 10, 11]):
        np.testing.assert_allclose(_decode(lab, model, feeds, cuts), wanted, rtol=1e-5, atol=1e-5)


def test_a_memory_with_sinks_that_is_there_gets_its_names(lab: Any) -> None:
    model = lab.load("gpt_oss__h_gen__decode")
    lab.apply(model, lab.canonical)
    names = [v.name for v in model.graph.inputs if v.name.startswith("past_key")]
    assert names == [f"past_key_values.{i}.{k}" for i in (0, 1) for k in ("key", "value")]
    assert {n.replace("past_key_values", "present") for n in names} <= {
        v.name for v in model.graph.outputs
    }


@pytest.mark.parametrize("name", ["bart__h_gen__decode", "bart__h_gen__prefill", "t5__h_dyn"])
def test_own_and_cross_memories_have_names_of_their_own(lab: Any, name: str) -> None:
    """The encoder's keys are read, never written again, by a later step."""
    model = lab.load(name)
    lab.apply(model, lab.canonical)
    wanted = [
        f"{part}.{side}.{k}"
        for side in ("decoder", "encoder") for part in (0, 1) for k in ("key", "value")
    ]  # fmt: skip
    outputs = [v.name for v in model.graph.outputs if v.name.startswith("present")]
    assert outputs == [f"present.{w}" for w in wanted]
    inputs = [v.name for v in model.graph.inputs if v.name.startswith("past")]
    assert inputs == ([f"past_key_values.{w}" for w in wanted] if "decode" in name else [])


def test_a_sequence_that_is_named_as_the_memory_would_be(lab: Any) -> None:
    """They are not of one length: the memory's gets a number."""
    model = lab.load("llama__ts")
    for value in model.graph.inputs:
        value.shape = ir.Shape([value.shape[0], "past"])
    lab.apply(model, lab.canonical)
    shapes = {v.name: [str(d) for d in v.shape] for v in model.graph.inputs}
    assert shapes["input_ids"][1] == "past"
    assert shapes["past_key_values.0.key"][2] == "past1"
