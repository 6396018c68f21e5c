"""The optical target: the protocol's functions, each in its own room."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pfmc.cost import CostReport
from pfmc.hardware import FabricOp, FixedLinear, LayerSummary, Limits, TiledLinear, Workload
from pfmc.netlist import Module
from pfmc.targets.base import Check, Die, StoredLinear
from pfmc.targets.optical import cells, cost, lower, verify
from pfmc.targets.optical.technology import check
from pfmc.technology import Technology

if TYPE_CHECKING:
    import torch

    from pfmc.targets.optical.train import OpticalTwin


class OpticalTarget:
    """Fixed weights as passive optical tiles with homodyne readout (fidelity L0).

    What runs in glass is the product with fixed weights alone; attention, softmax, norms and every
    nonlinearity run on the electronic fabric.
    """

    kind = "optical"
    exact = False

    def check(self, technology: Technology) -> None:
        """Refuses an incomplete (UsageError) or impossible (InfeasibleError) technology."""
        check(technology)

    def limits(self, technology: Technology) -> Limits:
        """Codes of 2 bits to ``matrix.max_weight_bits``; converters of static range."""
        t = technology
        return Limits(
            weight_bits=(2, t.integer("matrix.max_weight_bits")),
            input_bits=t.integer("dac.bits"), output_bits=t.integer("adc.bits"),
            tile_inputs=t.integer("array.tile_inputs"),
            tile_outputs=t.integer("array.tile_outputs"), static_inputs=True,
        )  # fmt: skip

    def lower_linear(self, linear: FixedLinear, technology: Technology) -> TiledLinear:
        """See `pfmc.targets.optical.lower.lower`."""
        return lower.lower(linear, technology)

    def definition(self, layer: LayerSummary, technology: Technology) -> Module:
        """See `pfmc.targets.optical.cells.definition`."""
        return cells.definition(layer, technology)

    def cost(
        self,
        layers: Sequence[LayerSummary],
        fabric: Sequence[FabricOp],
        technology: Technology,
        workload: Workload,
    ) -> CostReport:
        """See `pfmc.targets.optical.cost.report`."""
        return cost.report(layers, fabric, technology, workload)

    def layer(self, stored: StoredLinear, technology: Technology, die: Die) -> torch.nn.Module:
        """See `pfmc.targets.optical.simulate.OpticalLinear`."""
        from pfmc.targets.optical.simulate import OpticalLinear

        return OpticalLinear(stored, technology, die)

    def twin(self, linear: FixedLinear, technology: Technology) -> OpticalTwin:
        """See `pfmc.targets.optical.train.OpticalTwin`."""
        from pfmc.targets.optical.train import OpticalTwin

        return OpticalTwin(linear, technology, lower.lower(linear, technology))

    def verify(self, stored: StoredLinear, hardware: Path, technology: Technology) -> list[Check]:
        """See `pfmc.targets.optical.verify.verify`; L0 emits no files below `hardware`."""
        return verify.verify(stored, technology)
