"""Text generation and scoring with a student, whether it has KV memory, free or fixed length."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfmc.distill.drive import Drive, detect
from pfmc.distill.measure import log_softmax
from pfmc.distill.sampling import Sampling
from pfmc.distill.student import Student
from pfmc.distill.text import Tokenizer
from pfmc.errors import UsageError

TOKENS_A_CALL = 4096
"""Tokens that `Decoder.logits` gives to the model at a time."""
ONE_THREAD_PRODUCTS = 1 << 28
"""Calls of no more products (weights times tokens) run on one thread: about 10 ms of work, cut
into pieces so small that threads waiting for each other cost more than they save."""


@contextmanager
def _threads_for(products: int) -> Iterator[None]:
    """As many torch threads as a call of so many products is worth."""
    before = torch.get_num_threads()
    if before == 1 or products > ONE_THREAD_PRODUCTS:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Session:
    """The state of one batch of growing texts: feed tokens, get the scores of the next.

    Args:
        student: the model.
        drive: how it is driven.
        batch: texts side by side.
    """

    def __init__(self, student: Student, drive: Drive, batch: int) -> None:
        self.student, self.drive, self.batch = student, drive, batch
        held = [t for m in student.linears.values() for t in (*m.parameters(), *m.buffers())]
        self.weights = sum(t.numel() for t in held)
        self.ids = np.zeros((batch, 0), dtype=np.int64)

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """Appends ``ids[B, n]``; returns the scores at the new positions, ``[B, n, V]`` float32.

        With KV memory only the new tokens are computed; otherwise the whole text again.
        """
        before = self.ids.shape[1]
        self.ids = np.concatenate([self.ids, ids], axis=1)
        outputs = self._call(self.ids, 0, self.ids.shape[1])
        return _numpy(outputs[self.drive.logits])[:, before:]

    def _call(self, ids: np.ndarray, past: int, held: int, **memory: Tensor) -> dict[str, Tensor]:
        """Runs the model on ``ids[B, n]`` after `past` others; the first `held` of all are real."""
        drive, (batch, count) = self.drive, ids.shape
        inputs: dict[str, Any] = {drive.ids: ids, **memory}
        if drive.mask:
            seen = np.tile(np.arange(past + count) < held, (batch, 1))
            inputs[drive.mask] = seen.astype(np.float32 if drive.mask_float else np.int64)
        if drive.positions:
            inputs[drive.positions] = np.tile(np.arange(past, past + count), (batch, 1))
        if drive.types:
            inputs[drive.types] = np.zeros((batch, count), dtype=np.int64)
        try:
            with _threads_for(self.weights * batch * count):
                outputs: dict[str, Tensor] = self.student(**inputs)
        except (IndexError, RuntimeError, ValueError) as error:  # a table too short
            if isinstance(error, RuntimeError) and "must match" not in str(error):
                raise
            raise UsageError(
                f"the model cannot hold {past + count} tokens: {error}", mend="shorten the text"
            ) from error
        return outputs


class WindowSession(Session):
    """A graph of fixed length: padded on the right, and sliding once the window is full."""

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """See `Session.feed`; at most a window of new tokens."""
        length = self.drive.length or 1
        self.ids = np.concatenate([self.ids, ids], axis=1)[:, -length:]
        held, new = self.ids.shape[1], ids.shape[1]
        padded = np.zeros((self.batch, length), dtype=np.int64)
        padded[:, :held] = self.ids
        outputs = self._call(padded, 0, held)
        return _numpy(outputs[self.drive.logits])[:, held - new : held]


class MemorySession(Session):
    """A graph with KV memory: only the new tokens are computed."""

    def __init__(self, student: Student, drive: Drive, batch: int) -> None:
        super().__init__(student, drive, batch)
        device = next((b.device for b in student.buffers()), torch.device("cpu"))
        self.memory = {
            m.past: torch.zeros((batch, m.heads, 0, m.width), dtype=student.dtype, device=device)
            for m in drive.memories
        }

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """See `Session.feed`."""
        length = self.drive.length or ids.shape[1]
        if ids.shape[1] % length:
            raise UsageError(
                f"{ids.shape[1]} tokens for a graph that takes {length} at a time",
                mend="export the decoder with one token a call, or with a free length",
            )
        return np.concatenate(
            [self._step(ids[:, i : i + length]) for i in range(0, ids.shape[1], length)], axis=1
        )

    def _step(self, ids: np.ndarray) -> np.ndarray:
        past = self.ids.shape[1]
        outputs = self._call(ids, past, past + ids.shape[1], **self.memory)
        self.memory = {m.past: outputs[m.present] for m in self.drive.memories}
        self.ids = np.concatenate([self.ids, ids], axis=1)
        return _numpy(outputs[self.drive.logits])


def _numpy(scores: Tensor) -> np.ndarray:
    return np.asarray(scores.detach().float().cpu().numpy())


class Decoder:
    """Generates and scores text with a student.

    Args:
        student: a language model.
        tokenizer: for BOS and EOS; None if only ids are used.

    Attributes:
        drive: how the model is driven, found from its graph.
        vocabulary: number of tokens.

    Raises:
        UsageError: the student is not a language model.
    """

    def __init__(self, student: Student, tokenizer: Tokenizer | None = None) -> None:
        self.student, self.tokenizer = student, tokenizer
        self.drive = detect(student.model)
        self.vocabulary = self.drive.vocabulary

    # -- generation ---------------------------------------------------------------------------

    def generate(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        greedy: bool = False,
        seed: int = 0,
        stop_ids: Collection[int] | None = None,
    ) -> Iterator[int]:
        """Yields new tokens one by one, as soon as each is known.

        Args:
            prompt_ids: at least one token.
            max_new_tokens: at most so many.
            temperature: see `Sampling`, as are top_k, top_p and greedy.
            top_k: see `Sampling`.
            top_p: see `Sampling`.
            greedy: see `Sampling`.
            seed: the same seed gives the same text.
            stop_ids: tokens that end the text (themselves not yielded); None: the tokenizer's EOS.

        Raises:
            UsageError: the prompt is empty, holds an unknown token or does not fit.
        """
        sampling = Sampling(temperature, top_k, top_p, greedy)
        prompt = self.check(np.asarray([list(prompt_ids)], dtype=np.int64))
        if stop_ids is None:
            stop_ids = self.tokenizer.eos_ids if self.tokenizer is not None else ()
        return self._generate(prompt, max_new_tokens, sampling, seed, frozenset(stop_ids))

    def _generate(
        self,
        prompt: np.ndarray,
        count: int,
        sampling: Sampling,
        seed: int,
        stop_ids: frozenset[int],
    ) -> Iterator[int]:
        rng = np.random.default_rng(seed)
        for chosen in self._tokens(prompt, count, sampling, rng):
            token = int(chosen[0])
            if token in stop_ids:
                return
            yield token

    def sample(self, prompts: np.ndarray, max_new_tokens: int, seed: int = 0) -> np.ndarray:
        """Continues ``prompts[B, P]`` at temperature 1 without stopping: int64 ``[B, P + n]``."""
        prompts = self.check(np.asarray(prompts, dtype=np.int64))
        rng = np.random.default_rng(seed)
        made = []
        for part in self._batches(prompts):
            new = list(self._tokens(part, max_new_tokens, Sampling(), rng))
            made.append(np.concatenate([part, *(t[:, None] for t in new)], axis=1))
        return np.concatenate(made)[: len(prompts)]

    def _tokens(
        self, prompts: np.ndarray, count: int, sampling: Sampling, rng: np.random.Generator
    ) -> Iterator[np.ndarray]:
        real, prompts = len(prompts), self._fill(prompts)
        session, fed = self.session(len(prompts)), prompts
        for _ in range(count):
            with torch.inference_mode():
                scores = session.feed(fed)[:real, -1, : self.vocabulary]
            chosen = sampling.choose(scores, rng)
            yield chosen
            fed = self._fill(chosen[:, None])

    # -- scoring ------------------------------------------------------------------------------

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Scores of the next token at every position: float32 ``[B, S, V]`` from ``ids[B, S]``."""
        ids = self.check(np.asarray(ids, dtype=np.int64))
        made = []
        for part in self._batches(ids):
            filled = self._fill(part)
            with torch.inference_mode():
                made.append(self.session(len(filled)).feed(filled)[: len(part)])
        return np.concatenate(made)

    def loglikelihood(self, ids: np.ndarray) -> np.ndarray:
        """Log probability of each token after the first, nats: float64 ``[B, S - 1]``."""
        made = []
        for part in self._batches(np.asarray(ids, dtype=np.int64)):
            logs = log_softmax(self.logits(part)[:, :-1])
            made.append(np.take_along_axis(logs, part[:, 1:, None], axis=-1)[..., 0])
        return np.concatenate(made)

    # -- helpers ------------------------------------------------------------------------------

    def session(self, batch: int) -> Session:
        """A fresh session for `batch` texts."""
        kind: Callable[[Student, Drive, int], Session] = Session
        if self.drive.memories:
            kind = MemorySession
        elif self.drive.length is not None:
            kind = WindowSession
        return kind(self.student, self.drive, batch)

    def check(self, ids: np.ndarray) -> np.ndarray:
        """Returns ``ids[B, S]`` if the model can read them.

        Raises:
            UsageError: empty, a token out of range, or longer than a fixed window.
        """
        if ids.ndim != 2 or ids.size == 0:
            raise UsageError("the prompt is empty", mend="give at least one token")
        bad = ids[(ids < 0) | (ids >= self.vocabulary)]
        if bad.size:
            raise UsageError(
                f"token {int(bad[0])} is outside the vocabulary of {self.vocabulary}",
                mend="use the model's own tokenizer",
            )
        limit = None if self.drive.memories else self.drive.length
        if limit is not None and ids.shape[1] > limit:
            raise UsageError(
                f"{ids.shape[1]} tokens do not fit the model's fixed window of {limit}",
                mend="shorten the text, or export the model with a free length",
            )
        return ids

    def _fill(self, ids: np.ndarray) -> np.ndarray:
        """`ids` with its last row repeated up to the graph's fixed batch."""
        missing = (self.drive.batch or 0) - len(ids)
        if missing <= 0:
            return ids
        return np.concatenate([ids, np.repeat(ids[-1:], missing, axis=0)])

    def _batches(self, ids: np.ndarray) -> list[np.ndarray]:
        rows = self.drive.batch or max(1, TOKENS_A_CALL // max(1, ids.shape[1]))
        return [ids[i : i + rows] for i in range(0, len(ids), rows)]
