"""The tables of docs/ that show measured figures, from the CSV files that lie there."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

DOCS: Final = Path(__file__).resolve().parent.parent / "docs"
Row = dict[str, str]
Table = Callable[[Sequence[str], Iterable[Sequence[str]]], str]


def rows(name: str) -> list[Row]:
    """The rows of a file; none if it is not there."""
    path = DOCS / name
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def distilled(table: Table) -> str:
    """Perplexity ratios before and after distillation."""
    head = ("row", "model, target", "before", "after (95 %)", "worst die", "recovered", "goal",
            "steps, CPU s")  # fmt: skip
    return table(head, (_distilled(r) for r in rows("distil_figures.csv")))


def _distilled(r: Row) -> Sequence[str]:
    goal = "70 % recovered" if r["goal"] == "nan" else r["goal"]
    met = float(r["recovered"]) >= 0.7 if r["goal"] == "nan" else float(r["after"]) <= float(goal)
    several = int(r["dies"]) > 1
    return (
        f"`{r['row']}`", f"{r['model']}, `{r['target']}`", r["before"],
        _between(r["after"], r["after_low"], r["after_high"]), r["worst_die"] if several else "",
        f"{float(r['recovered']):.0%}", f"{goal}: {_met(met)}", f"{r['steps']}, {r['cpu_s']}",
    )  # fmt: skip


def encoders(table: Table) -> str:
    """Cosine and rank correlation of the distilled encoder."""
    head = ("row", "target", "cosine before", "cosine (95 %)", "goal", "1st percentile",
            "rho less float's (95 %)", "goal", "steps, CPU s")  # fmt: skip
    return table(head, (_encoder(r) for r in rows("distil_encoder.csv")))


def _encoder(r: Row) -> Sequence[str]:
    cosine, rho = float(r["cosine"]), float(r["rho"])
    return (
        f"`{r['row']}`", f"`{r['target']}`", r["cosine_before"],
        _between(r["cosine"], r["cosine_low"], r["cosine_high"]),
        f"{r['cosine_goal']}: {_met(cosine >= float(r['cosine_goal']))}", r["cosine_p1"],
        _between(r["rho"], r["rho_low"], r["rho_high"]),
        f"{r['rho_goal']}: {_met(rho >= float(r['rho_goal']))}", f"{r['steps']}, {r['cpu_s']}",
    )  # fmt: skip


def corrected(table: Table) -> str:
    """One die before and after correction; recovery is counted from the quantised model's loss."""
    found = rows("calibrate.csv")
    head = ("model", "technology, age", "base", "procedure", "ratio before", "ratio after (95 %)",
            "recovered of all that was lost", "CPU s")  # fmt: skip
    lost = {_case(r): float(r["excess_before"]) for r in found if r["base"] == "quantised"}
    return table(head, (_corrected(r, lost[_case(r)]) for r in found))


def _case(r: Row) -> tuple[str, ...]:
    return r["model"], r["technology"], r["age"]


def _corrected(r: Row, lost: float) -> Sequence[str]:
    after = _between(r["ratio_after"], r["ratio_low"], r["ratio_high"])
    return (
        r["model"], f"`{r['technology']}`, {r['age']}", r["base"], r["procedure"],
        f"{float(r['ratio_before']):.3f}", after,
        f"{1 - float(r['excess_after']) / lost:.1%}", r["cpu_s"],
    )  # fmt: skip


def drift(table: Table) -> str:
    """One die over its age, by what is done about it."""
    head = ("model", "age", "untouched", "calibrated at 1 s", "gain refitted", "all refitted")
    found: dict[tuple[str, str], dict[str, str]] = {}
    for r in rows("calibrate_drift.csv"):
        entry = found.setdefault((r["model"], r["age"]), {"": f"{float(r['ratio_before']):.3f}"})
        entry[r["procedure"]] = _between(r["ratio_after"], r["ratio_low"], r["ratio_high"])
    kinds = ("", "calibrated at 1 s", "gain refitted", "refitted")
    return table(head, ((*key, *(e.get(k, "") for k in kinds)) for key, e in found.items()))


def ablation(table: Table) -> str:
    """What is lost when an ingredient of distillation is left out."""
    found = rows("distil_ablation.csv")
    whole = {_group(r): float(r["kl"]) for r in found if r["line"].endswith(": all")}
    head = ("", "left out", "KL after (nats)", "sd over seeds", "to all of them", "CPU s")
    return table(head, (_ablation(r, whole) for r in found))


def _group(r: Row) -> str:
    return r["line"].split(":")[0]


def _ablation(r: Row, whole: dict[str, float]) -> Sequence[str]:
    change = float(r["kl"]) / whole[_group(r)] - 1
    return (
        _group(r), r["line"].split(": ")[1], r["kl"], r["kl_sd"],
        "" if r["line"].endswith(": all") else f"{change:+.0%}", r["cpu_s"],
    )  # fmt: skip


def _between(value: str, low: str, high: str) -> str:
    if not low or not high or math.isnan(float(low)):
        return f"**{float(value):.4f}**"
    return f"**{float(value):.4f}** [{float(low):.4f}, {float(high):.4f}]"


def _met(met: bool) -> str:
    return "reached" if met else "missed"
