"""Codes on demand: a layer's codes and scales are made when somebody reads them.

Only the last layer's are kept, so a model of any size is quantised with one layer in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import onnx_ir as ir

from pfmc import formats, rounding
from pfmc.errors import InputError
from pfmc.hardware import LayerStatistics, QuantisedMatrix
from pfmc.layer_rounding import LayerPlan, Seen, round_layer


class Slot:
    """Room for the codes of one layer: asking for another lets go of the first.

    Threads may share it: the pair is set at once, so at worst a layer is rounded twice.
    """

    def __init__(self) -> None:
        self.held: tuple[LazyMatrix, QuantisedMatrix] | None = None


@dataclass(frozen=True, eq=False)
class LazyMatrix:
    """The codes and scales of one weight, made together when one of them is read.

    Attributes:
        solved: gives the matrix where it was rounded already, else None.
        facts: further numbers for the layer's diagnostics.
    """

    layer: str
    weight: str
    tensor: ir.TensorProtocol
    plan: LayerPlan
    statistics: LayerStatistics | None
    progress: Callable[[str], None]
    slot: Slot = field(repr=False)
    solved: Callable[[], QuantisedMatrix] | None = None
    facts: Mapping[str, float] = field(default_factory=dict)

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.plan.form.bits

    def matrix(self) -> QuantisedMatrix:
        """Rounds the weight, unless it is the last one that was rounded."""
        held = self.slot.held
        if held is not None and held[0] is self:
            return held[1]
        self.slot.held = held = None
        made = self._round() if self.solved is None else self.solved()
        made = replace(made, diagnostics={**made.diagnostics, **self.facts})
        self.slot.held = (self, made)
        return made

    def release(self) -> None:
        """Lets go of the codes if the slot still holds them."""
        held = self.slot.held
        if held is not None and held[0] is self:
            self.slot.held = None

    def _round(self) -> QuantisedMatrix:
        seen, plan = self.statistics, self.plan
        known = Seen() if seen is None else Seen(seen.input_power, seen.input_moment)
        try:
            return round_layer(
                self.tensor.numpy(), plan.form, plan.group, plan.search, known,
                lambda text: self.progress(f"quantise: {self.layer}: {text}"),
            )  # fmt: skip
        except InputError as error:
            raise InputError(
                error.what, where=f"tensor {self.weight!r}, {error.where}", mend=error.mend
            ) from error
        finally:
            release = getattr(self.tensor, "release", None)
            if release is not None:
                release()


class Source(Protocol):
    """What codes and scales are read from."""

    @property
    def bits(self) -> int:
        """Width of a code."""
        ...

    def matrix(self) -> QuantisedMatrix:
        """The codes and scales."""
        ...

    def release(self) -> None:
        """Lets go of them."""
        ...


class LazyCodes(ir.LazyTensor):
    """A tensor of codes or scales that knows the matrix it belongs to.

    Args:
        source: of both.
        scale: whether this is the scales.
        shape: of the tensor.
        nibbles: whether codes fit int4; as `source.bits` says if absent, which is right for
            formats whose codes are two's complement.
    """

    def __init__(
        self, source: Source, scale: bool, shape: tuple[int, ...], nibbles: bool | None = None
    ) -> None:
        self.source = source
        narrow = source.bits <= 4 if nibbles is None else nibbles
        kind = ir.DataType.INT4 if narrow else ir.DataType.INT8
        kind = ir.DataType.FLOAT if scale else kind
        read = self._scale if scale else self._codes
        super().__init__(read, kind, ir.Shape(shape))

    def _scale(self) -> ir.TensorProtocol:
        shape = self.shape.numpy()
        return ir.tensor(self.source.matrix().scale.reshape(shape), name=self.name)

    def _codes(self) -> ir.TensorProtocol:
        codes = self.source.matrix().codes
        if self.dtype is ir.DataType.INT8:
            return ir.tensor(codes, name=self.name)
        packed = rounding.pack_int4(codes)
        return ir.PackedTensor(packed, ir.DataType.INT4, shape=codes.shape, name=self.name)


def form_of_text(text: str) -> formats.Format:
    """The format in a node's `KEY_FORMAT` metadata: name, bits, unit."""
    name, bits, unit = text.split()
    return replace(formats.of(name, int(bits)), unit=float(unit))
