"""Whether a rotation stays: both models are quantised, and the better follower is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from pfmc.numbers import Data
from pfmc.passes import pipeline
from pfmc.passes.base import Context, Pass
from pfmc.passes.rotate import Rotate

if TYPE_CHECKING:
    from pfmc.passes.recipe import Calibration

APART = 1e-5
"""Largest difference that folding may make to the float model, over its largest output."""
_ENOUGH = 32  # sequences that judge


@dataclass(frozen=True)
class Chosen:
    """The model that stays, at stage CANONICAL, and what the report says about it."""

    model: ir.Model
    report: dict[str, Any]


def judged(passes: Sequence[Pass]) -> Rotate | None:
    """The first rotation of a recipe that is kept only if it helps."""
    return next((p for p in passes if isinstance(p, Rotate) and p.keep == "auto"), None)


def choose(
    model: ir.Model, rotate: Rotate, context: Context, quantise: Callable[[ir.Model], ir.Model],
    plan: Calibration, data: Data,
) -> Chosen:  # fmt: skip
    """Rotates a copy of `model`, quantises both, and keeps what follows `model` better.

    The measure is the KL divergence in nats a token on text that calibration has not seen (made
    from another seed, or the user's), of other models the square error relative to the outputs'
    power. What differs from `model` by more than `APART` before quantising is not kept.

    Args:
        model: at stage CANONICAL; stays as it is.
        rotate: the pass.
        context: of the passes.
        quantise: gives the model at stage QUANTISED; may change what it is given.
        plan: how much data.
        data: where it comes from.
    """
    rotated = model.clone()
    report = pipeline.run(rotated, [rotate], context).steps[0].report()
    if not report["changed"]:
        return _kept(model, report, "nothing could be rotated", {})
    if plan.source == "none":
        return _kept(model, report, "calibration.source is none, so nothing tells what helps", {})
    from pfmc.distill.calibrate import probe_batches
    from pfmc.distill.sensitivity import Meter
    from pfmc.distill.text import load_tokenizer

    tokenizer = None if data.tokenizer is None else load_tokenizer(data.tokenizer)
    feeds = probe_batches(
        model, tokenizer, text=data.text, inputs=data.inputs,
        count=min(plan.sequences, _ENOUGH), length=plan.length, seed=data.seed,
        progress=data.progress,
    )  # fmt: skip
    meter = Meter(model, feeds)
    apart = meter.apart(rotated)
    if not apart <= APART:
        reason = f"the float model changes by {apart:.1e} of its largest output"
        return _kept(model, report, reason, {"apart": apart})
    before, after = (meter.harm_of(quantise(m.clone())) for m in (model, rotated))
    found = {"apart": apart, "harm_before": before, "harm_after": after}
    data.progress(f"rotate: harm {before:.4g} as it is, {after:.4g} rotated")
    if not after < before:
        return _kept(model, report, f"harm rises from {before:.4g} to {after:.4g}", found)
    notes = {**report["notes"], **found, "kept": "rotated"}
    return Chosen(rotated, {**report, "notes": notes})


def _kept(model: ir.Model, report: dict[str, Any], reason: str, found: dict[str, float]) -> Chosen:
    """The model as it was."""
    declined = [*report["declined"], {"where": "model", "reason": reason}]
    notes = {**found, "kept": "as it was"}
    return Chosen(
        model, {**report, "changed": 0, "operators": {}, "declined": declined, "notes": notes}
    )
