"""Yield, dies and dollars: Murphy's model, dies a wafer, good-die cost, weight-dependent masks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from pfmc.cost import Metric, Term, ratio, total
from pfmc.quantity import Estimate
from pfmc.technology import Technology

USED: Final = frozenset(
    f"fabric.{k}" for k in ("wafer_price", "wafer_diameter", "defect_density", "package_test")
)


def murphy(area_m2: float, defects_per_m2: float) -> float:
    """Yield of a die by Murphy's model, ``((1 - exp(-A D)) / (A D))**2``."""
    load = area_m2 * defects_per_m2
    return (-math.expm1(-load) / load) ** 2 if load else 1.0


def dies_per_wafer(area_m2: float, diameter_m: float) -> float:
    """Whole dies a wafer, ``pi (d/2)² / A - pi d / sqrt(2 A)``; at least one."""
    gross = math.pi * (diameter_m / 2) ** 2 / area_m2 - math.pi * diameter_m / math.sqrt(
        2 * area_m2
    )
    return max(gross, 1.0)


def good_die(area_m2: float, wafer: float, defects_per_m2: float, diameter_m: float) -> float:
    """Dollars for one good die of `area_m2` from a wafer of price `wafer`."""
    good = dies_per_wafer(area_m2, diameter_m) * murphy(area_m2, defects_per_m2)
    return wafer / good


def dies(area: Estimate, technology: Technology) -> Estimate:
    """Dies at the reticle limit that hold `area`."""
    reticle = technology.number("fabric.reticle_area")
    return _through(lambda a: float(max(1, math.ceil(a / reticle))), area, {"fabric.reticle_area"})


def unit_cost(area: Estimate, technology: Technology) -> Metric:
    """Manufacturing cost of one unit whose dies have `area` in all, packaged and tested."""
    count = dies(area, technology)
    wafer = technology["fabric.wafer_price"] + technology["fabric.package_test"]
    defects, diameter = technology["fabric.defect_density"], technology["fabric.wafer_diameter"]

    def cost(end: str) -> float:
        area_m2, number = getattr(area, end), getattr(count, end)
        return float(
            number
            * good_die(
                area_m2 / number, getattr(wafer, end), getattr(defects, end), diameter.typical
            )
        )

    value = Estimate(cost("low"), cost("typical"), cost("high"), wafer.dims, area.constants | USED)
    text = "dies * (fabric.wafer_price + fabric.package_test) / (dies a wafer * Murphy yield)"
    return total("cost__unit", [Term("dies", value, text)])


def masks(technology: Technology) -> Metric:
    """Cost of the masks that hold the weights: ``masks.weight`` of ``masks.units`` of a set."""
    share = technology["masks.weight"] / technology["masks.units"]
    text = "fabric.mask_set * masks.weight / masks.units"
    return ratio("cost__nre", technology["fabric.mask_set"] * share, text)


def _through(function: Callable[[float], float], value: Estimate, constants: set[str]) -> Estimate:
    """A growing function of an estimate, end by end; the result has no dimension."""
    return Estimate(
        function(value.low), function(value.typical), function(value.high),
        constants=value.constants | constants,
    )  # fmt: skip
