"""The crossbar target: the protocol's functions, each in its own room."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pfmc.cost import CostReport
from pfmc.hardware import FabricOp, FixedLinear, LayerSummary, Limits, TiledLinear, Workload
from pfmc.netlist import Module
from pfmc.targets.base import Check, Die, StoredLinear
from pfmc.targets.crossbar import cells, cost, lower, verify
from pfmc.targets.crossbar.technology import check, design
from pfmc.technology import Technology

if TYPE_CHECKING:
    import torch

    from pfmc.targets.crossbar.train import CrossbarTwin


class CrossbarTarget:
    """Fixed weights as conductances of memory devices, read as currents (Kirchhoff's law)."""

    kind = "crossbar"
    exact = False

    def check(self, technology: Technology) -> None:
        """Refuses an incomplete (UsageError) or impossible (InfeasibleError) technology."""
        check(technology)

    def limits(self, technology: Technology) -> Limits:
        """Codes of 2 bits to ``array.weight_bits``; converters of static range."""
        t = technology
        return Limits(
            weight_bits=(2, t.integer("array.weight_bits")),
            input_bits=t.integer("dac.bits"), output_bits=t.integer("adc.bits"),
            tile_inputs=t.integer("array.tile_rows"),
            tile_outputs=t.integer("array.tile_columns"), static_inputs=True,
        )  # fmt: skip

    def lower_linear(self, linear: FixedLinear, technology: Technology) -> TiledLinear:
        """See `pfmc.targets.crossbar.lower.lower_linear`."""
        return lower.lower_linear(linear, design(technology), technology)

    def definition(self, layer: LayerSummary, technology: Technology) -> Module:
        """See `pfmc.targets.crossbar.cells.definition`."""
        return cells.definition(layer, technology)

    def cost(
        self,
        layers: Sequence[LayerSummary],
        fabric: Sequence[FabricOp],
        technology: Technology,
        workload: Workload,
    ) -> CostReport:
        """See `pfmc.targets.crossbar.cost.report`."""
        return cost.report(layers, fabric, technology, workload)

    def layer(self, stored: StoredLinear, technology: Technology, die: Die) -> torch.nn.Module:
        """See `pfmc.targets.crossbar.simulate.CrossbarLinear`."""
        from pfmc.targets.crossbar.simulate import CrossbarLinear

        return CrossbarLinear(stored, design(technology), die)

    def twin(self, linear: FixedLinear, technology: Technology) -> CrossbarTwin:
        """See `pfmc.targets.crossbar.train.CrossbarTwin`."""
        from pfmc.targets.crossbar.train import CrossbarTwin

        numbers = design(technology)
        return CrossbarTwin(linear, numbers, lower.lower_linear(linear, numbers, technology))

    def verify(self, stored: StoredLinear, hardware: Path, technology: Technology) -> list[Check]:
        """See `pfmc.targets.crossbar.verify.verify`."""
        return verify.verify(stored, hardware, design(technology))
