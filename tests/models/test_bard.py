"""The pretrained model on the shelf: its files agree with each other and with its card."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SHELF = REPOSITORY / "models"
BARD = SHELF / "bard"
CORPUS = REPOSITORY.parent / "shared" / "data" / "tinyshakespeare.txt"
GRAPHS = ("model.onnx", "model_kv.onnx")
PROMPT = "ROMEO:\nBut soft, what light through yonder window breaks?\n"


def load_evaluate() -> ModuleType:
    """Import models/bard/evaluate.py, which is no part of a package, under a name of its own."""
    spec = importlib.util.spec_from_file_location("bard_evaluate", BARD / "evaluate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


evaluate = load_evaluate()


@pytest.fixture(scope="module")
def card() -> dict[str, Any]:
    return tomllib.loads((SHELF / "bard.toml").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return evaluate.open_tokenizer(BARD / "tokenizer.json")


@pytest.fixture(scope="module")
def plain() -> Any:
    return evaluate.open_session(BARD / "model.onnx")


@pytest.fixture(scope="module")
def cached() -> Any:
    return evaluate.open_session(BARD / "model_kv.onnx")


@pytest.fixture(scope="module")
def prompt(tokenizer: Any) -> np.ndarray:
    return np.array([tokenizer.encode(PROMPT).ids], np.int64)


def test_cached_graph_equals_plain_graph_token_by_token(
    plain: Any, cached: Any, prompt: np.ndarray
) -> None:
    wanted = evaluate.logits(plain, prompt)
    np.testing.assert_allclose(evaluate.token_by_token(cached, prompt), wanted, atol=1e-4)


def test_cached_graph_takes_a_prompt_at_once_and_a_batch(
    plain: Any, cached: Any, prompt: np.ndarray
) -> None:
    batch = np.concatenate([prompt, prompt[:, ::-1]])
    cut = prompt.shape[1] // 2
    wanted = evaluate.logits(plain, batch)
    first, cache = evaluate.cached_logits(cached, batch[:, :cut], evaluate.empty_cache(cached, 2))
    rest, cache = evaluate.cached_logits(cached, batch[:, cut:], cache)
    np.testing.assert_allclose(np.concatenate([first, rest], axis=1), wanted, atol=1e-4)
    assert {tensor.shape[2] for tensor in cache} == {prompt.shape[1]}


def test_cache_names(cached: Any, card: dict[str, Any]) -> None:
    layers = range(card["architecture"]["layers"])
    parts = [f"{layer}.{part}" for layer in layers for part in ("key", "value")]
    inputs = [i.name for i in cached.get_inputs()]
    outputs = [o.name for o in cached.get_outputs()]
    assert inputs == ["input_ids", *(f"past_key_values.{part}" for part in parts)]
    assert outputs == ["logits", *(f"present.{part}" for part in parts)]


def test_files_of_the_card_exist_and_are_small(card: dict[str, Any]) -> None:
    assert all((SHELF / path).is_file() for path in card["files"].values())
    assert sum(path.stat().st_size for path in BARD.iterdir() if path.is_file()) <= 8 * 2**20


def test_weights_are_stored_once(card: dict[str, Any]) -> None:
    """The data file holds every parameter once in float32, and nothing else but padding."""
    stored = (BARD / "model.data").stat().st_size / 4
    assert card["architecture"]["parameters"] <= stored
    assert stored < card["architecture"]["parameters"] + 1024


def test_both_graphs_read_the_same_weights() -> None:
    def places(name: str) -> set[tuple[str, str]]:
        model = onnx.load(BARD / name, load_external_data=False)
        external = [
            dict((e.key, e.value) for e in t.external_data) for t in model.graph.initializer
        ]
        return {(e["location"], e["offset"]) for e in external if e}

    assert places("model.onnx") == places("model_kv.onnx")


@pytest.mark.parametrize("name", GRAPHS)
def test_parameter_count_of_the_card(name: str, card: dict[str, Any]) -> None:
    model = onnx.load(BARD / name)
    external = [t for t in model.graph.initializer if len(t.raw_data) >= 512]
    assert sum(int(np.prod(t.dims)) for t in external) == card["architecture"]["parameters"]


@pytest.mark.parametrize("name", GRAPHS)
def test_format_versions(name: str) -> None:
    model = onnx.load(BARD / name, load_external_data=False)
    assert model.ir_version <= 13
    assert {o.domain: o.version <= 24 for o in model.opset_import} == {"": True}


@pytest.mark.parametrize("name", GRAPHS)
def test_graph_keeps_scopes_and_no_paths(name: str) -> None:
    data = (BARD / name).read_bytes()
    assert b"model.layers.5.self_attn.q_proj" in data
    assert not re.findall(
        rb"(?:^|[\s\"'(])/[A-Za-z0-9_.-]+/|site-packages|\.py\b|stack_trace", data
    )


def test_vocabulary_of_the_card(card: dict[str, Any], tokenizer: Any, plain: Any) -> None:
    vocabulary = card["architecture"]["vocabulary"]
    assert tokenizer.get_vocab_size() == vocabulary
    assert plain.get_outputs()[0].shape[-1] == vocabulary
    assert tokenizer.token_to_id("<s>") == card["tokens"]["bos_id"]
    assert tokenizer.token_to_id("</s>") == card["tokens"]["eos_id"]


def test_config_agrees_with_the_card(card: dict[str, Any]) -> None:
    config = json.loads((BARD / "config.json").read_text())
    names = {
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "ffn": "intermediate_size",
        "vocabulary": "vocab_size",
        "context": "max_position_embeddings",
        "tied": "tie_word_embeddings",
    }
    assert {k: card["architecture"][k] for k in names} == {k: config[v] for k, v in names.items()}


def test_tokenizer_gives_every_byte_back(tokenizer: Any) -> None:
    text = "\n".join(["JULIET:\nO Romeo!", "\u00e9\u4e16 \t~", PROMPT])
    ids = tokenizer.encode(text).ids
    assert ids[0] == evaluate.BOS_ID
    assert tokenizer.decode(ids) == text


def test_sample_is_dialogue() -> None:
    text = (BARD / "sample.txt").read_text()
    assert len(re.findall(r"(?:^|\n\n)[A-Z][A-Za-z ]+:\n", text)) >= 3
    assert max(map(len, text.splitlines())) < 80


def test_sample_comes_from_the_files(plain: Any, tokenizer: Any, card: dict[str, Any]) -> None:
    text = evaluate.sample(plain, tokenizer, card["samples"]["prompts"][0], 40, 0.8, 1)
    assert (BARD / "sample.txt").read_text().startswith(text)


def test_one_default_card_and_names_match_files() -> None:
    cards = {path.stem: tomllib.loads(path.read_text()) for path in SHELF.glob("*.toml")}
    assert [name for name, card in cards.items() if card.get("default")] == ["bard"]
    assert {name: card["name"] for name, card in cards.items()} == {name: name for name in cards}
    assert all(card["source"] for card in cards.values())


def dense_parameters(a: dict[str, Any]) -> int:
    """Count the weights of a dense Llama or GPT-2 from the numbers of its card."""
    hidden, inner, kv = a["hidden"], a["heads"] * a["head_dim"], a["kv_heads"] * a["head_dim"]
    attention = 2 * hidden * inner + 2 * hidden * kv
    head = 0 if a["tied"] else a["vocabulary"] * hidden
    if a["family"] == "gpt2":
        biases, norms = 5 * hidden + a["ffn"], 4 * hidden
        layer = attention + 2 * hidden * a["ffn"] + biases + norms
        return (a["vocabulary"] + a["context"]) * hidden + a["layers"] * layer + 2 * hidden + head
    layer = attention + 3 * hidden * a["ffn"] + 2 * hidden
    return a["vocabulary"] * hidden + a["layers"] * layer + hidden + head


@pytest.mark.parametrize("name", ["bard", "gpt2", "llama-3.1-8b"])
def test_parameter_count_follows_from_the_architecture(name: str) -> None:
    architecture = tomllib.loads((SHELF / f"{name}.toml").read_text())["architecture"]
    assert dense_parameters(architecture) == architecture["parameters"]


@pytest.mark.skipif(not CORPUS.is_file(), reason="the corpus is not stored in the repository")
def test_held_out_slice_perplexity(plain: Any, tokenizer: Any, card: dict[str, Any]) -> None:
    data = CORPUS.read_bytes()
    assert hashlib.sha256(data).hexdigest() == card["corpus"]["sha256"]
    _, held_out = evaluate.split(data.decode("ascii"))
    quality = card["quality"]
    score = evaluate.score(plain, tokenizer, held_out, quality["heldout_slice_tokens"])
    assert score.perplexity == pytest.approx(quality["heldout_slice_perplexity"], rel=0.02)
