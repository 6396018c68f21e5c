"""``pfmc reduce``: from a model that fails a check to a small one that still fails it."""

from __future__ import annotations

from pathlib import Path
from signal import SIGINT
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from pfmc.cli.options import Json, Quiet
from pfmc.cli.output import Progress, print_json

Seconds = Annotated[float, Parameter(validator=Number(gt=0))]


def reduce_(
    model: Path,
    *,
    check: str,
    out: Annotated[Path | None, Parameter(name=["-o", "--out"])] = None,
    timeout: Seconds = 60.0,
    timeout_fails: bool = False,
    total: Seconds | None = None,
    exit_code: int | None = None,
    match: str | None = None,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Shrink a failing model to a minimal one.

    Ctrl-C keeps the smallest model so far; to go on, reduce that one.

    Example: pfmc reduce model.onnx --check 'pfmc compile {} --target rom --stop-after canonical'

    Parameters
    ----------
    model
        The ONNX file on which the check fails.
    check
        A command that ends with an exit code other than 0 where the failure is still there; the
        path of a candidate stands for {}, or comes last. It is run without a shell.
    out
        The file to write; MODEL-reduced.onnx in the current folder by default.
    timeout
        Seconds a check may take; then it is ended.
    timeout_fails
        Let a check that was ended count as failing, to reduce a model on which it hangs.
    total
        Seconds after which the smallest model so far is taken.
    exit_code
        The only exit code that counts as failing, so that no other failure is found instead.
    match
        Regular expression that the output of a failing check must hold.
    json
        Print JSON.
    quiet
        No progress.
    """
    from pfmc.reduce import Command, reduce_model

    command = Command(check, timeout, timeout_fails, exit_code, match)
    progress = Progress(quiet=quiet or json)
    place = out or Path(f"{model.stem}-reduced.onnx")
    done = reduce_model(model, command, place, total_s=total, progress=progress)
    progress.done()
    code = 128 + int(SIGINT) if done.interrupted else 0
    if json:
        body = {
            "path": str(done.path), "sha256": done.sha256, "nodes": list(done.nodes),
            "bytes": list(done.bytes), "checks": done.checks, "finished": done.finished,
            "interrupted": done.interrupted,
        }  # fmt: skip
        print_json({"schema_version": 1, **body})
        return code
    print(f"nodes:   {done.nodes[0]} -> {done.nodes[1]}")
    print(f"bytes:   {done.bytes[0]:,} -> {done.bytes[1]:,}")
    stop = "" if done.finished else f", stopped by {'Ctrl-C' if code else '--total'}"
    print(f"checks:  {done.checks}{stop}")
    print(f"written: {done.path}, sha256 {done.sha256}")
    return code
