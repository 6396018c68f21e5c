"""Mixed precision: how many bits each layer gets under a limit, by what its rounding costs.

Each layer is rounded at each width (plain clip search, with moments compensation), and its harm is
measured with all other layers in floating point. Harms are taken to add up. Starting from the
narrowest widths, the step that lowers harm most for its price is taken until nothing fits: greedy
on the lower convex hull of each layer, which is optimal but for the last step of the multiple
choice knapsack (Sinha and Zoltners 1979).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pfmc.errors import InfeasibleError, UsageError
from pfmc.formats import Format
from pfmc.hardware import LayerStatistics, Limits
from pfmc.ir import vocabulary
from pfmc.layer_rounding import Seen, round_layer
from pfmc.passes.quantise import Quantise

if TYPE_CHECKING:
    from pfmc.passes.recipe import Budget

Price = Callable[[str, int, int, Format, int], float]
"""(metric, inputs, outputs, format, group) -> what the target asks for such a layer."""


@dataclass(frozen=True)
class Option:
    """One width of one layer: what it takes of the budget and what harm it does."""

    bits: int
    price: float
    harm: float


@dataclass(frozen=True)
class Chosen:
    """The widths, and everything they were chosen from.

    Attributes:
        bits: layer -> bits; options: layer -> all that could be chosen.
        metric: what is limited; most: the limit; spent: what the choice takes, in its unit.
        harm: the sum of the harms.
    """

    bits: Mapping[str, int]
    options: Mapping[str, tuple[Option, ...]]
    metric: str
    most: float
    spent: float
    harm: float

    def report(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "metric": self.metric, "most": self.most, "spent": self.spent, "harm": self.harm,
            "layers": {
                name: {
                    "bits": self.bits[name],
                    "harm_by_bits": {str(o.bits): o.harm for o in options},
                    "price_by_bits": {str(o.bits): o.price for o in options},
                }
                for name, options in self.options.items()
            },
        }  # fmt: skip


def choose(
    model: ir.Model, options: Quantise, limits: Limits, budget: Budget, price: Price,
    feeds: Sequence[Mapping[str, npt.NDArray[Any]]],
    progress: Callable[[str], None] = lambda _: None,
) -> Chosen:  # fmt: skip
    """Measures every layer at every width and chooses.

    Raises:
        InfeasibleError: even the narrowest widths exceed the limit; says what they take.
        UsageError: no width lies within the target's and the budget's limits.
    """
    low, high = limits.weight_bits
    widths = range(max(low, budget.least_bits), min(high, budget.most_bits) + 1)
    if not widths:
        raise UsageError(
            f"no width is within the budget's {budget.least_bits} to {budget.most_bits} bits and "
            f"the target's {low} to {high}",
            where="[quantise.budget]", mend="change least_bits or most_bits",
        )  # fmt: skip
    harms = _harms(model, options, limits, budget, widths, feeds, progress)
    tables: dict[str, tuple[Option, ...]] = {}
    total = 0
    for node in vocabulary.fixed_linears(model):
        name = str(node.name)
        inputs, outputs = _shape(node)
        total += inputs * outputs
        made = {}
        for bits in widths:
            plan = options.with_bits({name: bits}).plan_of(name, limits)
            cost = price(budget.metric, inputs, outputs, plan.form, plan.group)
            width = plan.form.bits  # of a format that fixes it always the same
            made[width] = Option(width, cost, harms[name][bits])
        tables[name] = tuple(made.values())
    scale = total if budget.metric == "weight bits" else 1.0
    found = knapsack(tables, budget.most * scale, scale)
    spent = sum(o.price for o in found.values())
    return Chosen(
        {n: o.bits for n, o in found.items()}, tables, budget.metric, budget.most, spent / scale,
        sum(o.harm for o in found.values()),
    )  # fmt: skip


def knapsack(
    tables: Mapping[str, tuple[Option, ...]], limit: float, unit: float = 1.0
) -> dict[str, Option]:
    """One option of each layer with the least harm within `limit`; ties go to the earlier layer.

    Raises:
        InfeasibleError: the cheapest options of all layers take more; speaks in units of `unit`.
    """
    hulls = {name: _hull(options) for name, options in tables.items()}
    place = dict.fromkeys(hulls, 0)
    spent = sum(hull[0].price for hull in hulls.values())
    if spent > limit * (1 + 1e-9):
        raise InfeasibleError(
            f"the narrowest widths take {spent / unit:.6g} of a budget of {limit / unit:.6g}",
            where="[quantise.budget]",
            mend=f"allow at least {_above(spent / unit)}, or fewer least_bits",
        )  # fmt: skip
    while True:
        steps = [
            (_slope(hull[place[n]], hull[place[n] + 1]), -i, n)
            for i, (n, hull) in enumerate(hulls.items())
            if place[n] + 1 < len(hull)
            and spent + hull[place[n] + 1].price - hull[place[n]].price <= limit * (1 + 1e-9)
        ]
        if not steps:
            return {n: hulls[n][i] for n, i in place.items()}
        name = max(steps)[2]
        hull, at = hulls[name], place[name]
        spent += hull[at + 1].price - hull[at].price
        place[name] += 1


def _above(value: float) -> str:
    """`value` in four digits, never less."""
    text = f"{value:.4g}"
    return text if float(text) >= value else f"{value * (1 + 1e-3):.4g}"


def _slope(one: Option, other: Option) -> float:
    extra = other.price - one.price
    return (one.harm - other.harm) / extra if extra > 0 else float("inf")


def _hull(options: Iterable[Option]) -> list[Option]:
    """The options on the lower convex hull of harm over price, cheapest first."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.price, o.harm)):
        if hull and option.harm >= hull[-1].harm:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _shape(node: ir.Node) -> tuple[int, int]:
    weight = node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    inputs, outputs = weight.const_value.shape.numpy()
    return int(inputs), int(outputs)


# -- harm ------------------------------------------------------------------------------------------


def _harms(
    model: ir.Model, options: Quantise, limits: Limits, budget: Budget, widths: range,
    feeds: Sequence[Mapping[str, npt.NDArray[Any]]], progress: Callable[[str], None],
) -> dict[str, dict[int, float]]:  # fmt: skip
    from pfmc.distill import calibrate
    from pfmc.distill.sensitivity import Meter

    statistics = calibrate.calibrate(model, feeds, moments=True)
    meter = Meter(model, feeds) if budget.sensitivity == "kl" else None
    found: dict[str, dict[int, float]] = {}
    for node in vocabulary.fixed_linears(model):
        name = str(node.name)
        assert node.inputs[1] is not None
        assert node.inputs[1].const_value is not None
        weight = node.inputs[1].const_value.numpy()
        seen = _seen(statistics.get(name))
        found[name] = {}
        for bits in widths:
            plan = options.with_bits({name: bits}).plan_of(name, limits)
            matrix = round_layer(weight, plan.form, plan.group, plan.search, seen)
            if meter is None:
                harm = float(matrix.diagnostics.get("code_error_relative", 0.0))
            else:
                harm = meter.harm(name, np.asarray(matrix.weights()))
            found[name][bits] = max(harm, 0.0)
        progress(f"budget: {name}: " + ", ".join(f"{b} {h:.3g}" for b, h in found[name].items()))
    return found


def _seen(statistics: LayerStatistics | None) -> Seen:
    if statistics is None:
        return Seen()
    return Seen(statistics.input_power, statistics.input_moment)
