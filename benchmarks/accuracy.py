"""Measures how well compiled hardware follows the float model, and writes docs/results.md.

    python -m benchmarks.accuracy bard bard_kv stories260K zoo
    python -m benchmarks.accuracy --stsb
    python -m benchmarks.accuracy --render

Every measurement is kept in docs/results.json; docs/results.md is rendered from all of them, so
the sections may be measured one after the other. The truth is ONNX Runtime on the untouched input
file throughout. Test data is looked for in ../shared beside the checkout.
"""

from __future__ import annotations

import os

from benchmarks.process import ONE_THREAD

os.environ.update(ONE_THREAD)  # before numpy and torch are loaded

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pfmc import ingest, simulate
from pfmc.against_source import feeds_of, token_scores
from pfmc.compile import Compilation, compile_model
from pfmc.distill import calibrate, drive, measure
from pfmc.distill.generate import Decoder
from pfmc.distill.student import Student
from pfmc.distill.text import load_tokenizer, self_generated, windows_of_file
from pfmc.errors import PfmcError
from pfmc.oracle import Oracle
from pfmc.targets.base import Die
from pfmc.verify import verify

Array = npt.NDArray[Any]
Row = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
DOCS = ROOT / "docs"
BATCH, WINDOWS, LENGTH, SEED, DIES = 8, 32, 128, 1, 5
ROADS = (("rom", "rom"), ("rom", "rom8"), ("crossbar", "crossbar"), ("optical", "optical"))
"""(target, recipe) of each row."""


@dataclass(frozen=True)
class Subject:
    """A language model that is measured: its file, and a text it has not seen or None."""

    name: str
    path: Path
    text: Path | None = None


SUBJECTS = {
    s.name: s
    for s in (
        Subject("bard", ROOT / "models/bard/model.onnx", SHARED / "data/tinyshakespeare.txt"),
        Subject("bard_kv", ROOT / "models/bard/model_kv.onnx"),
        Subject("stories260K", SHARED / "data/stories260K/model.onnx"),
    )
}


# -- language models -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """What ONNX Runtime says of the source: tokens ``[N, S]`` and scores ``[N, S, V]``."""

    ids: Array
    scores: Array


def language_rows(subject: Subject, folder: Path, dies: int) -> Iterator[Row]:
    """One row for each road of a language model."""
    truths = {"self": truth_of(subject, None)}
    if subject.text is not None and subject.text.is_file():
        truths["text"] = truth_of(subject, subject.text)
    for target, recipe in ROADS:
        out = folder / f"{subject.name}-{target}-{recipe}.pfm"
        done = compile_model(subject.path, out, target=target, recipe=recipe, force=True)
        noisy = target != "rom"
        row: Row = {"target": target, "recipe": recipe, **costs(done)}
        row["self"] = against(out, Die(0), truths["self"])
        if "text" in truths:
            row["text"] = against(out, Die(0), truths["text"])
        if noisy:
            row["ideal"] = against(out, Die(None, 0.0, False), truths["self"])
            row["dies"] = [row["self"]] + [
                against(out, Die(n), truths["self"]) for n in range(1, dies)
            ]
        say(f"{subject.name} {target} {recipe}: ratio {row['self']['ratio']:.4f}")
        yield row


def truth_of(subject: Subject, text: Path | None) -> Truth:
    """Windows of `text`, or written by the model itself, and ONNX Runtime's scores on them."""
    model = ingest.load(subject.path).model
    lead = drive.detect(model)
    tokenizer = load_tokenizer(subject.path.parent / "tokenizer.json")
    decoder = Decoder(Student(model).eval(), tokenizer)
    length = calibrate.fitting_length(decoder, LENGTH)
    if text is None:
        ids = self_generated(decoder, WINDOWS, length, SEED)
    else:
        ids = windows_of_file(text, tokenizer, length, WINDOWS)
    size = lead.batch or BATCH
    with Oracle(subject.path) as oracle:
        parts = [
            token_scores(oracle, lead, feeds_of(lead, ids[i : i + size]))
            for i in range(0, len(ids), size)
        ]
    return Truth(ids, np.concatenate(parts))


def against(artifact: Path, die: Die, truth: Truth) -> Row:
    """Perplexity ratio with its 95 % interval over windows, KL and top-1 agreement of one die."""
    decoder, comparison = simulate.open_machine(artifact, die).decoder(), measure.Comparison()
    for start in range(0, len(truth.ids), BATCH):
        part = slice(start, start + BATCH)
        comparison.add(truth.scores[part], decoder.logits(truth.ids[part]), truth.ids[part])
    excess = np.concatenate(comparison.student_losses) - np.concatenate(comparison.teacher_losses)
    ratio, found = measure.mean_estimate(excess.mean(axis=1)), comparison.result()
    assert found.perplexity_teacher is not None
    return {
        "ratio": math.exp(ratio.value), "low": math.exp(ratio.low), "high": math.exp(ratio.high),
        "kl": found.kl_mean.value, "top1": found.top1.value,
        "perplexity": found.perplexity_teacher.value, "tokens": found.tokens,
    }  # fmt: skip


def costs(done: Compilation) -> Row:
    """The cost metrics of the table as [low, typical, high] with unit, and the weights' bits."""
    metrics, model = done.report["cost"]["metrics"], done.report["model"]
    wanted = ("energy__token", "throughput__user", "area__total", "volume__optics")
    found = {
        name: {k: metrics[name][k] for k in ("low", "typical", "high", "unit")}
        for name in wanted
        if name in metrics
    }
    return {"cost": found, "fixed_weights": model["fixed_weights"], "tiles": model["tiles"]}


