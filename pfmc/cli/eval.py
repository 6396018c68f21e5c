"""``pfmc eval``: how good an artifact is at a task, over documents and over dies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pfmc.cli.options import Json, NotNegative, Positive, Quiet
from pfmc.cli.output import Progress, print_json, warn_of_die
from pfmc.cli.run import seconds_of
from pfmc.errors import UsageError, VerificationError
from pfmc.report.table import Table

if TYPE_CHECKING:
    from pfmc.evaluation import Evaluation, Figure


def eval_(
    path: Path,
    *,
    model: Path | None = None,
    adapter: Path | None = None,
    text: Path | None = None,
    pairs: Path | None = None,
    input: Path | None = None,
    output: str | None = None,
    documents: Positive | None = None,
    length: Positive | None = None,
    seed: NotNegative = 1,
    dies: str = "0",
    age: str = "0s",
    save: Path | None = None,
    fail_on: list[str] | None = None,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Measure an artifact on a task, with intervals over documents and over dies.

    Examples: pfmc eval out.pfm --text held-out.txt --dies 0-4
    and pfmc eval encoder.pfm --pairs sts-test.csv
    and pfmc eval vit.pfm --input images.npz

    Parameters
    ----------
    path
        The artifact.
    model
        The ONNX file or checkpoint it was compiled from; remembered while it does not move.
    adapter
        The adapter it was compiled with; remembered while it does not move.
    text
        A text file, for language models; text the model writes itself by default.
    pairs
        Sentence pairs with people's scores, tab separated (STS-B), for embedders.
    input
        .npz file of input arrays; with an array "labels", accuracy is measured.
    output
        Which output is judged.
    documents
        Windows, pairs or inputs to measure on.
    length
        Tokens a window or sentence.
    seed
        Seed of text the model writes itself.
    dies
        Which dies: 0-4, or 0,3,7, or ideal.
    age
        Time since writing: 30s, 1h, 1day, 1year.
    save
        CSV file of every document's numbers; a run that was stopped resumes from it.
    fail_on
        Exit code 4 if a figure is worse, e.g. "perplexity ratio>1.05".
    json
        Print JSON.
    quiet
        No progress.
    """
    from pfmc.evaluation import evaluate

    limits = [_limit(text_of) for text_of in fail_on or ()]
    progress = Progress(quiet=quiet or json)
    found = evaluate(
        path, model=model, adapter=adapter, text=text, pairs=pairs, inputs=input, output=output,
        documents=documents, length=length, seed=seed, dies=_dies(dies), age_s=seconds_of(age),
        save=save, progress=progress,
    )  # fmt: skip
    progress.done()
    warn_of_die(path, found.dies, found.age_s, quiet)
    if json:
        print_json(found.json())
    else:
        columns = ("figure", "value", "95 % over documents", "dies (sd, worst)")
        Table(columns, tuple(map(_row, found.figures)), found.title).show()
    return _judge(found, limits, path)


def _dies(text: str) -> tuple[int | None, ...]:
    """``0-4``, ``0,3,7``, ``ideal``."""
    found: list[int | None] = []
    try:
        for part in text.replace(" ", "").split(","):
            if part == "ideal":
                found.append(None)
                continue
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
    except ValueError as error:
        raise UsageError(f"cannot read the dies {text!r}", mend="e.g. 0-4, or ideal") from error
    if not found:
        raise UsageError(f"{text!r} names no die", mend="e.g. 0-4, or ideal")
    return tuple(dict.fromkeys(found))  # a die named twice is one die


def _limit(text: str) -> tuple[str, str, float]:
    for sign in (">", "<"):
        name, found, number = text.partition(sign)
        if found:
            try:
                return name.strip(), sign, float(number)
            except ValueError:
                break
    raise UsageError(f"cannot read the limit {text!r}", mend='e.g. "perplexity ratio>1.05"')


def _judge(found: Evaluation, limits: list[tuple[str, str, float]], path: Path) -> int:
    known = {f.name: f for f in found.figures}
    failed = []
    for name, sign, limit in limits:
        if name not in known:
            raise UsageError(f"there is no figure {name!r}", mend=", ".join(known))
        value = known[name].value
        if not (value <= limit if sign == ">" else value >= limit):  # NaN fails
            failed.append(f"{name} is {value:.4g}, {sign} {limit:g}")
    if failed:
        raise VerificationError("; ".join(failed), where=str(path))
    return 0


def _row(figure: Figure) -> tuple[str, str, str, str]:
    value = f"{figure.value:.4f} {figure.unit}".rstrip()
    spread = "" if figure.low is None else f"{figure.low:.4f} – {figure.high:.4f}"
    sd = figure.die_sd
    dies = "" if sd is None else f"{len(figure.dies)} ({sd:.2g}, {figure.worst:.4f})"
    return figure.name, value, spread, dies
