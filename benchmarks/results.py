"""Renders docs/results.md from docs/results.json: no figure in it is written by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pfmc.report.format import quantity

Row = Mapping[str, Any]

HEAD = """# Measured accuracy

Written by `python -m benchmarks.accuracy` from `docs/results.json`; do not edit. The truth is ONNX
Runtime (graph optimisation BASIC) on the untouched input file, in float32. Each row is compiled
with the recipe named and simulated with all the physics of the target on die 0, which is new and
reads noisily. Brackets are 95 % intervals over windows (Student's t, paired). Costs are the
typical values of the cost report, for the context the recipe assumes; their ranges stand in the
report of each artifact.
"""
TITLES = {
    "bard": "bard (`models/bard/model.onnx`, 1.2 M parameters, Llama)",
    "bard_kv": "bard with KV memory (`models/bard/model_kv.onnx`)",
    "stories260K": "stories260K (a Llama of 260,032 parameters, trained to saturation)",
}


def render(held: Mapping[str, Any]) -> str:
    """The whole file."""
    parts = [HEAD]
    parts += [_language(t, held[name]) for name, t in TITLES.items() if name in held]
    if "stsb" in held:
        parts.append(_stsb(held["stsb"]))
    if "zoo" in held:
        parts.append(_zoo(held["zoo"]))
    return "\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _command(section: Row) -> str:
    return f"`{section['command']}`"


def _cost(row: Row, *names: str) -> str:
    for name in names:
        if (found := row.get("cost", {}).get(name)) is not None:
            return quantity(float(found["typical"]), str(found["unit"]))
    return ""


def _ratio(found: Row) -> str:
    return f"{found['ratio']:.4f} [{found['low']:.4f}, {found['high']:.4f}]"


# -- language models -----------------------------------------------------------------------------


def _language(title: str, section: Row) -> str:
    rows = section["rows"]
    own = rows[0]["self"]
    lines = [
        f"## {title}\n\n{_command(section)}\n",
        f"{own['tokens']:,} tokens that the model wrote itself (seed 1); its perplexity there is "
        f"{own['perplexity']:.3f}.",
    ]
    if "text" in rows[0]:
        text = rows[0]["text"]
        lines[-1] += (
            f" Text: {text['tokens']:,} tokens of its corpus file, perplexity "
            f"{text['perplexity']:.3f}."
        )
    lines.append("\n" + _table(*_language_table(rows)) + "\n")
    if any("dies" in row for row in rows):
        lines.append(_table(*_die_table(rows)) + "\n")
    return "\n".join(lines)


def _language_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    text = any("text" in row for row in rows)
    head = ["target", "recipe", "perplexity ratio", *(["on text"] if text else []), "KL (nats)",
            "top-1", "energy/token", "tokens/s (one user)", "area", "optics"]  # fmt: skip
    body = [
        [
            row["target"], row["recipe"], _ratio(row["self"]),
            *([_ratio(row["text"])] if text else []),
            f"{row['self']['kl']:.5f}", f"{row['self']['top1']:.3f}", _cost(row, "energy__token"),
            _cost(row, "throughput__user"), _cost(row, "area__total"), _cost(row, "volume__optics"),
        ]
        for row in rows
    ]  # fmt: skip
    return head, body


def _die_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Excess loss of the ideal die and of the others: a perplexity ratio is exp(excess)."""
    head = ["target", "ideal die: ratio", "dies", "mean ratio", "sd", "worst", "mean KL",
            "sd of KL"]  # fmt: skip
    body = []
    for row in (r for r in rows if "dies" in r):
        ratios = np.array([d["ratio"] for d in row["dies"]])
        kl = np.array([d["kl"] for d in row["dies"]])
        body.append([
            row["target"], _ratio(row["ideal"]), str(len(ratios)), f"{ratios.mean():.4f}",
            f"{_deviation(ratios):.4f}", f"{ratios.max():.4f}", f"{kl.mean():.5f}",
            f"{_deviation(kl):.5f}",
        ])  # fmt: skip
    return head, body


def _deviation(values: Any) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


# -- encoders and the zoo --------------------------------------------------------------------------


def _stsb(section: Row) -> str:
    rows = section["rows"]
    head = ["target", "recipe", "Spearman", "mean cosine", "1st percentile", "ideal die: cosine",
            "energy/position", "area", "optics"]  # fmt: skip
    body = [
        [
            r["target"], r["recipe"], f"{r['spearman']:.4f}", f"{r['cosine']:.4f}",
            f"{r['cosine_p1']:.4f}", f"{r['ideal']['cosine']:.4f}" if "ideal" in r else "",
            _cost(r, "energy__token"), _cost(r, "area__total"), _cost(r, "volume__optics"),
        ]
        for r in rows
    ]  # fmt: skip
    return (
        "## all-MiniLM-L6-v2 on the STS benchmark (a BERT of 22.7 M parameters)\n\n"
        f"{_command(section)}\n\n{rows[0]['pairs']} test pairs, drawn by seed 0 from the part of "
        "the test set that is free to use (MSRpar and MSRvid are left out, so figures do not "
        "compare with those of the whole set); mean pooling and cosine; calibrated on 128 "
        "sentences of the training file. Cosine is to the float model's embedding of the same "
        "sentence. Spearman's rho alone is a poor judge: it "
        "hardly moves while embeddings already turn.\n\n" + _table(head, body) + "\n"
    )


def _zoo(section: Row) -> str:
    head = ["file", "target", "median layer error", "worst layer", "cosine", "KL (nats)", "top-1",
            "thresholds"]  # fmt: skip
    return (
        "## The zoo: tiny random models of several exporters\n\n"
        f"{_command(section)}\n\nRandom weights make almost flat outputs, so a failed threshold "
        "says little; layer errors (relative RMS, inside the running model) do. Layers of 32 or "
        "fewer inputs average little noise away.\n\n"
        + _table(head, list(map(_zoo_row, section["rows"]))) + "\n"
    )


def _zoo_row(row: Row) -> list[str]:
    if "error" in row:
        return [row["file"], row["target"], row["error"], *[""] * 5]
    return [row["file"], row["target"], f"{row['median']:.4f}", f"{row['worst']:.4f}",
            *_numbers(row), "pass" if row["passed"] else "fail"]  # fmt: skip


def _numbers(row: Row) -> Iterator[str]:
    for key, places in (("cosine", 4), ("kl", 5), ("top1", 3)):
        yield "" if row[key] is None else f"{row[key]:.{places}f}"