# -- the zoo ---------------------------------------------------------------------------------------

ZOO = (
    "llama__*", "llama_tied__*", "llama_fp32/model", "gpt2__*", "bert__*", "bert_mlm__*", "vit__*",
    "deit__*", "distilbert__*", "qwen2__*", "qwen3__*", "mistral__*", "gpt_neox__*",
)  # fmt: skip
"""Exports of tiny random models by several exporters; of random weights only errors mean much."""
SMALL = ("calibration.sequences=8", "calibration.length=32")


def zoo_rows(folder: Path) -> Iterator[Row]:
    """One row for each export and target."""
    for pattern in ZOO:
        for path in sorted((SHARED / "zoo").glob(f"{pattern}.onnx")):
            name = path.stem if path.parent.name == "zoo" else path.parent.name
            for target in ("rom", "crossbar", "optical"):
                yield {"file": name, "target": target, **_zoo(path, target, folder / "zoo.pfm")}
            say(name)


def _zoo(path: Path, target: str, out: Path) -> Row:
    try:
        compile_model(path, out, target=target, settings=SMALL, force=True)
        found = {r.name: r for r in verify(out, windows=8, length=32).rows}
    except PfmcError as error:
        return {"error": f"{type(error).__name__}: {error.what}"}
    worst = next((r.value for n, r in found.items() if n.startswith("worst layer")), math.nan)
    cosines = [r.value for n, r in found.items() if n.endswith(": mean cosine")]
    kl, top1 = found.get("KL divergence"), found.get("top-1 agreement")
    return {
        "worst": worst, "median": found["median layer"].value,
        "cosine": min(cosines) if cosines else None,
        "kl": kl.value if kl else None, "top1": top1.value if top1 else None,
        "passed": all(r.passed is not False for r in found.values()),
    }  # fmt: skip


# -- sentence embeddings ---------------------------------------------------------------------------


def stsb_rows(folder: Path, pairs: int, model: Path | None) -> Iterator[Row]:
    """Spearman's rho on STS-B test pairs and cosine to the float embedding, for each target."""
    from benchmarks import stsb

    path = model or stsb.export(folder / "minilm")
    data, count = SHARED / "data" / "stsbenchmark", stsb.CALIBRATION_SENTENCES
    calibration = stsb.sentences_file(
        path, [data / "sts-train.csv"], folder / "calibration.npz", count
    )
    task = stsb.task(path, data / "sts-test.csv", pairs)
    with Oracle(path) as oracle:
        task.prepare(oracle)
    yield {"target": "ONNX Runtime", "recipe": "", **stsb.judged(task, task.of_source())}
    for target, recipe in ROADS:
        out = folder / f"minilm-{target}-{recipe}.pfm"
        done = compile_model(
            path, out, target=target, recipe=recipe, inputs=calibration, force=True,
            settings=(f"calibration.sequences={count}",),
        )  # fmt: skip
        row = {"target": target, "recipe": recipe, **costs(done)}
        row |= stsb.judged(task, task.measure(simulate.open_machine(out, Die(0))))
        if target != "rom":
            ideal = simulate.open_machine(out, Die(None, 0.0, False))
            row["ideal"] = stsb.judged(task, task.measure(ideal))
        say(f"MiniLM {target} {recipe}: {row['spearman']:.4f}, cosine {row['cosine']:.4f}")
        yield row


# -- keeping and running ---------------------------------------------------------------------------


def say(line: str) -> None:
    """Progress on stderr."""
    print(line, file=sys.stderr, flush=True)


def keep(section: str, rows: Sequence[Row], command: str, path: Path) -> None:
    """Puts a measured section into the results file."""
    held: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    held[section] = {"command": command, "rows": list(rows)}
    text = json.dumps(held, indent=1, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the sections that are named, then renders docs/results.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy")
    parser.add_argument("sections", nargs="*", choices=[*SUBJECTS, "zoo", []])
    parser.add_argument("--stsb", action="store_true", help="MiniLM on STS-B")
    parser.add_argument("--pairs", type=int, default=345, help="STS-B pairs, drawn by seed 0")
    parser.add_argument("--minilm", type=Path, help="an exported MiniLM; exported afresh if absent")
    parser.add_argument("--dies", type=int, default=DIES)
    parser.add_argument("--folder", type=Path, help="keeps the artifacts")
    parser.add_argument("--render", action="store_true", help="only write docs/results.md again")
    chosen = parser.parse_args(arguments)
    _measure(chosen)
    from benchmarks import results

    held: Mapping[str, Any] = json.loads((DOCS / "results.json").read_text(encoding="utf-8"))
    (DOCS / "results.md").write_text(results.render(held), encoding="utf-8")


def _measure(chosen: argparse.Namespace) -> None:
    """Measures what was chosen, one section after the other."""
    import torch

    torch.set_num_threads(1)
    place = DOCS / "results.json"
    with tempfile.TemporaryDirectory(prefix="pfmc-accuracy-") as scratch:
        folder = chosen.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in chosen.sections:
            rows = zoo_rows(folder) if name == "zoo" else language_rows(
                SUBJECTS[name], folder, chosen.dies
            )
            keep(name, list(rows), f"python -m benchmarks.accuracy {name}", place)
        if chosen.stsb:
            rows = stsb_rows(folder, chosen.pairs, chosen.minilm)
            keep("stsb", list(rows), "python -m benchmarks.accuracy --stsb", place)


if __name__ == "__main__":
    main()
