"""Experts at level 3: each on the rows that the float model's own routing sends to it.

A router's choice may fall otherwise in quantised hardware, so the rows of an expert inside the
simulated model are not those inside the source, and no value of the source holds its output by
itself. Therefore the source is brought to canonical form and run in float; its outputs are held
against the judge's, and the hardware of each expert gets the rows that this run gave it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from pfmc import ingest
from pfmc.distill.student import Student
from pfmc.ir import provenance, routing, vocabulary
from pfmc.passes import pipeline
from pfmc.passes import recipe as recipes
from pfmc.simulate import Machine
from pfmc.verification import Row

Array = npt.NDArray[Any]
Rows = tuple[Tensor, Tensor]
FeedsFor = Callable[[ir.Model], Mapping[str, Array]]

PLAIN = "stream"
"""The recipe that only brings a model to canonical form."""
AGREEMENT = 1e-3
"""Largest error of the float model's outputs relative to their largest."""


def expert_rows(
    machine: Machine, source: Path, feeds: FeedsFor, truth: Mapping[str, Array],
    limit: float | None,
) -> list[Row]:  # fmt: skip
    """The error of each expert that got rows, the worst of them, and how true the float model is.

    Empty where the machine has no experts.

    Args:
        machine: the artifact; source: what it was compiled from, merged with its adapter.
        feeds: makes the feeds of the canonical source; truth: what the judge makes of the source's.
        limit: largest error of an expert, or None.
    """
    names = {n for group in routing.groups(machine.student.model) for n in group}
    if not names:
        return []
    heard, results = _float_run(source, feeds)
    shared = [n for n, a in truth.items() if n in results and a.dtype.kind == "f"]
    apart = max((_apart(results[n], truth[n]) for n in shared), default=float("nan"))
    errors = {n: _error(machine, n, *heard[n]) for n in sorted(names & set(heard))}
    unit = "relative RMS error on the float model's rows"
    rows = [Row(f"expert {n}", e, unit=unit) for n, e in errors.items()]
    if errors:
        worst = max(errors, key=lambda n: errors[n])
        rows.append(Row(f"worst expert ({worst})", errors[worst], limit, unit=unit))
    idle = len(names) - len(errors)
    rows.append(Row("experts without rows", float(idle), unit="layers"))
    rows.append(Row("float model of the experts", apart, AGREEMENT, unit="of the largest output"))
    return rows


def _float_run(source: Path, feeds: FeedsFor) -> tuple[dict[str, Rows], dict[str, Array]]:
    """The rows of every fixed linear of the canonical float model, and the model's outputs."""
    model = ingest.load(source).model
    passes = recipes.load(PLAIN, ()).passes
    student = Student(pipeline.canonicalise(model, passes).model).eval()
    heard: dict[str, Rows] = {}

    def listen(name: str, x: Tensor, y: Tensor) -> None:
        if x.numel():
            heard[name] = (x, y)

    student.observe = listen
    with torch.inference_mode():
        results = student(**feeds(student.model))
    return heard, {k: v.numpy() for k, v in results.items()}


def _apart(ours: Array, truth: Array) -> float:
    top = float(np.abs(truth).max(initial=0.0))
    return float(np.abs(ours - truth).max(initial=0.0)) / (top or 1.0)


def _error(machine: Machine, name: str, x: Tensor, wanted: Tensor) -> float:
    with torch.inference_mode():
        found = machine.student.linears[name](x)
        if (factors := _side_path(machine, name)) is not None:
            found = found + x @ factors[0] @ factors[1]
    power = float(wanted.double().square().mean().sqrt())
    return float((found - wanted).double().square().mean().sqrt()) / (power or 1.0)


def _side_path(machine: Machine, name: str) -> tuple[Tensor, Tensor] | None:
    """The factors of an expert's adapter: ``down[in, rank]`` and ``up[rank, out]``."""
    for node in machine.student.model.graph:
        ours = vocabulary.is_op(node, vocabulary.SIDE_PATH, vocabulary.DOMAIN)
        if ours and provenance.scope(node) == name:
            parts = [v.const_value for v in node.inputs[2:] if v is not None]
            down, up = (torch.tensor(np.asarray(t.numpy())) for t in parts if t is not None)
            return down, up
    return None
