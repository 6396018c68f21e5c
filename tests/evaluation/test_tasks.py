"""Tasks by hand: sentences in any order and length, pooled, ranked and compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Inner
from tokenizers import models, pre_tokenizers, processors

from pfmc.distill.text import Tokenizer, load_tokenizer
from pfmc.errors import UsageError
from pfmc.evaluation.tasks import Embedding, Pairs, padded

INPUTS = ("input_ids", "attention_mask")
WORDS = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "b": 4, "c": 5}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """Words between [CLS] and [SEP]; its file asks for padding to 9 and truncation at 4."""
    inner = Inner(models.WordLevel(WORDS, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    inner.enable_padding(length=9)
    inner.enable_truncation(4)
    inner.save(str(tmp_path / "tokenizer.json"))
    return load_tokenizer(tmp_path / "tokenizer.json")


class Powers:
    """Token vectors (t, t², 1)."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        ids = feeds["input_ids"]
        return {"y": np.stack([ids, ids**2, np.ones_like(ids)], axis=-1).astype(np.float32)}


def made(tokenizer: Tokenizer, *sentences: str, longest: int = 9) -> Embedding:
    scores = np.arange(len(sentences) // 2, dtype=float)
    return Embedding(Pairs(sentences, scores), tokenizer, longest, INPUTS, "y", "")


def test_a_tokenizer_that_asks_for_padding_is_not_obeyed(tokenizer: Tokenizer) -> None:
    """MiniLM's file pads to 128: its padding was taken for words."""
    assert tokenizer.encode("a b c a b") == [1, 3, 4, 5, 3, 4, 2]
    assert tokenizer.encode_lines(["a b c a b", "a"], 4) == [[1, 3, 4, 2], [1, 3, 2]]
    assert tokenizer.encode("a b c a b") == [1, 3, 4, 5, 3, 4, 2]


def test_embeddings_are_means_of_real_tokens_in_the_sentences_order(tokenizer: Tokenizer) -> None:
    task = made(tokenizer, "c c c c", "a", "b c", *(["c b a"] * 17))
    task.prepare(Powers())
    ids = ([1, 5, 5, 5, 5, 2], [1, 3, 2], [1, 4, 5, 2], [1, 5, 4, 3, 2])
    wanted = np.array([[np.mean(i), np.mean(np.square(i)), 1] for i in ids])
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(task.truth[:4], wanted, atol=1e-7)
    np.testing.assert_allclose(task.truth[4:], task.truth[3:-1], atol=1e-15)


def test_judged_by_rank_and_by_cosine(tokenizer: Tokenizer) -> None:
    task = made(tokenizer, *"abcabc")
    angles = np.array([0.0, 1.5, 0.0, 0.7, 0.0, 0.1])
    task.truth = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    similar = np.cos(angles[1::2])
    for measured in (task.of_source(), {"cosine": np.cos(2 * angles), "similarity": similar}):
        found = {f.name: f.value for f in task.figures([measured])}
        assert found["Spearman's rho"] == pytest.approx(1.0)
        assert found["Spearman's rho less the source's"] == pytest.approx(0.0)
        assert found["cosine to the source's embedding"] == pytest.approx(
            measured["cosine"].mean()
        )


def test_an_input_that_sentences_do_not_tell() -> None:
    found = padded([[7], [8, 9]], ("ids", "mask", "token_type"))
    assert found["mask"].tolist() == [[1, 0], [1, 1]]
    assert not found["token_type"].any()
    with pytest.raises(UsageError, match="pixels"):
        padded([[7]], ("pixels",))
