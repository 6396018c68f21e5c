"""Text generation with an encoder-decoder: a source is read, a text is written about it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from pfmc.distill.drive import find_logits
from pfmc.distill.sampling import Sampling
from pfmc.distill.student import Student
from pfmc.distill.text import Tokenizer
from pfmc.errors import UsageError

IDS = "decoder_input_ids"
_HALVES = ("encoder_outputs", "encoder_hidden")
Source = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Pair:
    """The inputs and outputs of an encoder-decoder in one graph.

    Attributes:
        ids: input of the decoder's tokens ``[batch, positions]``.
        length: fixed number of the decoder's positions, or None.
        sources: inputs that the encoder reads; the first is the source itself.
        logits: output ``[batch, positions, vocabulary]``; vocabulary: number of tokens.
    """

    ids: str
    length: int | None
    sources: tuple[ir.Value, ...]
    logits: str
    vocabulary: int


def is_pair(model: ir.Model) -> bool:
    """Whether `model` holds a decoder that attends to an encoder, or one of its halves."""
    return any(IDS in str(v.name) or _is_half(v) for v in model.graph.inputs)


def _is_half(value: ir.Value) -> bool:
    return any(word in str(value.name) for word in _HALVES)


def detect_pair(model: ir.Model) -> Pair:
    """Finds out how an encoder-decoder is driven.

    Raises:
        UsageError: it is one of two halves in files of their own, or has no token scores.
    """
    inputs = list(model.graph.inputs)
    strange = [str(v.name) for v in inputs if _is_half(v) or "past" in str(v.name)]
    if strange:
        raise UsageError(
            "the model is the decoder's half of an encoder-decoder", where=f"inputs: {strange[0]}",
            mend="writing needs the encoder and the decoder in one file: export the whole model "
            "without a past (its inputs are the source and decoder_input_ids) and compile that; "
            "one step of this half runs with --input and all of its inputs",
        )  # fmt: skip
    ids = next((v for v in inputs if IDS in str(v.name)), None)
    masked = [v for v in inputs if "decoder" in str(v.name) and v is not ids]
    sources = [v for v in inputs if v is not ids and v not in masked]
    sources.sort(key=lambda v: "mask" in str(v.name))
    if ids is None or not sources or "mask" in str(sources[0].name):
        raise UsageError(
            "the model has no source and decoder_input_ids among its inputs",
            mend="export the whole encoder-decoder in one file",
        )
    if masked:
        raise UsageError(f"the input {str(masked[0].name)!r} is unknown to text generation")
    logits, vocabulary = find_logits(model.graph, None)
    dims = [d if isinstance(d, int) else d.value for d in ids.shape or ()]
    length = dims[1] if len(dims) == 2 and isinstance(dims[1], int) else None
    return Pair(str(ids.name), length, tuple(sources), logits, vocabulary)


class EncoderDecoder:
    """Writes with an encoder-decoder student.

    Every step computes the encoder and all of the decoder's positions again.

    Args:
        student: an encoder-decoder in one graph.
        tokenizer: for EOS; None if only ids are used.

    Raises:
        UsageError: see `detect_pair`.
    """

    def __init__(self, student: Student, tokenizer: Tokenizer | None = None) -> None:
        self.student, self.tokenizer = student, tokenizer
        self.pair = detect_pair(student.model)

    def source_of(self, ids: Sequence[int]) -> dict[str, np.ndarray]:
        """The encoder's inputs for one text; a mask hides what pads it to a fixed length.

        Raises:
            UsageError: the encoder reads no text, or the text does not fit.
        """
        first, *rest = self.pair.sources
        if first.dtype is None or not first.dtype.is_integer():
            raise UsageError(
                f"the encoder reads {str(first.name)!r}, not text",
                mend="give it with --input FILE.npz",
            )
        dims = [d if isinstance(d, int) else None for d in first.shape or ()]
        length = (dims[1] if len(dims) == 2 else None) or len(ids)
        if len(ids) > length or (len(ids) < length and not rest):
            raise UsageError(
                f"{len(ids)} tokens for an encoder of a fixed length of {length}",
                mend="give a text that fits, or export with a free length",
            )
        batch = (dims[0] if dims else None) or 1
        row = np.zeros((batch, length), np.int64)
        row[:, : len(ids)] = list(ids)
        found = {str(first.name): row}
        for value in rest:
            seen = np.tile(np.arange(length) < len(ids), (batch, 1))
            kind = value.dtype.numpy() if value.dtype is not None else np.dtype(np.int64)
            found[str(value.name)] = seen.astype(kind)
        return found

    def generate(
        self,
        source: Source,
        start_ids: Sequence[int],
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        greedy: bool = False,
        seed: int = 0,
        stop_ids: Collection[int] | None = None,
    ) -> Iterator[int]:
        """Yields the new tokens of the first text in `source`, one by one.

        Args:
            source: the encoder's inputs by name; a mask that is left out shows everything.
            start_ids: tokens that the decoder starts with (``decoder_start_token_id`` and, for
                Whisper, the language and the task).
            max_new_tokens: at most so many; temperature, top_k, top_p, greedy: see `Sampling`.
            temperature: see `Sampling`.
            top_k: see `Sampling`.
            top_p: see `Sampling`.
            greedy: see `Sampling`.
            seed: the same seed gives the same text.
            stop_ids: tokens that end the text (themselves not yielded); None: the tokenizer's EOS.

        Raises:
            UsageError: an input is missing, or a start token is none.
        """
        if stop_ids is None:
            stop_ids = self.tokenizer.eos_ids if self.tokenizer is not None else ()
        bad = [t for t in start_ids if not 0 <= t < self.pair.vocabulary]
        if bad or not start_ids:
            raise UsageError(
                f"no start token within the vocabulary of {self.pair.vocabulary}",
                where=", ".join(map(str, bad)),
                mend="give decoder_start_token_id of the model's config.json",
            )
        feeds = self._complete(source)
        sampling = Sampling(temperature, top_k, top_p, greedy)
        return self._write(feeds, list(start_ids), max_new_tokens, sampling, seed, set(stop_ids))

    def _complete(self, source: Source) -> dict[str, np.ndarray]:
        found = dict(source)
        first = str(self.pair.sources[0].name)
        for value in self.pair.sources:
            name = str(value.name)
            if name in found:
                continue
            if "mask" not in name or first not in found:
                raise UsageError(f"the input {name!r} is missing")
            kind = value.dtype.numpy() if value.dtype is not None else np.dtype(np.int64)
            found[name] = np.ones(found[first].shape[:2], kind)
        return found

    def _write(
        self, feeds: dict[str, np.ndarray], ids: list[int], count: int, sampling: Sampling,
        seed: int, stop_ids: set[int],
    ) -> Iterator[int]:  # fmt: skip
        rng = np.random.default_rng(seed)
        for _ in range(count):
            scores = self._scores(feeds, ids)
            token = int(sampling.choose(scores[None, : self.pair.vocabulary], rng)[0])
            if token in stop_ids:
                return
            ids.append(token)
            yield token

    def _scores(self, feeds: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
        """Scores of the token after `ids`, ``[V]``; positions beyond `ids` are not seen."""
        rows, length = len(next(iter(feeds.values()))), self.pair.length or len(ids)
        if len(ids) > length:
            raise UsageError(
                f"{len(ids)} tokens do not fit the decoder's fixed length of {length}",
                mend="write fewer tokens, or export with a free length",
            )
        padded = np.zeros((rows, length), np.int64)
        padded[:, : len(ids)] = ids
        inputs: dict[str, Any] = {**feeds, self.pair.ids: padded}
        try:
            with torch.inference_mode():
                outputs = self.student(**inputs)
        except IndexError as error:
            raise UsageError(
                f"the model cannot hold {length} tokens: {error}", mend="write fewer tokens"
            ) from error
        found = outputs[self.pair.logits][0, len(ids) - 1].float().cpu().numpy()
        return np.asarray(found)
