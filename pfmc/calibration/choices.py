"""How a calibration runs, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pfmc.artifact import Manifest
from pfmc.distill.course import Course

COURSE = Course(
    seconds=60.0, sequences=1024, fabric_lr=3e-3, warmup=0.05, judge_every=50, dies=1, die_steps=1,
    converters_from=0.0,
)  # fmt: skip
"""How the corrections are distilled, if nobody says otherwise."""


@dataclass(frozen=True)
class Choices:
    """How a calibration runs.

    Attributes:
        die: the seed that names it; age_s: since writing, in seconds.
        share: parameters of all corrections over the fixed weights; rank: of every layer instead.
        only_gain: fit gains and offsets, leave the paths.
        measured: file of measurements instead of the simulated die.
        course: of the distillation; no seconds and no steps: closed forms alone.
        force: replace another artifact; threads: of torch.
    """

    die: int = 0
    age_s: float = 0.0
    share: float = 0.2
    rank: int | None = None
    only_gain: bool = False
    measured: Path | None = None
    course: Course = COURSE
    force: bool = False
    threads: int = 1


@dataclass(frozen=True)
class Calibration:
    """A finished calibration.

    Attributes:
        manifest: of the new artifact. notes: ranks, parameters and figures, as in its report.
        ready: whether it was there already; cpu_s: spent.
    """

    manifest: Manifest
    notes: dict[str, Any]
    ready: bool = False
    cpu_s: float = 0.0
