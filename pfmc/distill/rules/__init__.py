"""Training rules of physical networks: one registry, one interface, each applicable where it says.

A rule turns one batch into an estimate of the loss's gradient by the parameters of a `Problem`:
from the digital model alone, from a device and the model, or from a device alone. What may be
trained at all depends on the part: masks are fixed at manufacture (`Part.MASKS`), a prototype or
its twin can be rewritten (`Part.PROTOTYPE`), and a side path stays writable in the field
(`Part.SIDE`). Review: Momeni et al., Training of physical neural networks, arXiv 2406.03372.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from pfmc.distill.rules.base import Part, Problem, Rule
from pfmc.errors import UsageError, did_you_mean

__all__ = ["RULES", "Part", "Problem", "Rule", "get", "make"]

RULES = {
    "in-silico": "pfmc.distill.rules.gradient:InSilico",
    "noise-aware": "pfmc.distill.rules.gradient:NoiseAware",
    "physics-aware": "pfmc.distill.rules.gradient:PhysicsAware",
    "reciprocal": "pfmc.distill.rules.gradient:Reciprocal",
    "feedback": "pfmc.distill.rules.feedback:DirectFeedback",
    "augmented-feedback": "pfmc.distill.rules.feedback:AugmentedFeedback",
    "local": "pfmc.distill.rules.local:PhysicalLocal",
    "spsa": "pfmc.distill.rules.zeroth:Spsa",
    "evolution": "pfmc.distill.rules.zeroth:Evolution",
    "equilibrium": "pfmc.distill.rules.equilibrium:EquilibriumPropagation",
    "adjoint": "pfmc.distill.rules.wave:ReciprocityAdjoint",
    "echo": "pfmc.distill.rules.wave:HamiltonianEcho",
}
"""Rule name -> ``module:class``: the literal registry."""


def get(name: str) -> type[Rule]:
    """The class of the rule `name`.

    Raises:
        UsageError: no such rule; names the nearest.
    """
    if name not in RULES:
        raise UsageError(f"there is no training rule {name!r}", mend=did_you_mean(name, RULES))
    module, _, kind = RULES[name].partition(":")
    found: type[Rule] = getattr(importlib.import_module(module), kind)
    return found


def make(name: str, options: Mapping[str, Any] | None = None) -> Rule:
    """The rule `name` with its options.

    Raises:
        UsageError: no such rule or option.
    """
    kind, options = get(name), dict(options or {})
    unknown = next((k for k in options if k not in kind.__dataclass_fields__), None)
    if unknown is not None:
        mend = did_you_mean(unknown, kind.__dataclass_fields__)
        raise UsageError(f"the rule {name} has no option {unknown!r}", mend=mend)
    return kind(**options)
