"""What each ingredient of distillation is worth: the same budget with one of them left out, as CSV.

    python -m benchmarks.distil_ablation [--model FILE] [--steps N] [--seeds N] [--only NAME …]

Every line is one distillation of stories260K with the same steps, data and seeds, judged
by KL on held-out text of the teacher (on fixed unseen dies where there is noise). It is written to
docs/distil_ablation.csv; the first line of each group has all ingredients. A line that the file
holds already with the same steps and seeds is not measured again. The picture beside it
(docs/distil_ablation.svg) needs altair and vl-convert-python.
"""

from __future__ import annotations

import os

from benchmarks.process import ONE_THREAD

os.environ.update(ONE_THREAD)  # before numpy and torch are loaded

import argparse
import csv
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.distil_figures import ROOT, STORIES, analog, weights
from pfmc.compile import Options
from pfmc.distill.corpus import FILE
from pfmc.distillation import Choices, distil_model

OUT = ROOT / "docs" / "distil_ablation.csv"
DIGITAL = ("rom", weights(2, 1e-3, "distill.scale_lr=2e-3"))
ANALOG = ("crossbar_gaussian10", analog(1.5e-3, clip=1.6))
LEFT_OUT: dict[str, tuple[tuple[str, tuple[str, ...]], tuple[str, ...]]] = {
    "digital: all": (DIGITAL, ()),
    "digital: scales fixed": (DIGITAL, ("distill.scale_lr=0",)),
    "digital: norms, tables and biases fixed": (DIGITAL, ("distill.fabric_lr=0",)),
    "digital: tables fixed": (DIGITAL, ("distill.tables=false",)),
    "digital: start from plain rounding": (DIGITAL, ("quantise.search=plain",)),
    "digital: with errors of inner layers": (DIGITAL, ("distill.hidden=0.1",)),
    "digital: a sixteenth of the text": (DIGITAL, ("distill.sequences=128",)),
    "digital: no warm-up": (DIGITAL, ("distill.warmup=0",)),
    "analog: all": (ANALOG, ()),
    "analog: no noise in training": (ANALOG, ("distill.noise=false",)),
    "analog: no clipping": (ANALOG, ("distill.clip_sigmas=0",)),
    "analog: clipping at 3 deviations": (ANALOG, ("distill.clip_sigmas=3",)),
    "analog: converters from the start": (ANALOG, ("distill.converters_from=0",)),
    "analog: converters in the last step only": (ANALOG, ("distill.converters_from=0.997",)),
    "analog: one die for four steps": (ANALOG, ("distill.die_steps=4",)),
    "analog: input steps fixed": (ANALOG, ("distill.inputs=false",)),
    "analog: norms, tables and biases fixed": (ANALOG, ("distill.fabric_lr=0",)),
}


def line(name: str, model: Path, steps: int, seeds: int, folder: Path) -> dict[str, Any]:
    """One distillation for each seed."""
    (target, settings), more = LEFT_OUT[name]
    found = []
    for seed in range(seeds):
        options = Options(target=target, settings=(*settings, *more), seed=seed)
        place, corpus = folder / f"{list(LEFT_OUT).index(name)}-{seed}", folder / f"{seed}.corpus"
        place.mkdir()
        if corpus.is_file():  # another line's; written again where this one asks for another
            shutil.copy(corpus, place / FILE)
        done = distil_model(model, place, options=options, choices=Choices(steps=steps))
        found.append((done.manifest["start"]["loss"], done.manifest["best"]["loss"], done.cpu_s))
        if not corpus.is_file():
            shutil.copy(place / FILE, corpus)
        shutil.rmtree(place)
    start, best, seconds = np.array(found).T
    spread = f"{best.std(ddof=1):.4f}" if seeds > 1 else ""
    return {
        "line": name, "left_out": " ".join(more), "target": target, "steps": steps,
        "seeds": seeds, "kl_start": f"{start.mean():.4f}", "kl": f"{best.mean():.4f}",
        "kl_sd": spread, "recovered": f"{1 - best.mean() / start.mean():.3f}",
        "cpu_s": f"{seconds.mean():.0f}",
    }  # fmt: skip


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """KL left after training, a bar with its deviation over seeds for each line."""
    import altair

    charts = []
    for group in dict.fromkeys(str(r["line"]).split(": ")[0] for r in rows):
        values = [
            {"what": str(r["line"]).split(": ")[1], "kl": float(r["kl"]),
             "low": float(r["kl"]) - float(r["kl_sd"] or 0),
             "high": float(r["kl"]) + float(r["kl_sd"] or 0)}
            for r in rows if str(r["line"]).startswith(group)
        ]  # fmt: skip
        what = altair.Y("what:N", sort=[v["what"] for v in values], title=None,
                        axis=altair.Axis(labelLimit=260))  # fmt: skip
        base = altair.Chart(altair.Data(values=values)).encode(y=what)
        bars = base.mark_bar(color="#7da7c9" if group == "digital" else "#d09a6a").encode(
            x=altair.X("kl:Q", title="KL left on held-out text (nats a token)")
        )
        spread = base.mark_rule().encode(x="low:Q", x2="high:Q")
        charts.append((bars + spread).properties(width=420, title=group))
    altair.vconcat(*charts).save(str(path))


def held(path: Path, steps: int, seeds: int) -> dict[str, dict[str, Any]]:
    """Lines of an earlier run with the same steps and seeds."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    asked = (str(steps), str(seeds))
    return {r["line"]: r for r in rows if (r["steps"], r["seeds"]) == asked}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=STORIES.path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=LEFT_OUT, default=list(LEFT_OUT))
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    found = held(given.out, given.steps, given.seeds)
    with tempfile.TemporaryDirectory() as folder:
        for name in (n for n in given.only if n not in found):
            found[name] = line(name, given.model, given.steps, given.seeds, Path(folder))
            print(found[name], flush=True)
            rows = [found[n] for n in LEFT_OUT if n in found]
            with given.out.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
    try:
        picture([found[n] for n in LEFT_OUT if n in found], given.out.with_suffix(".svg"))
    except ImportError:
        print("no picture: pip install altair vl-convert-python", file=sys.stderr)


if __name__ == "__main__":
    main()
