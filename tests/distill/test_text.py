"""Tokenizers, windows and self-written text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers

from pfmc.distill.generate import Decoder
from pfmc.distill.student import Student
from pfmc.distill.text import (
    find_tokenizer,
    load_tokenizer,
    self_generated,
    windows,
    windows_of_file,
)
from pfmc.errors import FileError, InputError, UsageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A byte tokenizer of 258 tokens: <s>, </s>, then the bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {w: i for i, w in enumerate(["<s>", "</s>", *letters])}
    inner = Inner(models.BPE(vocab=words, merges=[]))
    inner.add_special_tokens(["<s>", "</s>"])
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_a_tokenizer_is_found_beside_the_model_or_where_told(folder: Path, tmp_path: Path) -> None:
    assert find_tokenizer(folder / "model.onnx") == folder / "tokenizer.json"
    assert find_tokenizer(Path("elsewhere/model.onnx"), folder) == folder / "tokenizer.json"
    assert find_tokenizer(tmp_path / "none" / "model.onnx") is None
    with pytest.raises(FileError, match="no tokenizer"):
        find_tokenizer(folder, tmp_path / "none.json")


def test_opening_and_closing_tokens(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.size) == (0, (1,), 258)
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 7, "eos_token_id": 8}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (7, (8, 9))


def test_broken_tokenizers_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="not a tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_streaming_never_splits_a_character(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    text = "naïve — 文字 ✓"
    ids = tokenizer.encode(text)
    pieces = list(tokenizer.stream(ids[2:], after=ids[:2]))
    assert "".join(pieces) == text[2:]
    assert all("\ufffd" not in piece for piece in pieces)
    assert len(pieces) == len(text) - 2


def test_windows() -> None:
    cut = windows(range(10), 3)
    assert cut.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert windows(range(10), 3, count=2).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert windows(range(5), 3, bos_id=9).tolist() == [[9, 0, 1], [9, 2, 3]]
    with pytest.raises(UsageError, match="does not fill one window"):
        windows(range(2), 3)


def test_windows_of_a_file(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    (folder / "text.txt").write_text("abcdef" * 10, encoding="utf-8")
    cut = windows_of_file(folder / "text.txt", tokenizer, 16, count=3)
    assert cut.shape == (3, 16)
    assert (cut[:, 0] == 0).all()
    assert tokenizer.decode(cut[0]) == "abcdefabcdefabc"
    (folder / "bad.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        windows_of_file(folder / "bad.txt", tokenizer, 16)
    with pytest.raises(FileError, match="cannot read"):
        windows_of_file(folder / "none.txt", tokenizer, 16)


def test_self_written_text_is_seeded_and_follows_the_model(
    canonical_llama: Callable[..., ir.Model],
) -> None:
    plain = Decoder(Student(canonical_llama()))
    memory = Decoder(Student(canonical_llama(memory=True)))
    one = self_generated(plain, 6, 12, seed=3, batch=4)
    assert one.shape == (6, 12)
    assert one.dtype == np.int64
    np.testing.assert_array_equal(one, self_generated(memory, 6, 12, seed=3, batch=4))
    assert not np.array_equal(one, self_generated(plain, 6, 12, seed=4, batch=4))
    many = self_generated(plain, 64, 12, seed=0)
    noise = np.random.default_rng(0).integers(0, 32, many.shape)
    assert plain.loglikelihood(many).mean() > plain.loglikelihood(noise).mean() + 0.5
