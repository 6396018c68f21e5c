"""Training rules compared on one mismatched twin: ``python -m benchmarks.rules``.

Writes docs/rules.csv (and docs/rules.svg if altair is there): cosine of each rule's gradient to the
device's true one, the device's accuracy after training by it, and what a gradient costs.
"""

from __future__ import annotations

import csv
import math
import sys
import time
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks import mismatched
from pfmc.distill import rules
from pfmc.distill.rules.base import Problem, cosine
from pfmc.distill.rules.zeroth import spsa_cosine

DOCS: Final = Path(__file__).resolve().parent.parent / "docs"
STEPS, BATCH, TEST = 300, 128, 4096
OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "noise-aware": {"draws": 4},
    "spsa": {"probes": 100},
    "evolution": {"pairs": 100},
}
FIELDS: Final = (
    "network", "rule", "cosine", "cosine_sd", "accuracy", "accuracy_sd", "device_passes",
    "device_passes_back", "model_passes", "cpu_s",
)  # fmt: skip
DIES: Final = 3


def train(whole: Problem, rule: rules.Rule, steps: int, rate: float) -> float:
    """Trains on the device by `rule`; its accuracy on held-out samples."""
    adam = torch.optim.Adam(whole.flat().values(), lr=rate)
    for step in range(steps):
        found = rule.gradient(whole, mismatched.data(BATCH, 100 + step), seed=step)
        for name, p in whole.flat().items():
            p.grad = found[name]
        adam.step()
        for group in adam.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * (step + 1) / steps))
    return mismatched.accuracy(whole, mismatched.data(TEST, 1))


def row(network: str, name: str) -> dict[str, Any]:
    """What one rule reaches, over `DIES` dies."""
    make = mismatched.wave_problem if network == "masks" else mismatched.problem
    rule = rules.make(name, OPTIONS.get(name))
    start = time.process_time()
    cosines, reached = [], []
    for die in range(DIES):
        whole, batch = make(die), mismatched.data(256, 1)
        found = rule.gradient(whole, batch, seed=die)
        cosines.append(cosine(found, mismatched.true_gradient(whole, batch)))
        reached.append(_accuracy(whole, rule, name))
    c, a = torch.tensor(cosines), torch.tensor(reached)
    work = rule.runs()
    return {
        "network": network, "rule": name,
        "cosine": f"{c.mean():.4f}", "cosine_sd": f"{c.std():.4f}",
        "accuracy": f"{a.mean():.4f}", "accuracy_sd": f"{a.std():.4f}",
        "device_passes": work.get("device", 0), "device_passes_back": work.get("device_back", 0),
        "model_passes": work.get("model", 0), "cpu_s": f"{time.process_time() - start:.1f}",
    }  # fmt: skip


def _accuracy(whole: Problem, rule: rules.Rule, name: str) -> float:
    if name != "local":
        return train(whole, rule, STEPS, 5e-3)
    return local_accuracy(whole, rule, STEPS)


def local_accuracy(whole: Problem, rule: rules.Rule, steps: int) -> float:
    """Local rules train no read-out: the accuracy of a ridge read-out of the hidden layers."""
    train(whole, rule, steps, 5e-3)
    return readout_accuracy(whole)


def readout_accuracy(whole: Problem) -> float:
    """Accuracy of a ridge regression from what the hidden layers say on the device."""
    from pfmc.distill.rules.base import record

    def hidden(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        seen = record(whole.measured(), batch)[1]
        wide = torch.cat([torch.tanh(seen[n][1]) for n in mismatched.LAYERS[:-1]], dim=1)
        return torch.cat([wide, torch.ones(len(wide), 1)], dim=1).double()

    train_batch, test = mismatched.data(TEST, 2), mismatched.data(TEST, 1)
    h = hidden(train_batch)
    target = torch.nn.functional.one_hot(train_batch["label"], mismatched.SIZES[-1]).double()
    ridge = 1e-2 * len(h) * torch.eye(h.shape[1], dtype=torch.float64)
    readout = torch.linalg.solve(h.T @ h + ridge, h.T @ target)
    return float(((hidden(test) @ readout).argmax(1) == test["label"]).float().mean())


def table() -> list[dict[str, Any]]:
    """Every rule on the network it can train."""
    plain = [n for n in rules.RULES if n not in ("adjoint", "echo")]
    waves = ["in-silico", "physics-aware", "spsa", "adjoint", "echo"]
    return [row("layers", n) for n in plain] + [row("masks", n) for n in waves]


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Cosine and accuracy of every rule side by side."""
    import altair

    values = [
        {"where": f"{r['rule']} ({r['network']})", "network": r["network"],
         "cosine": float(r["cosine"]), "error": 1 - float(r["accuracy"])} for r in rows
    ]  # fmt: skip
    order = [v["where"] for v in values]
    base = altair.Chart(altair.Data(values=values)).encode(
        y=altair.Y("where:N", sort=order, title=None, axis=altair.Axis(labelLimit=220)),
        color=altair.Color("network:N", legend=None),
    )
    bars = base.mark_bar().encode(
        x=altair.X("cosine:Q", title="cosine to the device's true gradient")
    )
    errors = base.mark_bar().encode(
        x=altair.X("error:Q", title="device error after 300 steps", axis=altair.Axis(format="%")),
        y=altair.Y("where:N", sort=order, title=None, axis=None),
    )
    (bars.properties(width=280) | errors.properties(width=280)).save(str(path))


def main() -> None:
    """Measures and writes."""
    torch.set_num_threads(1)
    rows = table()
    with (DOCS / "rules.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for r in rows:
        print(*(r[k] for k in FIELDS), sep="\t")
    print(f"SPSA in theory: {spsa_cosine(100, 4426):.4f}")
    try:
        picture(rows, DOCS / "rules.svg")
    except ImportError:
        print("no picture: pip install altair vl-convert-python", file=sys.stderr)


if __name__ == "__main__":
    main()
