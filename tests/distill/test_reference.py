"""Transformers as the outside truth: the manners of an oracle, and clear words when it cannot."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from pfmc.distill.reference import Reference
from pfmc.errors import InputError

IDS = np.asarray([[3, 4, 5, 6]])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=32, max_position_embeddings=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_observed_modules_give_their_outputs(llama: Path) -> None:
    """The head's output is the logits; an empty KV memory is not asked for."""
    empty = np.zeros((1, 2, 0, 8), np.float32)
    with Reference(llama, observe=["lm_head", "model.layers.0.mlp.up_proj"]) as reference:
        found = reference.run({"input_ids": IDS, "past_key_values.0.key": empty})
    assert found["model.layers.0.mlp.up_proj"].shape == (1, 4, 24)
    np.testing.assert_array_equal(found["lm_head"], found["logits"])


def test_the_environment_is_left_as_it_was(llama: Path) -> None:
    before = dict(os.environ)
    with Reference(llama) as reference:
        reference.run({"input_ids": IDS})
    assert dict(os.environ) == before


def test_an_unknown_module_is_named(llama: Path) -> None:
    with pytest.raises(InputError, match="no module"), Reference(
        llama, observe=["model.nothing"]
    ):
        pass


def test_an_unknown_architecture_is_refused(llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Nothing"]}))
    with pytest.raises(InputError, match="transformers refuses"), Reference(tmp_path):
        pass
