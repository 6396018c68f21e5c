"""Read-only-weight silicon: integer codes in ROM banks beside multiply-accumulate lanes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pfmc.cost import CostReport
from pfmc.hardware import FabricOp, FixedLinear, LayerSummary, Limits, TiledLinear, Workload
from pfmc.targets.base import Check, Die, StoredLinear
from pfmc.technology import Technology

if TYPE_CHECKING:
    import torch

    from pfmc.netlist import Module
    from pfmc.targets.exact import ExactTwin


class RomTarget:
    """The `pfmc.targets.base.Target` of kind ``rom``; every function loads its room when asked."""

    kind = "rom"
    exact = True

    def check(self, technology: Technology) -> None:
        """Refuses a technology that is incomplete or impossible (UsageError)."""
        from pfmc.targets.rom.technology import check

        check(technology)

    def limits(self, technology: Technology) -> Limits:
        """What the quantiser must respect."""
        from pfmc.targets.rom.technology import limits

        return limits(technology)

    def lower_linear(self, linear: FixedLinear, technology: Technology) -> TiledLinear:
        """Lays one fixed linear out in ROM tiles (InfeasibleError: codes too wide)."""
        from pfmc.targets.rom.lower import lower

        return lower(linear, technology)

    def definition(self, layer: LayerSummary, technology: Technology) -> Module:
        """The netlist module of one layer."""
        from pfmc.targets.rom.cells import definition

        return definition(layer, technology)

    def cost(
        self,
        layers: Sequence[LayerSummary],
        fabric: Sequence[FabricOp],
        technology: Technology,
        workload: Workload,
    ) -> CostReport:
        """The cost report, with published machines as validation rows."""
        from pfmc.targets.rom.cost import report
        from pfmc.targets.rom.validation import rows

        return report(layers, fabric, technology, workload, rows())

    def layer(self, stored: StoredLinear, technology: Technology, die: Die) -> torch.nn.Module:
        """A torch module, exact integers; every die is the same."""
        from pfmc.targets.rom.simulate import RomLinear

        return RomLinear(stored)

    def twin(self, linear: FixedLinear, technology: Technology) -> ExactTwin:
        """A torch module that multiplies while the weights are trained."""
        from pfmc.targets.exact import ExactTwin

        return ExactTwin()

    def verify(self, stored: StoredLinear, hardware: Path, technology: Technology) -> list[Check]:
        """ROM images read back against the codes; requantisers against the scales."""
        from pfmc.targets.rom.verify import verify

        return verify(stored, hardware)

    def integer_product(
        self, stored: StoredLinear, hardware: Path, codes: npt.NDArray[np.int8]
    ) -> npt.NDArray[np.int32]:
        """``codes[N, in]`` times the weights as int32 ``[N, out]``, from the ROM image files."""
        from pfmc.targets.rom.verify import integer_product

        return integer_product(stored, hardware, codes)


__all__ = ["RomTarget"]
