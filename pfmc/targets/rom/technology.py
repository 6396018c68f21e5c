"""What a read-only-weight technology states, and which values are impossible."""

from __future__ import annotations

from typing import Final

from pfmc import formats
from pfmc.errors import UsageError
from pfmc.hardware import Limits
from pfmc.targets.fabric.keys import FABRIC_KEYS
from pfmc.technology import Technology

KEYS: Final[dict[str, str]] = {
    **FABRIC_KEYS,
    "array.tile_inputs": "1",
    "array.tile_outputs": "1",
    "array.weight_bits_min": "bit",
    "array.weight_bits_max": "bit",
    "array.input_bits": "bit",
    "array.binary_above": "weight",
    "array.lane_energy_floor": "1",
    "array.lane_area_floor": "1",
    "array.io_fraction": "1",
    "array.bank_efficiency": "1",
    "masks.weight": "mask",
    "masks.units": "mask",
}
"""Constant -> a unit of its dimensions."""


def check(technology: Technology) -> None:
    """Refuses a technology that is incomplete or impossible.

    Raises:
        UsageError: says which constant, and what it may be.
    """
    technology.require(KEYS)
    low, high = (technology.integer(f"array.weight_bits_{end}") for end in ("min", "max"))
    _demand(technology, 2 <= low <= high <= 8, "weight bits are 2 to 8, smallest first")
    _demand(technology, 2 <= technology.integer("array.input_bits") <= 8, "input bits are 2 to 8")
    outputs, inputs = (technology.integer(f"array.tile_{side}") for side in ("outputs", "inputs"))
    _demand(technology, inputs >= 1, "a tile has at least one input")
    _demand(technology, outputs >= 8 and outputs % 8 == 0, "tile outputs are a multiple of 8")
    _demand(technology, technology.number("masks.weight") <= technology.number("masks.units"),
            "weight-dependent masks are among all masks")  # fmt: skip
    _demand(technology, technology.number("fabric.clock") > 0, "the clock is above zero")


def _demand(technology: Technology, holds: bool, rule: str) -> None:
    if not holds:
        raise UsageError(f"impossible technology: {rule}", where=technology.name, mend=rule)


def limits(technology: Technology) -> Limits:
    """What the quantiser must respect."""
    return Limits(
        weight_bits=(
            technology.integer("array.weight_bits_min"),
            technology.integer("array.weight_bits_max"),
        ),
        input_bits=technology.integer("array.input_bits"),
        output_bits=0,
        tile_inputs=technology.integer("array.tile_inputs"),
        tile_outputs=technology.integer("array.tile_outputs"),
        static_inputs=False,
        formats=formats.NAMES,
    )
