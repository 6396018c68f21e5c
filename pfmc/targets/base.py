"""The protocol of a target: few functions that every kind of hardware brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from pfmc.cost import CostReport
from pfmc.hardware import FabricOp, FixedLinear, LayerSummary, Limits, TiledLinear, Workload
from pfmc.technology import Technology

if TYPE_CHECKING:
    import torch

    from pfmc.netlist import Module


@dataclass(frozen=True)
class StoredLinear:
    """A tiled linear as read back from an artifact.

    Attributes:
        name, inputs, outputs: of the fixed linear.
        tiles: columns of its tile table; tensors: arrays of its weights file.
        bias: float32 ``[out]`` or None.
        input_bits, input_scale: as in `pfmc.hardware.FixedLinear`.
    """

    name: str
    inputs: int
    outputs: int
    tiles: Mapping[str, npt.NDArray[np.generic]]
    tensors: Mapping[str, npt.NDArray[np.generic]]
    bias: npt.NDArray[np.float32] | None
    input_bits: int
    input_scale: float | None


@dataclass(frozen=True)
class Die:
    """One manufactured piece: the seed of its write noise, its age, and whether it is read noisily.

    Attributes:
        seed: names the die everywhere; None is the ideal die (no write or age noise).
        age_s: time since writing in seconds.
        read_noise: whether each inference draws read noise.
    """

    seed: int | None = 0
    age_s: float = 0.0
    read_noise: bool = True


@dataclass(frozen=True)
class Check:
    """One line of a target's own verification: `value` must not exceed `limit`."""

    name: str
    value: float
    limit: float
    unit: str = "1"

    @property
    def passed(self) -> bool:
        """Whether the check holds; NaN fails."""
        return self.value <= self.limit


class Twin(Protocol):
    """How one layer's hardware multiplies while the model is trained: a torch module.

    The layer rounds its input and its weights to the target's grids; the twin does what follows,
    in the order of `pfmc.noise.ORDER`: write, age, product, read, output converter, digital sum.
    Noise is drawn afresh by the laws of the technology for the die that `face` names; gradients
    pass through the noisy product to inputs and weights, straight through every rounding.

    As a module it is called with ``(x, weight, full)``: x ``[..., in]`` behind the input converter,
    weight ``[out, in]`` on the weights' grid, full: the x of the largest input code (broadcasts
    against x's rows). It returns ``[..., out]`` without bias.

    Its parameters are what can be learned besides the weights: ranges of output converters.
    """

    def face(self, die: Die, converters: bool = True, readings: int | None = None) -> None:
        """Chooses the die of the coming calls.

        Args:
            die: seed (None: no noise), age, read noise.
            readings: if given, what is written and aged are the very draws of `Target.layer`'s die
                of this seed, and read noise is drawn from the die `readings`, so that a device
                which stays the same is read afresh. None: draws of the twin's own.
            converters: whether outputs are converted. Without, read noise is drawn on the weights,
                once a call, which has the same spread and costs no second product.
        """
        ...

    def clip(self, weight: torch.Tensor, sigmas: float) -> None:
        """Clips weight ``[out, in]`` in place to so many standard deviations of each column of a
        tile, so that few large weights do not set the scale for all."""
        ...

    def ranges(self) -> npt.NDArray[np.float32] | None:
        """Ranges of the output converters as `pfmc.hardware.FixedLinear.output_range` holds them;
        None without converters."""
        ...

    def set_ranges(self, tiled: TiledLinear) -> None:
        """Takes over the converters' ranges of a lowered layer."""
        ...


class Target(Protocol):
    """A kind of hardware. Capabilities are attributes, never ``if target == …``."""

    kind: str
    exact: bool
    """Whether a simulated product equals integer arithmetic bit for bit."""

    def check(self, technology: Technology) -> None:
        """Refuses a technology that is incomplete or impossible (UsageError, InfeasibleError)."""
        ...

    def limits(self, technology: Technology) -> Limits:
        """What the quantiser must respect."""
        ...

    def lower_linear(self, linear: FixedLinear, technology: Technology) -> TiledLinear:
        """Lays one fixed linear out on tiles; deterministic, streaming, numpy only."""
        ...

    def definition(self, layer: LayerSummary, technology: Technology) -> Module:
        """The netlist module of one layer: ports, cells and how many of each, tiles by table."""
        ...

    def cost(
        self,
        layers: Sequence[LayerSummary],
        fabric: Sequence[FabricOp],
        technology: Technology,
        workload: Workload,
    ) -> CostReport:
        """The cost report of a lowered model."""
        ...

    def layer(
        self, stored: StoredLinear, technology: Technology, die: Die
    ) -> torch.nn.Module:
        """A torch module ``x[..., in] -> y[..., out]`` (bias included) with the layer's physics.

        It applies the input converter itself; the graph's Quantise node in front is idempotent.
        Differentiable with straight-through rounding.
        """
        ...

    def twin(self, linear: FixedLinear, technology: Technology) -> Twin:
        """The differentiable stand-in of `layer` for training, without weights of its own.

        On the ideal die it computes what `layer` computes of the lowered `linear`, and its noise
        has the same moments as that of `layer`'s dies. Its ranges are those of the lowered layer.
        """
        ...

    def verify(self, stored: StoredLinear, hardware: Path, technology: Technology) -> list[Check]:
        """Checks emitted files of one layer against its tensors (e.g. ROM images bit for bit)."""
        ...
