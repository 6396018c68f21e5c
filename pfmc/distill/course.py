"""How long and how hard is trained: the options of distillation and the schedules made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Course:
    """The options; a recipe's ``[distill]`` section and `pfmc distill` set them.

    Attributes:
        seconds: CPU seconds to spend; turned into steps by timing a few, if `steps` is None.
        steps: steps; the same number gives the same bytes on the same machine.
        batch: samples a step, of all processes together; micro: of them at a time.
        sequences: samples to learn from, at most; so many are made up when no data are given.
        length: positions of each.
        held_out: samples kept for judging; never trained on.
        lr: peak learning rate of weights, in their own units; Adam.
        scale_lr: of what is held as logarithm (scales, steps, ranges): relative change a step.
        fabric_lr: of norms, embedding tables and biases.
        warmup: share of the steps in which the rate rises; decay: how it falls to 0.
        gradient_norm: gradients are clipped to it; 0 does not clip.
        clip_sigmas: weights are clipped to so many standard deviations after every step; 0 never.
            A prototype's are not: it has one die, whose errors are learned with.
        hidden: weight of the errors of all fixed linears' outputs beside the loss.
        converters_from: share of the steps after which output converters are emulated; in the last
            step they always are, for only states that were judged with them are kept.
        noise: whether the target's noise is drawn in training; dies: how many fixed dies judge;
            die_steps: steps on one die before the next is drawn.
        age_s: age of the dies, in seconds since writing.
        norms, tables, inputs: whether gains of norms, embedding tables, input steps learn.
        judge_every: steps between two judgements; patience: judgements without progress after
            which training stops, 0 never.
        precision: ``fp32``, or ``bf16`` products by autocast.
        seed: of data, order and noise.
    """

    seconds: float = 300.0
    steps: int | None = None
    batch: int = 16
    micro: int = 16
    sequences: int = 4096
    length: int = 128
    held_out: int = 32
    lr: float = 1e-3
    scale_lr: float = 1e-3
    fabric_lr: float = 1e-3
    warmup: float = 0.05
    decay: Literal["cosine", "linear"] = "cosine"
    gradient_norm: float = 1.0
    clip_sigmas: float = 0.0
    hidden: float = 0.0
    converters_from: float = 0.8
    noise: bool = True
    dies: int = 2
    die_steps: int = 1
    age_s: float = 0.0
    norms: bool = True
    tables: bool = True
    inputs: bool = True
    judge_every: int = 100
    patience: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0

    def rate(self, step: int, steps: int) -> float:
        """The factor on every learning rate at `step` of `steps`."""
        rising = max(1, round(self.warmup * steps))
        if step < rising:
            return (step + 1) / rising
        done = (step - rising) / max(1, steps - rising)
        return 0.5 * (1.0 + math.cos(math.pi * done)) if self.decay == "cosine" else 1.0 - done

    def converts(self, step: int, steps: int) -> bool:
        """Whether output converters are emulated at `step`."""
        return step >= self.first_converted(steps)

    def first_converted(self, steps: int) -> int:
        """The first step with output converters."""
        return min(round(self.converters_from * steps), max(0, steps - 1))
