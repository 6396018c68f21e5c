"""Takes in a user's ONNX file: guards, reads, makes uniform and stamps provenance."""

from __future__ import annotations

from pfmc.ingest.load import Loaded, load

__all__ = ["Loaded", "load"]
