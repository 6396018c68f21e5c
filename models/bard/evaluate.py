"""Measure and sample `bard` from its exported ONNX files; needs numpy, ONNX Runtime, tokenizers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from tokenizers import Tokenizer

CONTEXT: Final = 256  # tokens a window, the leading BOS included
BOS_ID: Final = 0
HELD_OUT: Final = 0.1  # of the characters of the corpus
SLICE_TOKENS: Final = 4096  # the start of the held-out text that the card's slice figure covers

Tokens = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Score:
    """A sum of negative log likelihoods and what it was summed over."""

    nats: float
    tokens: int
    characters: int

    @property
    def perplexity(self) -> float:
        """Perplexity a token."""
        return math.exp(self.nats / self.tokens)


def split(text: str) -> tuple[str, str]:
    """Cut a corpus into (train, held out); the held-out part is the end of the text."""
    cut = round(len(text) * (1 - HELD_OUT))
    return text[:cut], text[cut:]


def open_session(path: Path) -> ort.InferenceSession:
    """Open an ONNX file on one CPU thread with basic graph optimisation."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def open_tokenizer(path: Path) -> Tokenizer:
    """Open a tokenizer.json."""
    return Tokenizer.from_file(str(path))


def logits(session: ort.InferenceSession, input_ids: Tokens) -> Floats:
    """Run the graph without a cache: int64 [batch, sequence] -> [batch, sequence, vocabulary]."""
    return session.run(["logits"], {"input_ids": input_ids})[0]


def empty_cache(session: ort.InferenceSession, batch: int = 1) -> list[Floats]:
    """Make a cache of past length 0: key, value by layer, each [batch, kv heads, 0, head size]."""
    inputs = session.get_inputs()[1:]
    return [np.zeros((batch, i.shape[1], 0, i.shape[3]), np.float32) for i in inputs]


def cached_logits(
    session: ort.InferenceSession, input_ids: Tokens, cache: list[Floats]
) -> tuple[Floats, list[Floats]]:
    """Run the graph with a cache: logits [batch, sequence, vocabulary] and the longer cache."""
    names = [i.name for i in session.get_inputs()]
    scores, *longer = session.run(None, dict(zip(names, [input_ids, *cache], strict=True)))
    return scores, longer


def token_by_token(session: ort.InferenceSession, input_ids: Tokens) -> Floats:
    """Feed int64 [batch, sequence] one position at a time through the cached graph: logits."""
    cache, steps = empty_cache(session, len(input_ids)), []
    for column in np.split(input_ids, input_ids.shape[1], axis=1):
        scores, cache = cached_logits(session, column, cache)
        steps.append(scores)
    return np.concatenate(steps, axis=1)


def log_softmax(scores: Floats) -> NDArray[np.float64]:
    """Log probabilities along the last axis, in double precision."""
    shifted = scores.astype(np.float64) - scores.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def window_nats(session: ort.InferenceSession, targets: Tokens) -> NDArray[np.float64]:
    """Negative log likelihood of each target [batch, sequence] after BOS, in nats."""
    bos = np.full_like(targets[:, :1], BOS_ID)
    scores = logits(session, np.concatenate([bos, targets[:, :-1]], axis=1))
    return -np.take_along_axis(log_softmax(scores), targets[..., None], axis=-1)[..., 0]


def score(session: ort.InferenceSession, tokenizer: Tokenizer, text: str, tokens: int = 0) -> Score:
    """Score `text`, or only its first `tokens` tokens, in windows half a context apart.

    Each window scores its second half, the first window all of it, so that every token up to the
    ragged end counts once and all but the first are given at least half a context.
    """
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
    ids = ids[:tokens] if tokens else ids
    half = CONTEXT // 2
    starts = range(0, len(ids) - CONTEXT + 1, half)
    nats = [window_nats(session, ids[None, start : start + CONTEXT])[0] for start in starts]
    scored = starts[-1] + CONTEXT
    total = nats[0][:half].sum() + sum(window[half:].sum() for window in nats)
    return Score(float(total), scored, len(tokenizer.decode(ids[:scored].tolist())))


def sample(
    session: ort.InferenceSession,
    tokenizer: Tokenizer,
    prompt: str,
    new_tokens: int,
    temperature: float,
    seed: int,
) -> str:
    """Continue `prompt` by `new_tokens` tokens; the window slides once the context is full."""
    random = np.random.default_rng(seed)
    ids: list[int] = tokenizer.encode(prompt, add_special_tokens=False).ids
    for _ in range(new_tokens):
        window = np.array([[BOS_ID, *ids[1 - CONTEXT :]]], np.int64)
        weights = np.exp(log_softmax(logits(session, window)[0, -1] / np.float32(temperature)))
        ids.append(int(random.choice(len(weights), p=weights / weights.sum())))
    return tokenizer.decode(ids)
