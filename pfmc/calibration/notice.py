"""What an artifact says of the die it was calibrated for, and a warning where another is used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

KEY = "calibration"
"""In the manifest's configuration, where there is a calibration."""


def warning(config: Mapping[str, Any], dies: Iterable[int | None], age_s: float) -> str | None:
    """One line if the artifact was calibrated for another die or age than the ones used.

    A die of which measurements were given is none of the simulated ones.

    Args:
        config: of the manifest; dies: seeds, None is the ideal die; age_s: of them all.
    """
    held = config.get(KEY)
    if held is None:
        return None
    if held["data"]["measured"] is not None:
        return "warning: calibrated for a die that was measured, used with a simulated one"
    strange = [d for d in dies if d != held["die"]]
    if strange:
        named = ", ".join("the ideal die" if d is None else f"die {d}" for d in strange[:4])
        more = " …" if len(strange) > 4 else ""
        return f"warning: calibrated for die {held['die']}, used with {named}{more}"
    if age_s != held["age_s"]:
        return f"warning: calibrated at age {held['age_s']:g} s, used at {age_s:g} s"
    return None
