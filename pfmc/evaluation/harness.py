"""A compiled artifact as a model of EleutherAI's lm-evaluation-harness: ``--model pfmc``.

    import lm_eval, pfmc.evaluation.harness
    lm_eval.simple_evaluate(model="pfmc", model_args="path=out.pfm,die=0", tasks=[...])

Importing this module registers the model. It answers the harness's three kinds of request: log
likelihood of a continuation, rolling log likelihood of a text, and greedy generation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from pfmc.distill.calibrate import fitting_length
from pfmc.distill.generate import Decoder
from pfmc.distill.measure import log_softmax
from pfmc.errors import UsageError
from pfmc.simulate import open_machine
from pfmc.targets.base import Die

WINDOW = 1024
"""Tokens scored at once where the model sets no limit."""


@register_model("pfmc")
class ArtifactLM(LM):  # type: ignore[misc]
    """Scores and continues text on one simulated die.

    Args:
        path: the artifact.
        die: seed, or ``ideal``; age_s: seconds since writing.
        window: tokens the model reads at once; halved until its position tables hold them.
        batch_size, max_batch_size, device: taken because the harness gives them; not used.
    """

    def __init__(
        self, path: str, die: str | int = 0, age_s: float = 0.0, window: int = WINDOW,
        batch_size: object = None, max_batch_size: object = None, device: object = None,
    ) -> None:  # fmt: skip
        super().__init__()
        seed = None if die == "ideal" else int(die)
        machine = open_machine(path, Die(seed, float(age_s), seed is not None))
        if machine.tokenizer is None:
            raise UsageError(
                "the artifact holds no tokenizer", where=str(path),
                mend="compile with --tokenizer tokenizer.json",
            )  # fmt: skip
        self.decoder: Decoder = machine.decoder()
        self.tokenizer = machine.tokenizer
        self.window = fitting_length(self.decoder, int(window))
        self._name = machine.path.name

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return self._name

    # -- requests ----------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        """(log likelihood in nats, whether greedy decoding gives it) of each continuation."""
        return [self._continuation(*request.args) for request in requests]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log likelihood of each whole text, every token scored once."""
        return [self._rolling(request.args[0]) for request in requests]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuation of each prompt up to a stop string; what does not fit the window
        is cut from the prompt's start, and at most half of it."""
        return [self._generated(*request.args) for request in requests]

    # -- how ---------------------------------------------------------------------------------

    def _prefix(self) -> list[int]:
        first = self.tokenizer.bos_id
        return [first if first is not None else (self.tokenizer.eos_ids or (0,))[0]]

    def _encoded(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both; spaces at the context's end belong to the continuation."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before = self.tokenizer.encode(context, special=False)
        whole = self.tokenizer.encode(context + continuation, special=False)
        return self._prefix() + before, whole[len(before) :]

    def _continuation(self, context: str, continuation: str) -> tuple[float, bool]:
        before, after = self._encoded(context, continuation)
        return self._scored(before, after)

    def _scored(self, before: list[int], after: list[int]) -> tuple[float, bool]:
        if not after:
            return 0.0, True
        if len(after) > self.window:
            raise UsageError(
                f"a continuation of {len(after)} tokens does not fit a window of {self.window}"
            )
        ids = np.array([(before + after)[-self.window - 1 : -1]])  # nothing follows the last
        logs = log_softmax(self.decoder.logits(ids)[0, -len(after) :])
        taken = logs[np.arange(len(after)), after]
        return float(taken.sum()), bool((logs.argmax(-1) == np.array(after)).all())

    def _rolling(self, text: str) -> float:
        ids = self.tokenizer.encode(text, special=False)
        return sum(self._scored(before, part)[0] for before, part in self._parts(ids))

    def _parts(self, ids: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Disjoint windows, each with one token before it, as the harness does; the last has as
        many as there is room for."""
        for start in range(0, len(ids), self.window):
            part = ids[start : start + self.window]
            room = self.window + 1 - len(part)
            yield (ids[max(0, start - room) : start] or self._prefix()), part

    def _generated(self, context: str, options: dict[str, Any]) -> str:
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        count = int(options.get("max_gen_toks", 256))
        sampled = bool(options.get("do_sample")) and float(options.get("temperature", 0)) > 0
        prompt = self._prefix() + self.tokenizer.encode(context, special=False)
        prompt = prompt[-max(self.window - count, self.window // 2, 1) :]
        count = min(count, max(1, self.window - len(prompt)))
        tokens = self.decoder.generate(
            prompt, count, greedy=not sampled,
            temperature=float(options.get("temperature", 1.0)) or 1.0,
        )  # fmt: skip
        text = ""
        for piece in self.tokenizer.stream(tokens, prompt):
            text += piece
            ends = [text.index(s) for s in stops if s and s in text]
            if ends:
                return text[: min(ends)]
        return text
