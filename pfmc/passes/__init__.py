"""The passes by name, in a literal table, so that a pass is imported only when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from pfmc.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from pfmc.passes.base import Pass

PASSES = {
    "fabric-formats": "pfmc.passes.fabric_formats:FabricFormats",
    "fold": "pfmc.passes.fold:Fold",
    "kv-memory": "pfmc.passes.kv_memory:KvMemory",
    "linears": "pfmc.passes.linears:Linears",
    "merge-adapter": "pfmc.passes.adapters:MergeAdapter",
    "merge-equal": "pfmc.passes.merge_equal:MergeEqual",
    "plain-operators": "pfmc.passes.plain_operators:PlainOperators",
    "quantise": "pfmc.passes.quantise:Quantise",
    "raise-activations": "pfmc.passes.raise_activations:RaiseActivations",
    "raise-attention": "pfmc.passes.raise_attention:RaiseAttention",
    "raise-norms": "pfmc.passes.raise_norms:RaiseNorms",
    "raise-rotary": "pfmc.passes.raise_rotary:RaiseRotary",
    "rotate": "pfmc.passes.rotate:Rotate",
    "shape-arithmetic": "pfmc.passes.shape_arithmetic:ShapeArithmetic",
    "side-path": "pfmc.passes.adapters:KeepBeside",
    "spread": "pfmc.passes.spread:Spread",
    "ties": "pfmc.passes.ties:Ties",
    "widen": "pfmc.passes.widen:Widen",
}
"""Pass name -> ``module:class``."""


def get(name: str) -> type[Pass]:
    """The class of pass `name`.

    Raises:
        UsageError: there is no such pass; names the nearest.
    """
    if name not in PASSES:
        raise UsageError(f"there is no pass {name!r}", mend=did_you_mean(name, PASSES))
    module, _, attribute = PASSES[name].partition(":")
    found: type[Pass] = getattr(import_module(module), attribute)
    return found
