"""What ``--rule``, ``--rule-set``, ``--die`` and ``--age`` ask for, checked against what can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import Tensor

from pfmc.distill import rules
from pfmc.distill.course import Course
from pfmc.distill.rule import Rule
from pfmc.distill.rules.base import Part
from pfmc.distill.rules.gradient import NoiseAware
from pfmc.distill.rules.prototype import Prototype, Silico, freeze
from pfmc.distill.rules.stacks import StackOptions, install
from pfmc.distill.rules.wave import HamiltonianEcho, ReciprocityAdjoint
from pfmc.distill.trainee import Trainee
from pfmc.errors import UsageError, did_you_mean
from pfmc.targets.base import Die, Target
from pfmc.technology import Technology

_WAVES = (ReciprocityAdjoint, HamiltonianEcho)


@dataclass(frozen=True)
class Method:
    """How gradients come about, and on which part.

    Attributes:
        rule: of the registry.
        die: the prototype that is trained; None: masks, before manufacture.
        stacks: of rules that train phase masks, else None.
    """

    rule: rules.Rule
    die: Die | None = None
    stacks: StackOptions | None = None

    @property
    def part(self) -> Part:
        """What is trained."""
        return Part.MASKS if self.die is None else Part.PROTOTYPE

    def told(self) -> dict[str, Any]:
        """For the manifest: rule, options, part, die."""
        stacks = {} if self.stacks is None else asdict(self.stacks)
        die = None if self.die is None else {"seed": self.die.seed, "age_s": self.die.age_s}
        return {
            "name": self.rule.name, "options": asdict(self.rule) | stacks, "part": str(self.part),
            "die": die,
        }  # fmt: skip

    def require(self, target: Target, technology: Technology) -> None:
        """Refuses what `target` has no hardware for (UsageError)."""
        if self.die is not None and target.exact:
            raise UsageError(
                f"{technology.name} computes exactly and cannot be rewritten: every die is the "
                "same, and there is no prototype to train",
                where="--die", mend="leave --die away, or choose a target whose dies differ",
            )  # fmt: skip
        if self.stacks is not None and "write.phase_error" not in technology.constants:
            raise UsageError(
                f"the rule {self.rule.name} needs {self.rule.needs}; {technology.name} has none",
                where="--rule", mend="--target optical",
            )  # fmt: skip

    def course(self, course: Course) -> Course:
        """`course` as this method runs it: a device is whole from the first step, and the digital
        fabric beside it stays."""
        if self.die is None:
            return course
        return replace(
            course, norms=False, tables=False, inputs=False, converters_from=0.0, die_steps=1,
            age_s=self.die.age_s,
        )  # fmt: skip

    def engine(self) -> Rule:
        """What the loop calls at every step."""
        if self.die is not None:
            return Prototype(self.rule, self.die)
        return Silico(self.rule.draws if isinstance(self.rule, NoiseAware) else 0)

    def prepare(
        self, trainee: Trainee, weights: Mapping[str, Tensor], technology: Technology
    ) -> dict[str, Any]:
        """Makes `trainee` the part that is trained; returns what the manifest says of stacks."""
        told: dict[str, Any] = {}
        if self.die is not None and self.stacks is not None:
            told = {"stacks": install(trainee, weights, self.stacks, self.die, technology)}
        if self.die is not None:
            freeze(trainee)
        return told


def method(
    name: str | None, settings: Sequence[str] = (), die: int | None = None, age_s: float = 0.0
) -> Method | None:
    """The method that a command line asks for; None: the loop's own, noise-aware training.

    Args:
        name: of a rule; by default ``physics-aware`` on a die.
        settings: ``option=value``.
        die: seed of the prototype.
        age_s: of the prototype.

    Raises:
        UsageError: unknown rule or option, a value of another kind, or a part that the rule
            cannot train.
    """
    if die is None and age_s:
        raise UsageError("an age is one die's", where="--age", mend="--set distill.age_s=SECONDS")
    if name is None and die is None:
        if settings:
            raise UsageError("options of no rule", where="--rule-set", mend="name it with --rule")
        return None
    kind = rules.get(name or "physics-aware")
    kind.require(Part.MASKS if die is None else Part.PROTOTYPE)
    wave = issubclass(kind, _WAVES)
    known = _defaults(kind) | (asdict(StackOptions()) if wave else {})
    given = dict(_setting(kind.name, text, known) for text in settings)
    own = {k: v for k, v in given.items() if k in kind.__dataclass_fields__}
    stacks = StackOptions(**{k: v for k, v in given.items() if k not in own}) if wave else None
    on = None if die is None else Die(die, age_s)
    return Method(rules.make(kind.name, own), on, stacks)


def _defaults(kind: type[rules.Rule]) -> dict[str, Any]:
    return {f.name: f.default for f in fields(kind)}


def _setting(rule: str, text: str, known: Mapping[str, Any]) -> tuple[str, Any]:
    """``option=value`` as the type of the option's default; numbers but seeds are positive."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"cannot read {text!r}", where="--rule-set", mend="option=value")
    if name not in known:
        mend = did_you_mean(name, known) if known else "it has none"
        raise UsageError(f"the rule {rule} has no option {name!r}", where="--rule-set", mend=mend)
    kind = type(known[name])
    try:
        found = kind(value)
    except ValueError as error:
        raise UsageError(
            f"{name} of the rule {rule} is {_KINDS[kind]}, not {value!r}", where="--rule-set"
        ) from error
    if kind is not str and not name.endswith("seed") and not found > 0:
        raise UsageError(f"{name} of the rule {rule} must be above 0", where="--rule-set")
    return name, found


_KINDS = {int: "an integer", float: "a number", str: "a word"}
