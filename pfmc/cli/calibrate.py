"""``pfmc calibrate``: one die of an artifact, corrected by a digital path beside its layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from pfmc.cli.options import Json, NotNegative, Positive, Quiet
from pfmc.cli.output import Progress, print_json
from pfmc.cli.run import seconds_of

if TYPE_CHECKING:
    from pfmc.calibration.choices import Calibration

Seconds = Annotated[float, Parameter(validator=Number(gt=0))]
Rate = Annotated[float, Parameter(validator=Number(gt=0))]
Share = Annotated[float, Parameter(validator=Number(gt=0, lte=1))]


def calibrate_(
    path: Path,
    *,
    out: Annotated[Path, Parameter(name=["-o", "--out"])],
    die: NotNegative = 0,
    age: str = "0s",
    measured: Path | None = None,
    share: Share = 0.2,
    rank: NotNegative | None = None,
    only: Literal["gain"] | None = None,
    seconds: Seconds | None = None,
    steps: NotNegative | None = None,
    lr: Rate | None = None,
    text: Path | None = None,
    input: Path | None = None,
    model: Path | None = None,
    adapter: Path | None = None,
    seed: NotNegative = 0,
    threads: Positive = 1,
    force: bool = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Correct one die: fit a digital path beside its fixed layers, and write that artifact.

    Examples: pfmc calibrate out.pfm --die 3 -o die3.pfm
    and pfmc calibrate die3.pfm --die 3 --age 1year --only gain -o die3-later.pfm

    Parameters
    ----------
    path
        The artifact; one that was calibrated before is refitted.
    out
        The artifact to write; its tiles are those of PATH.
    die
        Which die: the seed of its write noise.
    age
        Time since writing: 30s, 1h, 1day, 1year.
    measured
        .npz file of a die's measured layers, instead of the simulated die.
    share
        Numbers of all corrections over the fixed weights, at most.
    rank
        The same rank for every layer, instead of a share.
    only
        gain: fit gains and offsets alone, leave low-rank paths as they are.
    seconds
        CPU seconds to spend, 60 by default.
    steps
        Steps of distillation instead; the same number gives the same bytes. 0: closed forms alone.
    lr
        Learning rate of the distillation.
    text
        Text file to fit on; by default a language model writes its own.
    input
        .npz file with input arrays to fit on, for encoders and vision models.
    model
        The ONNX file or checkpoint it was compiled from; remembered while it does not move.
    adapter
        The adapter it was compiled with; remembered while it does not move.
    seed
        Seed of every random choice that is not the die's.
    threads
        Threads of torch.
    force
        Replace an artifact made from something else.
    json
        Print JSON.
    quiet
        No progress.
    """
    from pfmc.calibration.calibrate import calibrate
    from pfmc.calibration.choices import COURSE, Choices
    from pfmc.calibration.die import Data

    course = replace(
        COURSE, seed=seed, steps=steps, seconds=seconds or COURSE.seconds,
        fabric_lr=lr or COURSE.fabric_lr,
    )  # fmt: skip
    choices = Choices(
        die, seconds_of(age), share, rank, only == "gain", measured, course, force, threads
    )
    progress = Progress(quiet=quiet or json)
    data = Data(text, input, model, adapter)
    done = calibrate(path, out, choices=choices, data=data, progress=progress)
    progress.done()
    _show(done, out, json)
    return 0


def _show(done: Calibration, out: Path, json: bool) -> None:
    notes = done.notes
    if json:
        body: dict[str, Any] = {"schema_version": 1, "tree_sha256": done.manifest.tree, **notes}
        print_json(body | {"timing_cpu_s": done.cpu_s})
        return
    print(f"kept: {notes['kept']}, {notes['parameters']} numbers, "
          f"{notes['share_of_weights']:.1%} of the fixed weights")  # fmt: skip
    for name, figures in notes["held_out"].items():
        shown = "  ".join(f"{k} {v:.5f}" for k, v in figures.items())
        print(f"  {name:<16}{shown}")
    print(f"written: {out}")
