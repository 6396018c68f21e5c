"""Fixed weights as light: passive tiles of written glass between modulators and receivers."""

from __future__ import annotations

from pfmc.targets.optical.target import OpticalTarget

__all__ = ["OpticalTarget"]
