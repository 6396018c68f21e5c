"""Tasks by hand: sentences in any order and length, pooled, ranked and compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Inner
from tokenizers import models, pre_tokenizers, processors

from pfmc.distill.measure import log_softmax
from pfmc.distill.text import Tokenizer, load_tokenizer
from pfmc.errors import InputError, UsageError
from pfmc.evaluation import tasks
from pfmc.evaluation.tasks import Embedding, Labelled, Pairs, padded, read_pairs

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
        assert found["cosine to the source's embedding"] == pytest.approx(measured["cosine"].mean())


def test_an_input_that_sentences_do_not_tell() -> None:
    found = padded([[7], [8, 9]], ("ids", "mask", "token_type"))
    assert found["mask"].tolist() == [[1, 0], [1, 1]]
    assert not found["token_type"].any()
    real = padded([[7], [8, 9]], ("input_ids", "token_type_ids", "segment_ids", "position_ids"))
    assert real["input_ids"].tolist() == [[7, 0], [8, 9]]
    assert not real["token_type_ids"].any(), "token ids were taken for types"
    assert not real["segment_ids"].any()
    assert real["position_ids"].tolist() == [[0, 1], [0, 1]]
    with pytest.raises(UsageError, match="pixels"):
        padded([[7]], ("pixels",))


@pytest.mark.parametrize("content", [b"nan\ta\tb\n", b"inf\ta\tb\n", b"1\ta\xff\tb\n"])
def test_pairs_that_are_no_numbers_or_no_text_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_bytes(content)
    with pytest.raises(InputError):
        read_pairs(tmp_path / "pairs.tsv")


def test_a_sentence_without_tokens_is_refused(tokenizer: Tokenizer) -> None:
    tokenizer.inner.post_processor = processors.Sequence([])
    with pytest.raises(InputError, match="no tokens") as caught:
        made(tokenizer, "a", "b", "c", "")
    assert caught.value.where == "pair 2"


# -- arrays ----------------------------------------------------------------------------------------


class Scores:
    """A source that answers with given scores."""

    def __init__(self, scores: np.ndarray) -> None:
        self.scores = scores

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"y": self.scores}


def labelled(
    truth: np.ndarray, ours: np.ndarray, labels: np.ndarray | None, monkeypatch: Any,
    **feeds: np.ndarray,
) -> tuple[Labelled, dict[str, np.ndarray]]:  # fmt: skip
    """The task, and what a part that answers `ours` measures."""
    monkeypatch.setattr(tasks, "machine_feeds", lambda machine, lead, feeds: feeds)
    task = Labelled([{"x": np.zeros(len(truth)), **feeds}], labels, "y", "")
    task.prepare(Scores(truth))
    part: Any = SimpleNamespace(run=lambda feeds: {"y": ours})
    return task, task.measure(part)


def test_every_position_is_judged_by_itself_and_hidden_ones_not_at_all(monkeypatch: Any) -> None:
    """One softmax over positions and classes together is no distribution of anything."""
    rng = np.random.default_rng(0)
    truth, ours = rng.normal(size=(2, 3, 4, 5))
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    _, found = labelled(truth, ours, None, monkeypatch, attention_mask=mask)
    p, q = log_softmax(truth), log_softmax(ours)
    kl = (np.exp(p) * (p - q)).sum(-1)
    for row, count in enumerate((4, 2, 1)):
        same = p[row, :count].argmax(-1) == q[row, :count].argmax(-1)
        assert found["kl"][row] == pytest.approx(kl[row, :count].mean())
        assert found["agree"][row] == pytest.approx(same.mean())
    with pytest.raises(UsageError, match="one row of class scores"):
        labelled(truth, ours, np.zeros(3, int), monkeypatch)


def test_no_interval_of_a_share_leaves_0_to_1(monkeypatch: Any) -> None:
    scores = np.eye(5)
    task, found = labelled(scores, scores, np.array([0, 1, 2, 3, 0]), monkeypatch)
    accuracy = task.figures([found])[0]
    assert (accuracy.name, accuracy.value, accuracy.high) == ("accuracy", 0.8, 1.0)
