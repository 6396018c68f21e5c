"""``pfmc verify``: an artifact against ONNX Runtime on the untouched input file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pfmc.cli.options import Json, Level, NotNegative, Positive, Quiet
from pfmc.cli.output import Progress, print_json, warn_of_die
from pfmc.errors import VerificationError
from pfmc.report.table import Table

if TYPE_CHECKING:
    from pfmc.verification import Row


def verify_(
    path: Path,
    *,
    model: Path | None = None,
    adapter: Path | None = None,
    level: Level = 3,
    text: Path | None = None,
    input: Path | None = None,
    windows: Positive | None = None,
    length: Positive | None = None,
    seed: NotNegative = 1,
    die: NotNegative = 0,
    ideal: bool = False,
    layers: bool = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Measure an artifact against ONNX Runtime; exit code 4 if a threshold of its recipe fails.

    Example: pfmc verify out.pfm --level 3

    Levels: 0 hashes, 1 emitted files, 2 integer products, 3 layers and the whole model.

    Parameters
    ----------
    path
        The artifact.
    model
        The ONNX file or checkpoint it was compiled from; remembered while it does not move.
    adapter
        The adapter it was compiled with; remembered while it does not move.
    level
        How far to go.
    text
        Text file to measure on; text the model writes itself by default.
    input
        .npz file with input arrays, for encoders and vision models.
    windows
        Windows or inputs to measure on; the recipe's number by default.
    length
        Tokens a window.
    seed
        Seed of the text or of the inputs.
    die
        Which die is measured.
    ideal
        Measure the ideal die, without noise.
    layers
        Show every layer's error.
    json
        Print JSON.
    quiet
        No progress.
    """
    from pfmc.targets.base import Die
    from pfmc.verify import verify

    progress = Progress(quiet=quiet or json)
    found = verify(
        path, model=model, adapter=adapter, level=level, text=text, inputs=input,
        windows=windows, length=length, seed=seed,
        die=Die(None if ideal else die, 0.0, not ideal), progress=progress,
    )  # fmt: skip
    progress.done()
    warn_of_die(path, [None if ideal else die], 0.0, quiet)
    if json:
        print_json(found.json())
    else:
        shown = [r for r in found.rows if layers or not r.name.startswith("layer ")]
        Table(("check", "measured", "limit", ""), tuple(map(_row, shown)), found.title).show()
    failed = [r.name for r in found.rows if r.passed is False]
    if failed:
        raise VerificationError("verification failed: " + ", ".join(failed), where=str(path))
    return 0


def _row(row: Row) -> tuple[str, str, str, str]:
    value = f"{row.value:.4g}"
    spread = f"  [{row.low:.4g} – {row.high:.4g}]" if row.low is not None else ""
    limit = "" if row.limit is None else f"{row.relation} {row.limit:g}"
    verdict = {True: "pass", False: "FAIL", None: ""}[row.passed]
    return row.name, f"{value}{spread} {row.unit}".rstrip(), limit, verdict
