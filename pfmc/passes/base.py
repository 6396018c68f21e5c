"""What a pass is: a frozen dataclass whose fields are its options, and what it returns."""

from __future__ import annotations

import abc
import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self, Union

import onnx_ir as ir

from pfmc.errors import UsageError, did_you_mean
from pfmc.ir.vocabulary import Stage

if TYPE_CHECKING:
    from pfmc.hardware import LayerStatistics, Limits, QuantisedMatrix
    from pfmc.noise import NoiseModel


@dataclass(frozen=True)
class Declined:
    """One thing a pass saw, could have changed and did not.

    Attributes:
        pass_name: the pass.
        where: name or scope of the node concerned.
        reason: why, one sentence without a full stop.
    """

    pass_name: str
    where: str
    reason: str


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        model: the model after the pass (usually the object that was given).
        changed: how many rewrites were made.
        declined: what was left alone, with the reason.
        notes: counts and findings for the report, by name.
    """

    model: ir.Model
    changed: int
    declined: tuple[Declined, ...] = ()
    notes: dict[str, float | int | str] = field(default_factory=dict)


def _silent(message: str) -> None:
    """Progress that is not shown."""


@dataclass(frozen=True)
class Context:
    """What every pass may ask of the world.

    Attributes:
        limits: what the target can hold; None before a target is chosen.
        noise: the target's noise; None before a target is chosen.
        seed: of every random choice.
        statistics: calibration statistics by layer id; empty before calibration.
        matrices: layer id -> gives its rounded matrix, of layers that were rounded on calibration
            data already.
        progress: takes one line for the user.
    """

    limits: Limits | None = None
    noise: NoiseModel | None = None
    seed: int = 0
    statistics: Mapping[str, LayerStatistics] = field(default_factory=dict)
    matrices: Mapping[str, Callable[[], QuantisedMatrix]] = field(default_factory=dict)
    progress: Callable[[str], None] = _silent


@dataclass(frozen=True)
class Pass(abc.ABC):
    """A transformation of a model; the fields of a subclass are its options.

    The model given to `apply` is valid and so is the model returned; in between it need not be.
    A pass may change the graph it is given.
    """

    name: ClassVar[str]
    needs: ClassVar[Stage] = Stage.SOURCE
    gives: ClassVar[Stage] = Stage.SOURCE
    statistics: ClassVar[frozenset[str]] = frozenset()

    @abc.abstractmethod
    def apply(self, model: ir.Model, context: Context) -> PassResult:
        """Transforms `model` and says what was changed and what was declined, with reasons."""

    @classmethod
    def from_options(cls, options: Mapping[str, object]) -> Self:
        """Makes the pass from its options, as read from TOML or from ``--set pass.option=value``.

        Raises:
            UsageError: an option is unknown, missing or of the wrong type.
        """
        hints = typing.get_type_hints(cls)
        fields = {f.name: f for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for key, given in options.items():
            where = f"{cls.name}.{key}"
            if key not in fields:
                raise UsageError(
                    f"pass {cls.name!r} has no option {key!r}",
                    where=where,
                    mend=did_you_mean(key, fields),
                )
            values[key] = coerce(given, hints[key], where)
        for missing in [f.name for f in fields.values() if _required(f) and f.name not in values]:
            raise UsageError(
                f"pass {cls.name!r} needs option {missing!r}",
                where=cls.name,
                mend=f"give {missing} in the recipe or with --set {cls.name}.{missing}=VALUE",
            )
        return cls(**values)


def _required(item: dataclasses.Field[Any]) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def coerce(given: object, wanted: Any, where: str) -> Any:
    """Turns `given` (a TOML value or the text of ``--set``) into a value of type `wanted`.

    Knows bool, int, float, str, None, Literal, unions, and tuple[T, ...].

    Raises:
        UsageError: `given` is not a `wanted`; the message names `where`.
    """
    origin = typing.get_origin(wanted)
    if origin in (Union, types.UnionType):
        return _first_that_fits(given, typing.get_args(wanted), where)
    if origin is typing.Literal:
        return _one_of(given, typing.get_args(wanted), where)
    if origin is tuple:
        items = given.split(",") if isinstance(given, str) else given
        if not isinstance(items, list | tuple):
            raise _wrong(given, wanted, where)
        return tuple(coerce(item, typing.get_args(wanted)[0], where) for item in items)
    return _plain(given, wanted, where)


def _first_that_fits(given: object, choices: tuple[Any, ...], where: str) -> Any:
    # text last: "3" for int | str is 3
    for choice in sorted(choices, key=lambda c: c is str):
        try:
            return coerce(given, choice, where)
        except UsageError:
            continue
    raise UsageError(f"{given!r} fits none of {_spell(choices)}", where=where)


def _one_of(given: object, choices: tuple[Any, ...], where: str) -> Any:
    for choice in choices:
        if given == choice or (isinstance(given, str) and given == str(choice)):
            return choice
    known = [str(c) for c in choices]
    raise UsageError(f"{given!r} is not allowed", where=where, mend=did_you_mean(str(given), known))


def _plain(given: object, wanted: Any, where: str) -> Any:
    if wanted is type(None) and (given is None or given in ("none", "None")):
        return None
    if wanted is bool and isinstance(given, str) and given.lower() in _WORDS:
        return _WORDS[given.lower()]
    if isinstance(given, wanted) and (wanted is bool or not isinstance(given, bool)):
        return given
    if wanted is float and isinstance(given, int) and not isinstance(given, bool):
        return float(given)
    if wanted in (int, float) and isinstance(given, str):
        try:
            return wanted(given)
        except ValueError:
            raise _wrong(given, wanted, where) from None
    raise _wrong(given, wanted, where)


def _wrong(given: object, wanted: Any, where: str) -> UsageError:
    return UsageError(
        f"{given!r} is not {_spell((wanted,))}", where=where, mend="correct the recipe or --set"
    )


def _spell(choices: tuple[Any, ...]) -> str:
    return " or ".join(getattr(c, "__name__", str(c)) for c in choices)
