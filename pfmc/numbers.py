"""Chooses the numbers of a canonical model for a target: scaling, bits, statistics, rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from pfmc.errors import UsageError
from pfmc.formats import Format
from pfmc.hardware import FixedLinear, LayerStatistics, Limits, QuantisedMatrix, Workload
from pfmc.passes import budget, pipeline
from pfmc.passes.base import Context
from pfmc.passes.quantise import Quantise
from pfmc.passes.recipe import Recipe
from pfmc.passes.scale import Scale
from pfmc.passes.solve import Shelf, solve
from pfmc.targets.base import Target
from pfmc.technology import Technology


@dataclass(frozen=True)
class Data:
    """Where calibration data comes from; see `pfmc.distill.calibrate.statistics_of`."""

    tokenizer: Path | None = None
    text: Path | None = None
    inputs: Path | None = None
    seed: int = 0
    progress: Callable[[str], None] = lambda _: None

    def keywords(self) -> dict[str, Any]:
        """For the functions of `pfmc.distill.calibrate`."""
        return dict(vars(self))


@dataclass(frozen=True)
class Numbers:
    """What was chosen.

    Attributes:
        options: the quantise pass that follows.
        statistics: of each layer; empty without calibration.
        matrices: of the layers that are rounded already.
        notes: for the report, by step.
    """

    options: Quantise
    statistics: Mapping[str, LayerStatistics] = field(default_factory=dict)
    matrices: Mapping[str, Callable[[], QuantisedMatrix]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def choose(
    model: ir.Model, plan: Recipe, limits: Limits, price: budget.Price, data: Data
) -> Numbers:
    """Scales `model` in place where it helps, then chooses bits and rounds what needs data.

    Args:
        model: at stage CANONICAL.
        plan: the recipe.
        limits: of the target.
        price: what a layer of given shape and bits takes of the recipe's budget.
        data: what it is calibrated on.

    Raises:
        UsageError: the recipe asks for what needs calibration and takes none, or the data do not
            fit the model.
        InfeasibleError: the budget cannot be met.
    """
    options = Quantise.of(plan)
    if plan.calibration.source == "none":
        _refuse_without_data(plan)
        return Numbers(options)
    from pfmc.distill import calibrate

    feeds = calibrate.feeds_of(model, plan.calibration, **data.keywords()) if (
        options.sequential or plan.quantise.scaling or plan.quantise.budget.metric != "none"
    ) else []  # fmt: skip
    notes: dict[str, Any] = {}
    if plan.quantise.scaling:
        notes["scale"] = _scaled(model, options, limits, feeds, data)
    if plan.quantise.budget.metric != "none":
        chosen = budget.choose(
            model, options, limits, plan.quantise.budget, price, feeds, data.progress
        )
        options, notes["budget"] = options.with_bits(chosen.bits), chosen.report()
    if options.sequential:
        statistics, shelf = solve(model, options, limits, feeds, data.seed, data.progress)
        return Numbers(options, statistics, shelf, notes)
    statistics = calibrate.statistics_of(
        model, plan.calibration, **data.keywords(), moments=options.compensates
    )
    return Numbers(options, statistics, Shelf(), notes)


def _refuse_without_data(plan: Recipe) -> None:
    section = plan.quantise
    asked = {
        "quantise.search=learned": section.search == "learned",
        "quantise.scaling=true": section.scaling,
        "quantise.budget": section.budget.metric != "none",
    }
    for name, is_asked in asked.items():
        if is_asked:
            raise UsageError(
                f"{name} needs calibration, and calibration.source is none",
                mend="set calibration.source=self",
            )


def _scaled(
    model: ir.Model, options: Quantise, limits: Limits, feeds: list[Any], data: Data
) -> dict[str, Any]:
    from pfmc.distill import calibrate

    statistics = calibrate.calibrate(model, feeds, moments=True)
    context = Context(limits=limits, seed=data.seed, statistics=statistics, progress=data.progress)
    outcome = pipeline.run(model, [Scale(options)], context)
    return outcome.steps[0].report()


def price_of(target: Target, technology: Technology, limits: Limits, context: int) -> budget.Price:
    """What `target` asks for one fixed linear: tiles, mm2, or pJ a token, nothing beside it."""

    @cache
    def price(metric: str, inputs: int, outputs: int, form: Format, group: int) -> float:
        if metric == "weight bits":
            return inputs * outputs * form.weight_bits(inputs, group)
        linear = _example(inputs, outputs, form, group, limits)
        summary = target.lower_linear(linear, technology).summary()
        if metric == "tiles":
            return float(summary.tiles)
        report = target.cost([summary], [], technology, Workload("decode", context, users=1))
        key, unit = {"area": ("area__total", "mm2"), "energy": ("energy__token", "pJ")}[metric]
        return float(report[key].to(unit)[1])

    return price


def _example(inputs: int, outputs: int, form: Format, group: int, limits: Limits) -> FixedLinear:
    """A layer of this shape and format with all codes 1."""
    groups = -(-inputs // (group or inputs))
    matrix = QuantisedMatrix(
        np.ones((inputs, outputs), np.int8), form.bits, np.ones((groups, outputs), np.float32),
        group or inputs, format=form.name,
    )  # fmt: skip
    one = np.ones(outputs, np.float32)
    seen = LayerStatistics(1.0, {0.5: 0.5, 1.0: 1.0}, np.ones(inputs), one, one, 1)
    step = 1.0 / (2 ** (limits.input_bits - 1) - 1) if limits.static_inputs else None
    return FixedLinear("example", matrix, None, limits.input_bits, step, seen)


def with_kv_bits(technology: Technology, plan: Recipe) -> Technology:
    """The technology whose KV memory has the recipe's width, so that it is priced so.

    Raises:
        UsageError: the technology has no KV memory of a stated width.
    """
    bits = plan.quantise.kv_bits
    if bits == "target":
        return technology
    held = technology.quantity("fabric.kv_bits")
    note = f"recipe: quantise.kv_bits; the technology's own is {held.value:g}"
    made = replace(held, values=(float(bits),), low=float(bits), high=float(bits), source=note)
    return replace(technology, constants={**technology.constants, "fabric.kv_bits": made})
