"""The registry of targets: literal, lazy, open to third parties by entry points."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from pfmc.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from pfmc.targets.base import Target

TARGETS = {
    "rom": "pfmc.targets.rom:RomTarget",
    "crossbar": "pfmc.targets.crossbar:CrossbarTarget",
    "optical": "pfmc.targets.optical:OpticalTarget",
}
"""kind -> ``module:class``."""


def kinds() -> dict[str, str]:
    """All kinds of hardware, ours and those of installed packages (group ``pfmc.targets``).

    Raises:
        UsageError: two packages claim the same kind.
    """
    known = dict(TARGETS)
    for point in sorted(entry_points(group="pfmc.targets"), key=lambda p: (p.name, p.value)):
        if known.get(point.name, point.value) != point.value:
            raise UsageError(
                f"two packages bring the target kind {point.name!r}",
                where=f"{known[point.name]} and {point.value}", mend="uninstall one of them",
            )  # fmt: skip
        known[point.name] = point.value
    return known


def get(kind: str) -> Target:
    """The target that lowers to `kind`.

    Raises:
        UsageError: no such kind; the message names the nearest.
    """
    known = kinds()
    if kind not in known:
        raise UsageError(f"no target lowers to kind {kind!r}", mend=did_you_mean(kind, known))
    module, _, name = known[kind].partition(":")
    target: Target = getattr(importlib.import_module(module), name)()
    return target
