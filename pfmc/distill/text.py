"""Tokenizers, token windows cut from text, and text that a model writes for itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pfmc.errors import FileError, InputError, UsageError

if TYPE_CHECKING:
    from pfmc.distill.generate import Decoder

TOKENIZER_FILE = "tokenizer.json"
_BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "[CLS]", "<|endoftext|>")
_EOS_NAMES = ("</s>", "<eos>", "<|end_of_text|>", "<|eot_id|>", "[SEP]", "<|endoftext|>")


@dataclass(frozen=True)
class Tokenizer:
    """A ``tokenizer.json`` and the ids that open and close a text.

    Attributes:
        bos_id: token that opens a text, or None.
        eos_ids: tokens that close a text.
    """

    inner: Any
    bos_id: int | None
    eos_ids: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self.inner.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`; `special` lets the tokenizer add what it adds (BOS …)."""
        return list(self.inner.encode(text, add_special_tokens=special).ids)

    def encode_lines(self, texts: Sequence[str], longest: int) -> list[list[int]]:
        """Token ids of each text, cut so that what the tokenizer adds at the end stays."""
        self.inner.enable_truncation(longest)
        lines = [list(e.ids) for e in self.inner.encode_batch(list(texts))]
        self.inner.no_truncation()
        return lines

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return str(self.inner.decode([int(i) for i in ids], skip_special_tokens=True))

    def stream(self, ids: Iterable[int], after: Iterable[int] = ()) -> Iterator[str]:
        """The text of `ids` piece by piece as they come; joined it continues the text `after`.

        A piece is held back while it ends in an unfinished UTF-8 character.
        """
        seen = [int(i) for i in after]
        told = self.decode(seen)
        for token in ids:
            seen.append(int(token))
            text = self.decode(seen)
            if text.endswith("\ufffd") or len(text) <= len(told):
                continue
            yield text[len(told) :]
            told = text
        rest = self.decode(seen)[len(told) :]
        if rest:
            yield rest


def find_tokenizer(model: Path, given: Path | None = None) -> Path | None:
    """The tokenizer file to use: `given` (a file or its folder), else the one beside `model`.

    Raises:
        FileError: `given` does not exist.
    """
    if given is not None:
        path = given / TOKENIZER_FILE if given.is_dir() else given
        if not path.is_file():
            raise FileError(f"no tokenizer at {path}", mend=f"give a {TOKENIZER_FILE}")
        return path
    folder = model if model.is_dir() else model.parent
    path = folder / TOKENIZER_FILE
    return path if path.is_file() else None


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads ``tokenizer.json`` and, for BOS and EOS, the ``config.json`` files beside it.

    Raises:
        InputError: the file is not a tokenizer.
    """
    from tokenizers import Tokenizer as Inner

    try:
        inner = Inner.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"cannot read {path.name}: {error.strerror}", where=str(path)) from error
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{path.name} is not a tokenizer: {error}", where=str(path)) from error
    inner.no_padding()  # files of sentence encoders ask for both, and we cut and pad ourselves
    inner.no_truncation()
    settings = _settings(path.parent)
    bos = settings.get("bos_token_id")
    eos = settings.get("eos_token_id")
    named_eos = [i for i in (inner.token_to_id(n) for n in _EOS_NAMES) if i is not None][:1]
    named_bos = [i for i in (inner.token_to_id(n) for n in _BOS_NAMES) if i is not None][:1]
    eos_ids = named_eos if eos is None else (eos if isinstance(eos, list) else [eos])
    first = bos if isinstance(bos, int) else (named_bos[0] if named_bos else None)
    return Tokenizer(inner, first, tuple(eos_ids))


def _settings(folder: Path) -> dict[str, Any]:
    """``config.json`` overlaid by ``generation_config.json``; empty if there are none."""
    found: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{name} is not JSON: {error}", where=str(path)) from error
        found.update({k: v for k, v in content.items() if v is not None})
    return found


def windows(
    ids: Iterable[int], length: int, count: int | None = None, bos_id: int | None = None
) -> np.ndarray:
    """Cuts a token stream into windows.

    Args:
        ids: the tokens of a text.
        length: tokens a window, the leading BOS included.
        count: at most so many windows, spread evenly over the text; None for all.
        bos_id: put before each window if given.

    Returns:
        int64 ``[N, length]``; the tail that does not fill a window is left out.

    Raises:
        UsageError: the text does not fill one window.
    """
    stream = np.fromiter(ids, dtype=np.int64)
    body = length - (bos_id is not None)
    if body < 1 or len(stream) < body:
        raise UsageError(
            f"the text has {len(stream)} tokens and does not fill one window of {length}",
            mend="give more text or shorter windows",
        )
    cut = stream[: len(stream) // body * body].reshape(-1, body)
    if count is not None and count < len(cut):
        cut = cut[np.arange(count) * len(cut) // count]
    if bos_id is None:
        return cut
    return np.concatenate([np.full((len(cut), 1), bos_id, dtype=np.int64), cut], axis=1)


def windows_of_file(
    path: Path, tokenizer: Tokenizer, length: int, count: int | None = None
) -> np.ndarray:
    """The windows of a text file, or of every ``.txt`` file of a folder; none spans two files.

    Each is opened by the tokenizer's BOS if it has one.

    Raises:
        FileError: it cannot be read. InputError: it is no text.
        UsageError: no file fills one window.
    """
    if not path.is_dir():
        return windows(_tokens(path, tokenizer), length, count, tokenizer.bos_id)
    body = length - (tokenizer.bos_id is not None)
    texts = [_tokens(p, tokenizer) for p in sorted(path.glob("*.txt"))]
    whole = [windows(ids, length, None, tokenizer.bos_id) for ids in texts if len(ids) >= body]
    if not whole:
        raise UsageError(
            f"no .txt file here fills one window of {length} tokens", where=str(path),
            mend="give longer texts or shorter windows",
        )  # fmt: skip
    cut = np.concatenate(whole)
    few = count is not None and count < len(cut)
    return cut[np.arange(count) * len(cut) // count] if few and count else cut


def _tokens(path: Path, tokenizer: Tokenizer) -> list[int]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise FileError(f"cannot read {path.name}: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name} is not UTF-8 text", where=str(path)) from error
    return tokenizer.encode(text, special=False)


def self_generated(
    decoder: Decoder, count: int, length: int, seed: int = 0, batch: int = 32
) -> np.ndarray:
    """A corpus that the model writes itself, for calibration when the user gives no text.

    Each window opens with the tokenizer's BOS, or with a random token where there is none, and is
    sampled at temperature 1 (LLM-QAT, arXiv:2305.17888, section 3.1).

    Args:
        decoder: drives the model.
        count: windows.
        length: tokens a window.
        seed: the same seed gives the same corpus.
        batch: windows at a time.

    Returns:
        int64 ``[count, length]``.
    """
    rng = np.random.default_rng(seed)
    bos = decoder.tokenizer.bos_id if decoder.tokenizer is not None else None
    if bos is None:
        opening = rng.integers(0, decoder.vocabulary, size=(count, 1))
    else:
        opening = np.full((count, 1), bos, dtype=np.int64)
    parts = []
    for first in range(0, count, batch):
        prompts = opening[first : first + batch]
        parts.append(decoder.sample(prompts, length - 1, seed=int(rng.integers(2**31))))
    return np.concatenate(parts)
