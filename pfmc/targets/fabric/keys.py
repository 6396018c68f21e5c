"""The constants that a technology with a digital fabric states, and how work is looked up."""

from __future__ import annotations

from typing import Final

from pfmc.hardware import FabricOp

_ENERGIES = ("mac8", "mac16", "add", "mul", "table", "exp", "root", "control")
_AREAS = ("mac8", "mac16", "add", "mul", "table", "exp", "root")

FABRIC_KEYS: Final[dict[str, str]] = {
    "fabric.clock": "Hz",
    "fabric.word_bits": "bit",
    "fabric.kv_bits": "bit",
    "fabric.embedding_bits": "bit",
    "fabric.vector_lanes": "1",
    "fabric.product_lanes": "1",
    "fabric.attention_positions": "1",
    "fabric.depth": "cycle",
    "fabric.hop": "mm",
    "fabric.utilisation": "1",
    **{f"fabric.energy_{name}": "J" for name in _ENERGIES},
    "fabric.energy_sram": "J/bit",
    "fabric.energy_rom": "J/bit",
    "fabric.energy_wire": "J/bit/mm",
    "fabric.energy_clock": "J/mm2/cycle",
    "fabric.leakage": "W/mm2",
    **{f"fabric.area_{name}": "um2" for name in _AREAS},
    "fabric.sram_cell": "um2/bit",
    "fabric.sram_efficiency": "1",
    "fabric.rom_cell": "um2/bit",
    "fabric.rom_efficiency": "1",
    "fabric.wafer_price": "USD",
    "fabric.wafer_diameter": "mm",
    "fabric.defect_density": "1/cm2",
    "fabric.reticle_area": "mm2",
    "fabric.package_test": "USD",
    "fabric.mask_set": "USD",
}
"""Constants of `targets/fabric_*.toml`; a target's own `check` requires these and its own."""

PER_CONTEXT: Final = "_per_context"
"""Suffix of work that is multiplied by the context length."""


SINK: Final = "pfmc.sink"
"""Metadata of an attention one of whose keys is a sink: no position, and not remembered."""

WINDOW: Final = "window"
"""Work key of a local attention: positions seen; the context counts for no more of them."""


BESIDE: Final = "beside"
"""Work key of an operation that works at the same time as another one, and adds no time."""


def at(op: FabricOp, key: str, context: float) -> float:
    """The work `key` of one position of `op` at `context` positions."""
    seen = min(context, op.work.get(WINDOW, context))
    return op.work.get(key, 0.0) + op.work.get(key + PER_CONTEXT, 0.0) * seen
