"""Recipes: which passes run with which options, how to calibrate, quantise and judge.

A recipe is ``passes/<name>.toml`` or a TOML file of the user's. ``--set`` changes single values:
``fold.largest=4096``, ``quantise.weight_bits=3``, ``quantise.layers.lm_head.weight_bits=8``.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pfmc import library, passes
from pfmc.distill.course import Course
from pfmc.errors import UsageError, did_you_mean
from pfmc.formats import Name
from pfmc.layer_rounding import Search
from pfmc.passes.base import Pass

SHELF = "passes"
Bits = Literal["target"] | Annotated[int, Field(ge=2, le=8)]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, str_strip_whitespace=True, allow_inf_nan=False
    )


class Calibration(_Section):
    """How statistics are taken before quantising.

    Attributes:
        source: ``self`` runs the model on the user's data, else on data it writes itself; ``none``
            takes no statistics (inputs are then scaled per token).
        sequences: sequences, or images.
        length: positions of a sequence.
    """

    source: Literal["self", "none"] = "self"
    sequences: int = Field(16, ge=1)
    length: int = Field(128, ge=1)


class LayerRule(_Section):
    """What differs in the layers whose name fits a glob; None keeps the common choice."""

    weight_bits: Bits | None = None
    granularity: Literal["channel", "tile"] | None = None
    search: Search | None = None
    format: Name | None = None
    group: int | None = Field(None, ge=0)


class Budget(_Section):
    """How many bits each layer gets, chosen by what its rounding costs the model.

    Attributes:
        metric: what is limited: ``weight bits`` (stored bits a weight, the mean over all fixed
            linears), ``area`` in mm2, ``energy`` in pJ a token or ``tiles``, the last three of
            the fixed linears alone as the target prices them; ``none`` for no budget.
        most: the limit.
        least_bits, most_bits: widths that are tried.
        sensitivity: ``kl``: each layer at each width alone is put into the float model, which runs
            on calibration data (KL divergence of the tokens; of other models the relative square
            error of the outputs); ``error``: the layer's own relative output error.
    """

    metric: Literal["none", "weight bits", "area", "energy", "tiles"] = "none"
    most: float = Field(4.0, gt=0)
    least_bits: int = Field(2, ge=2, le=8)
    most_bits: int = Field(8, ge=2, le=8)
    sensitivity: Literal["kl", "error"] = "kl"


class Quantising(_Section):
    """Number formats.

    Attributes:
        weight_bits: width of a weight code, 2 to 8, or ``target`` for the widest the target holds.
        granularity: inputs that share a weight scale: all (``channel``) or those of a tile.
        group: inputs that share a weight scale, any number; 0 leaves it to `granularity`.
        format: number format of the codes (`pfmc.formats`): ``int``; ``midrise``, which has no
            zero but twice the levels at 2 bits; ``ternary``; ``mxint8``, ``mxfp4``, ``nvfp4``,
            which fix bits and group.
        search: ``clip`` searches the best clipping, ``plain`` rounds by the largest weight,
            ``compensate`` starts from ``clip`` and lets later weights make up for the rounding of
            earlier ones, ``learned`` goes on from there by gradient on the output of each block.
            The last two need calibration (`pfmc.compensation`, `pfmc.distill.learned`). A layer
            keeps plain rounding where nothing wins on the calibration data.
        prefix: what ``compensate`` takes for a layer's inputs: those of the ``float`` model, or
            what the layers ``rounded`` before it give, whose errors it then makes up for too.
            ``learned`` always takes the latter.
        iterations: steps that ``learned`` takes for each block.
        inputs: ``static`` scales from calibration, ``token``: afresh for every position, or
            ``target``: ``token`` where the target can, else ``static``.
        input_range: of static scales: ``mse`` clips where the mean square error is least, ``peak``
            never clips, ``percentile`` clips what is above `percentile` of all inputs.
        percentile: in percent.
        scaling: whether factors of inputs are moved into what makes them (pass ``scale``), where
            that lowers the calibrated loss.
        kv_bits: width of a number in the KV memory, or ``target``.
        layers: glob over layer names -> what differs there; the last that fits wins.
        budget: widths chosen under a limit, in place of `weight_bits`.
    """

    weight_bits: Bits = 4
    granularity: Literal["channel", "tile"] = "channel"
    group: int = Field(0, ge=0)
    format: Name = "int"
    search: Search = "clip"
    prefix: Literal["float", "rounded"] = "float"
    iterations: int = Field(200, ge=1)
    inputs: Literal["static", "token", "target"] = "static"
    input_range: Literal["mse", "peak", "percentile"] = "mse"
    percentile: float = Field(99.99, gt=0, le=100)
    scaling: bool = False
    kv_bits: Bits = "target"
    layers: dict[str, LayerRule] = Field(default_factory=dict)
    budget: Budget = Field(default_factory=lambda: Budget.model_validate({}))


class Thresholds(_Section):
    """What `pfmc verify` asks for; None asks nothing.

    Attributes:
        perplexity_ratio: highest perplexity over the source model's.
        kl: highest mean KL divergence in nats a token.
        top1: lowest share of positions that prefer the same token.
        cosine: lowest mean cosine of embeddings or outputs.
        rank: lowest rank correlation of the inputs' pairwise similarities.
        layer_error: highest relative error of a fixed linear's output.
        windows: windows of text, or inputs, to measure on; length: positions of each.
    """

    perplexity_ratio: float | None = Field(None, gt=0)
    kl: float | None = Field(None, gt=0)
    top1: float | None = Field(None, ge=0, le=1)
    cosine: float | None = Field(None, ge=-1, le=1)
    rank: float | None = Field(None, ge=-1, le=1)
    layer_error: float | None = Field(None, gt=0)
    windows: int = Field(16, ge=1)
    length: int = Field(128, ge=2)


class Distilling(_Section):
    """How `pfmc distill` trains: see docs/distill.md and `pfmc.distill.course.Course`.

    Attributes:
        seconds: CPU seconds to spend; turned into steps by timing a few.
        steps: steps instead; the same number gives the same bytes.
        batch: samples a step; micro: of them at a time.
        sequences: samples to learn from, at most; so many are made up without data. length:
            positions of each.
        held_out: samples kept for judging.
        lr: learning rate of weights. scale_lr: of scales, input steps and converter ranges, as a
            relative change. fabric_lr: of biases, norms and embedding tables.
        warmup: share of the steps in which rates rise. decay: how they fall to 0.
        gradient_norm: gradients are clipped to it; 0 never.
        clip_sigmas: weights are clipped to so many deviations of their tile's column; 0 never. Not
            those of a prototype, whose one die is learned with.
        hidden: weight of the errors of inner layers beside the loss.
        converters_from: share of the steps after which output converters are emulated; in the
            last step they always are.
        noise: whether noise is drawn in training. dies: fixed dies that judge. die_steps: steps on
            one die. age_s: age of the dies.
        norms, tables, inputs: whether gains of norms, embedding tables, input steps learn.
        judge_every: steps between judgements. patience: judgements without progress that end it.
        precision: ``fp32`` or ``bf16``.
    """

    seconds: float = Field(300.0, gt=0)
    steps: int | None = Field(None, ge=1)
    batch: int = Field(16, ge=1)
    micro: int = Field(16, ge=1)
    sequences: int = Field(4096, ge=1)
    length: int = Field(128, ge=2)
    held_out: int = Field(32, ge=1)
    lr: float = Field(1e-3, ge=0)
    scale_lr: float = Field(1e-3, ge=0)
    fabric_lr: float = Field(1e-3, ge=0)
    warmup: float = Field(0.05, ge=0, le=1)
    decay: Literal["cosine", "linear"] = "cosine"
    gradient_norm: float = Field(1.0, ge=0)
    clip_sigmas: float = Field(0.0, ge=0)
    hidden: float = Field(0.0, ge=0)
    converters_from: float = Field(0.8, ge=0, le=1)
    noise: bool = True
    dies: int = Field(2, ge=1)
    die_steps: int = Field(1, ge=1)
    age_s: float = Field(0.0, ge=0)
    norms: bool = True
    tables: bool = True
    inputs: bool = True
    judge_every: int = Field(100, ge=1)
    patience: int = Field(0, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"

    def course(self, seed: int) -> Course:
        """The options of the training."""
        return Course(**self.model_dump(), seed=seed)


class Working(_Section):
    """What the cost report assumes: positions of context."""

    context: int = Field(1024, ge=1)


@dataclass(frozen=True)
class Recipe:
    """A recipe with every default filled in.

    Attributes:
        name: its name on the shelf, or the stem of its file; title: one line.
        passes: the canonicalising passes in order, with their options.
        calibration, quantise, distill, verify, workload: the sections of the same names.
    """

    name: str
    title: str
    passes: tuple[Pass, ...]
    calibration: Calibration
    quantise: Quantising
    distill: Distilling
    verify: Thresholds
    workload: Working

    def canonical(self) -> dict[str, Any]:
        """The whole recipe as plain data with every option, for the manifest."""
        return {
            "name": self.name,
            "title": self.title,
            "pass": [{"name": p.name, **asdict(p)} for p in self.passes],
            **{key: getattr(self, key).model_dump(mode="json") for key in _SECTIONS},
        }

    def digest(self) -> str:
        """sha256 of what decides the result: everything but name and title."""
        body = {k: v for k, v in self.canonical().items() if k not in ("name", "title")}
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


_SECTIONS: dict[str, type[_Section]] = {
    "calibration": Calibration,
    "quantise": Quantising,
    "distill": Distilling,
    "verify": Thresholds,
    "workload": Working,
}
_KEYS = ("title", "pass", *_SECTIONS)
_NONE_IS_A_WORD = ("calibration.source", "quantise.budget.metric")  # elsewhere it means no value


def default_recipe(kind: str) -> str:
    """The recipe that fits a kind of target: that of its name, else ``rom8``."""
    return kind if kind in library.entries(SHELF) else "rom8"


def load(name: str, settings: Iterable[str] = ()) -> Recipe:
    """Reads the recipe `name` (of the shelf, or a path) and applies ``--set`` settings.

    Args:
        name: e.g. ``rom`` or ``my/recipe.toml``.
        settings: ``pass.option=value`` or ``section.key=value``.

    Raises:
        UsageError: no such recipe, or something unknown or of a wrong type in it; says what was
            probably meant.
    """
    path = library.find(SHELF, name)
    return parse(_read(path), path.stem, str(path.name), settings)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"not a TOML file: {error}", where=path.name) from error


def parse(
    body: Mapping[str, Any], name: str, where: str = "", settings: Iterable[str] = ()
) -> Recipe:
    """The recipe in a TOML file's contents `body`; see `load`."""
    unknown = [k for k in body if k not in _KEYS]
    if unknown:
        raise UsageError(
            f"a recipe has no key {unknown[0]!r}", where=where, mend=did_you_mean(unknown[0], _KEYS)
        )
    entries = [dict(e) for e in _entries(body.get("pass", []), where)]
    sections = {k: dict(_table(body.get(k, {}), f"{where}: [{k}]")) for k in _SECTIONS}
    for setting in settings:
        _set(setting, entries, sections)
    return Recipe(
        name=name,
        title=str(body.get("title", name)),
        passes=tuple(_make_pass(e, where) for e in entries),
        **cast("dict[str, Any]", {k: _section(k, sections[k], where) for k in _SECTIONS}),
    )


