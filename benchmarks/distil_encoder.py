"""Distils all-MiniLM-L6-v2 and measures it on the STS benchmark, as CSV.

    python -m benchmarks.distil_encoder [ROW …] [--folder DIR] [--seconds S] [--dies N]

Each row is `pfmc distill` on sentences of STS-B's training file (without their scores), of stories,
plays and an encyclopedia, `pfmc compile --distilled` and, before and after, `pfmc eval --pairs` on
the test file: cosine to the float model's embedding by ONNX Runtime and Spearman's rho less the
float model's, with 95 % intervals over sentences and pairs. Rows are merged into
docs/distil_encoder.csv one by one.
"""

from __future__ import annotations

import os

from benchmarks.process import ONE_THREAD

os.environ.update(ONE_THREAD)  # before numpy and torch are loaded

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import stsb
from benchmarks.accuracy import SHARED
from benchmarks.distil_figures import AGED, DAY, ROOT, analog, both, merge, weights
from pfmc.compile import Options
from pfmc.evaluation import evaluate

OUT = ROOT / "docs" / "distil_encoder.csv"
DATA = SHARED / "data" / "stsbenchmark"
WIDE = ("tinystories/sample.txt", "wikitext-2/valid.txt", "tinyshakespeare.txt")
TEXTS = [DATA / "sts-train.csv", *(SHARED / "data" / path for path in WIDE)]
SENTENCES, LONGEST, SAMPLES = 16384, 40, 128
COSINE, RHO = "cosine to the source's embedding", "Spearman's rho less the source's"
COLUMNS = (
    "row", "target", "settings", "age_s", "dies", "pairs", "cosine_before", "cosine", "cosine_low",
    "cosine_high", "cosine_p1", "cosine_worst_die", "cosine_goal", "rho_before", "rho", "rho_low",
    "rho_high", "rho_goal", "steps", "cpu_s",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A target with settings, the cosine to reach, and how much of Spearman's rho may be lost."""

    target: str
    settings: tuple[str, ...]
    cosine: float
    rho: float
    age_s: float = 0.0


COMMON = (
    f"calibration.sequences={SAMPLES}", f"distill.sequences={SENTENCES - SAMPLES}",
    "distill.tables=false", "distill.fabric_lr=2e-5", "distill.scale_lr=1e-4",
)  # fmt: skip
ROWS = {
    "minilm4": Row("rom", (*weights(4, 2e-5), *COMMON), 0.985, 0.005),
    "minilm3": Row("rom", (*weights(3, 4e-5), *COMMON), 0.95, 0.005),
    "minilm_pcm": Row(
        "crossbar", (*analog(1e-4, AGED, clip=1.8), *COMMON), 0.95, 0.02, DAY
    ),
}


def figure(name: str, row: Row, given: argparse.Namespace) -> dict[str, Any]:
    """Distils, compiles and measures one row."""
    model = stsb.export(given.folder / "minilm")
    learned = given.folder / f"sentences-{SENTENCES}.npz"
    stsb.sentences_file(model, TEXTS, learned, SENTENCES, LONGEST)
    options = Options(row.target, settings=row.settings, inputs=learned, force=True)
    done, *made = both(name, model, options, given.folder, given.seconds)
    dies = tuple(range(1 if row.target == "rom" else given.dies))
    before, after = (
        evaluate(
            path, pairs=DATA / "sts-test.csv", documents=given.pairs, dies=dies, age_s=row.age_s
        )
        for path in made
    )
    cosine, rho = after[COSINE], after[RHO]
    numbers = {
        "cosine_before": before[COSINE].value, "cosine": cosine.value, "cosine_low": cosine.low,
        "cosine_high": cosine.high, "cosine_p1": after["1st percentile of cosine"].value,
        "cosine_worst_die": cosine.worst, "rho_before": before[RHO].value, "rho": rho.value,
        "rho_low": rho.low, "rho_high": rho.high,
    }  # fmt: skip
    told: dict[str, Any] = {
        "row": name, "target": row.target, "settings": " ".join(row.settings),
        "age_s": f"{row.age_s:g}", "dies": len(dies), "pairs": given.pairs,
        **{k: f"{v:.4f}" for k, v in numbers.items()}, "cosine_goal": row.cosine,
        "rho_goal": -row.rho, "steps": done.manifest["steps"], "cpu_s": f"{done.cpu_s:.0f}",
    }  # fmt: skip
    return {column: told[column] for column in COLUMNS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], default=[])
    parser.add_argument("--folder", type=Path, default=Path("distil-encoder"))
    parser.add_argument("--seconds", type=float, default=600.0, help="CPU seconds a row")
    parser.add_argument("--pairs", type=int, default=345, help="STS-B pairs, spread evenly")
    parser.add_argument("--dies", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for name in given.rows or ROWS:
        print(name, flush=True)
        row = figure(name, ROWS[name], given)
        merge(row, given.out, list(ROWS))
        print(row, flush=True)


if __name__ == "__main__":
    main()
