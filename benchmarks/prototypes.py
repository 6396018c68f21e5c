"""Every training rule on a prototype of the shipped model: ``python -m benchmarks.prototypes``.

Writes docs/prototypes.csv and the table in docs/rules.md: what each rule makes of die 0 of the
`crossbar` technology (the rules of phase masks: `optical`) in `SECONDS` CPU seconds, preparation
included. Rules named as arguments are measured alone and replace their rows.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from pfmc.compile import Options
from pfmc.distill import rules
from pfmc.distill.rules.method import method
from pfmc.distillation import Choices, distil_model

ROOT: Final = Path(__file__).resolve().parent.parent
MODEL: Final = ROOT / "models" / "bard" / "model.onnx"
CSV: Final = ROOT / "docs" / "prototypes.csv"
PAGE: Final = ROOT / "docs" / "rules.md"
MARKS: Final = ("<!-- prototypes: benchmarks/prototypes.py -->", "<!-- end of prototypes -->")
SECONDS: Final = 30.0
SETTINGS: Final = (
    "calibration.sequences=4", "calibration.length=64", "distill.sequences=256",
    "distill.held_out=16", "distill.length=64", "distill.batch=8", "distill.micro=8",
    "distill.judge_every=20", "distill.warmup=0.1",
)  # fmt: skip
RATES: Final = {
    "feedback": 3e-5, "augmented-feedback": 3e-5, "local": 3e-5, "spsa": 3e-5, "evolution": 3e-5,
}  # fmt: skip
"""Learning rates other than 3e-4: of rules whose gradients point elsewhere for the most part."""
SET: Final[dict[str, tuple[str, ...]]] = {
    "spsa": ("probes=4", "radius=0.003"),
    "evolution": ("pairs=4", "radius=0.003"),
    "equilibrium": ("steps=3",),
    "adjoint": ("planes=64", "fit=100"),
    "echo": ("planes=64", "fit=100"),
}
WAVES: Final = ("adjoint", "echo")
FIELDS: Final = (
    "rule", "target", "trains", "lr", "steps", "device_passes", "device_passes_back",
    "model_passes", "cpu_s", "kl_before", "kl_after", "kl_best", "best_step",
)  # fmt: skip


def measure(name: str, folder: Path) -> dict[str, Any]:
    """One rule's row; `folder` keeps what the model wrote for the next rule."""
    target = "optical" if name in WAVES else "crossbar"
    rate = RATES.get(name, 3e-4)
    chosen = method(name, SET.get(name, ()), die=0)
    assert chosen is not None
    options = Options(target=target, settings=(*SETTINGS, f"distill.lr={rate}"))
    place = folder / target
    done = distil_model(
        MODEL, place, options=options, choices=Choices(seconds=SECONDS, method=chosen, force=True)
    )
    with (place / "history.csv").open(newline="", encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]
    steps, work = done.manifest["steps"], chosen.rule.runs()
    stacks = done.manifest.get("stacks", {})
    return {
        "rule": name, "target": target,
        "trains": f"masks of {len(stacks)} layers" if stacks else "weights and biases",
        "lr": 1e-3 if stacks else rate, "steps": steps,
        "device_passes": steps * work.get("device", 0),
        "device_passes_back": steps * work.get("device_back", 0),
        "model_passes": steps * work.get("model", 0), "cpu_s": f"{done.cpu_s:.0f}",
        "kl_before": f"{done.manifest['start']['loss']:.4f}",
        "kl_after": f"{float(last['loss']):.4f}",
        "kl_best": f"{done.manifest['best']['loss']:.4f}", "best_step": done.manifest["best_step"],
    }  # fmt: skip


def write(rows: list[dict[str, Any]]) -> None:
    """The CSV, and the table in the page between its marks."""
    with CSV.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    head = "| rule | trains | steps | passes: device, back, model | KL before | after | best |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for r in rows:
        passes = f"{r['device_passes']}, {r['device_passes_back']}, {r['model_passes']}"
        name, losses = f"`{r['rule']}`", (r["kl_before"], r["kl_after"], r["kl_best"])
        lines.append(f"| {' | '.join((name, r['trains'], str(r['steps']), passes, *losses))} |")
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    body = "\n".join((MARKS[0], *lines, MARKS[1]))
    PAGE.write_text(before + body + after, encoding="utf-8")


def main(names: list[str]) -> None:
    """Measures and writes after every rule."""
    rows: dict[str, dict[str, Any]] = {}
    if names and CSV.is_file():
        with CSV.open(newline="", encoding="utf-8") as file:
            rows = {row["rule"]: dict(row) for row in csv.DictReader(file)}
    with tempfile.TemporaryDirectory() as folder:
        for name in names or list(rules.RULES):
            rows[name] = measure(name, Path(folder))
            print(*rows[name].values(), sep="\t", flush=True)
            write([rows[n] for n in rules.RULES if n in rows])


if __name__ == "__main__":
    main(sys.argv[1:])