def _table(given: object, where: str) -> Mapping[str, Any]:
    """`given`, which holds keys and values."""
    if not isinstance(given, Mapping):
        raise UsageError(
            f"{given!r} has no keys below it", where=where,
            mend="write section.key=value, or quantise.layers.<glob>.key=value for some layers",
        )  # fmt: skip
    return given


def _entries(given: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not all(isinstance(e, dict) and "name" in e for e in given):
        raise UsageError(
            "passes are written as [[pass]] tables with a name", where=where,
            mend='write [[pass]] and name = "fold" below it',
        )  # fmt: skip
    return given


def _make_pass(entry: Mapping[str, Any], where: str) -> Pass:
    options = {k: v for k, v in entry.items() if k != "name"}
    kind = passes.get(str(entry["name"]))
    if kind.name == "quantise":
        raise UsageError(
            "quantise is not a [[pass]]: it runs after calibration", where=where,
            mend="write a [quantise] section",
        )  # fmt: skip
    return kind.from_options(options)


# -- settings ------------------------------------------------------------------------------------


def _set(setting: str, entries: list[dict[str, Any]], sections: dict[str, dict[str, Any]]) -> None:
    key, equals, text = setting.partition("=")
    owner, dot, option = key.strip().partition(".")
    if not equals or not dot or not option:
        raise UsageError(
            f"{setting!r} is not a setting", where="--set", mend="write pass.option=value"
        )
    word = owner not in sections or f"{owner}.{option}" in _NONE_IS_A_WORD
    value: object = None if text.strip() == "none" and not word else text.strip()
    if owner in sections:
        _set_in(sections[owner], option, value, f"--set {setting}")
        return
    named = [e for e in entries if e["name"] == owner]
    if not named:
        known = [*sections, *(str(e["name"]) for e in entries)]
        raise UsageError(
            f"the recipe has no pass or section {owner!r}", where=f"--set {setting}",
            mend=did_you_mean(owner, known),
        )  # fmt: skip
    for entry in named:
        entry[option] = value


def _set_in(section: dict[str, Any], option: str, value: object, where: str) -> None:
    """``weight_bits`` or ``layers.<glob>.weight_bits``; the glob may hold dots."""
    first, dot, rest = option.partition(".")
    if not dot:
        section[option] = value
        return
    if first == "budget":
        section[first] = {**_table(section.get(first, {}), where), rest: value}
        return
    glob, _, last = rest.rpartition(".")
    table = section[first] = dict(_table(section.get(first, {}), where))
    table[glob] = {**_table(table.get(glob, {}), where), last: value}


def _section(key: str, given: Mapping[str, Any], where: str) -> _Section:
    try:
        return _SECTIONS[key].model_validate(dict(given))
    except ValidationError as error:
        raise _explained(key, error, where) from error


def _explained(key: str, error: ValidationError, where: str) -> UsageError:
    """The first complaint of pydantic in our words."""
    first, *others = error.errors()
    path = [str(part) for part in first["loc"]]
    owner = LayerRule if path[0] == "layers" and len(path) > 2 else _SECTIONS[key]
    if path[0] == "budget" and len(path) > 1:
        owner = Budget
    deep = owner is Budget or path[0] == "layers"
    keys = path[: 3 if owner is LayerRule else 2 if deep else 1]
    place = f"{where}: [{key}] {'.'.join(keys)}"
    if first["type"] == "extra_forbidden":
        return UsageError(
            f"there is no key {path[-1]!r}", where=place,
            mend=did_you_mean(path[-1], owner.model_fields),
        )  # fmt: skip
    start = first["loc"][: len(keys)]
    same = [first, *(e for e in others if e["loc"][: len(keys)] == start)]
    reasons = " or ".join(e["msg"].removeprefix("Input should be ") for e in same)
    return UsageError(f"{first['input']!r} is not {reasons}", where=place)
