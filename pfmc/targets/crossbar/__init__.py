"""Fixed weights as conductances: analog crossbar tiles between pulse drivers and converters."""

from __future__ import annotations

from pfmc.targets.crossbar.target import CrossbarTarget

__all__ = ["CrossbarTarget"]
