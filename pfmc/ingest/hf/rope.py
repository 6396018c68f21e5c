"""Rotary frequencies of a configuration: default, linear, dynamic, llama3, yarn and longrope."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from pfmc.errors import did_you_mean
from pfmc.ingest.hf.config import Config

WIDEST = 1 << 14
"""The widest head whose rotary table is made."""

LEAST_BASE = 1.001
"""The least base of the frequencies."""


@dataclass(frozen=True)
class Rope:
    """One rotary embedding.

    Attributes:
        frequencies: radians a position, ``[width / 2]``.
        width: how many of a head's numbers are rotated.
        gain: factor on cosine and sine.
        long: frequencies for contexts beyond `limit` positions; empty if they are the same.
        limit: see `long` and `stretch`.
        stretch: factor of dynamic NTK scaling of contexts beyond `limit`; 0 for none.
        near: whether neighbours are rotated together, not the halves of a head.
    """

    frequencies: tuple[float, ...]
    width: int
    gain: float = 1.0
    long: tuple[float, ...] = ()
    limit: int = 0
    stretch: float = 0.0
    near: bool = False


@dataclass(frozen=True)
class _Want:
    config: Config
    base: float
    width: int
    longest: int

    @property
    def frequencies(self) -> np.ndarray:
        """``base ** (-2 i / width)`` (Su et al. 2021, arXiv:2104.09864)."""
        powers = np.arange(0, self.width, 2, dtype=np.float32) / np.float32(self.width)
        return np.float32(1.0) / np.float32(self.base) ** powers

    @property
    def original(self) -> int:
        return self.config.integer(
            "original_max_position_embeddings", default=max(2, self.longest), low=2
        )


def rope(
    config: Config, width: int, *, theta: float = 10000.0, part: float = 1.0, key: str = "",
) -> Rope:  # fmt: skip
    """The rotary embedding that `config` asks for.

    Args:
        config: the model's; both ``rope_parameters`` and the older keys are understood.
        width: of a head.
        theta: the family's base, if the configuration names none.
        part: the family's share of a head that is rotated, likewise.
        key: the type of layer, where each has its own.
    """
    own = config.part("rope_parameters")
    if own is not None and key and isinstance(own.body.get(key), dict):
        own = own.part(key)
    scaling = own or config.part("rope_scaling") or Config({}, config.where)
    outer = config.real("rope_theta", "rotary_emb_base", default=theta, low=LEAST_BASE)
    base = scaling.real("rope_theta", default=outer, low=LEAST_BASE)
    share = scaling.real(
        "partial_rotary_factor",
        default=config.real("partial_rotary_factor", "rotary_pct", default=part),
    )
    if width > WIDEST:
        raise config.refuse("head_dim", f"gives heads of width {width}; at most {WIDEST}")
    turned = int(width * share)
    if not 0 < turned <= width or turned % 2:
        raise config.refuse("partial_rotary_factor", f"rotates {turned} of {width} numbers a head")
    merged = Config({**_outer(config), **scaling.body}, scaling.where)
    kind = scaling.text("rope_type", "type", default="default")
    if kind not in KINDS:
        raise scaling.refuse("rope_type", "is not supported", did_you_mean(kind, KINDS))
    longest = config.integer("max_position_embeddings", default=2048)
    return KINDS[kind](_Want(merged, base, turned, longest))


def _outer(config: Config) -> dict[str, object]:
    """Phi-3 keeps the original length outside."""
    key = "original_max_position_embeddings"
    return {key: config.body[key]} if key in config.body else {}


def _made(want: _Want, frequencies: np.ndarray, gain: float = 1.0) -> Rope:
    return Rope(tuple(np.asarray(frequencies, np.float32).tolist()), want.width, gain)


def _default(want: _Want) -> Rope:
    return _made(want, want.frequencies)


def _linear(want: _Want) -> Rope:
    return _made(want, want.frequencies / np.float32(want.config.real("factor", low=1e-6)))


def _dynamic(want: _Want) -> Rope:
    """Dynamic NTK scaling: beyond the trained length the base grows with the length of the text.

    ``base' = base * (factor * length / trained - (factor - 1)) ** (width / (width - 2))``
    (transformers, modeling_rope_utils.py).
    """
    factor = want.config.real("factor", low=1.0)
    made = _made(want, want.frequencies)
    if want.width <= 2 or factor == 1.0:
        return made
    return replace(made, limit=want.longest, stretch=factor)


def _llama3(want: _Want) -> Rope:
    """Slow frequencies divided, fast ones kept, a ramp between (Llama 3.1 reference code)."""
    read, plain = want.config.real, want.frequencies
    factor, low, high = (
        read(k, low=1e-6) for k in ("factor", "low_freq_factor", "high_freq_factor")
    )
    turns = want.original * plain / np.float32(2 * math.pi)  # turns within the original length
    ramp = np.clip((turns - low) / (high - low), 0, 1) if high != low else turns >= low
    return _made(want, (1 - ramp) * plain / factor + ramp * plain)


def _yarn(want: _Want) -> Rope:
    """YaRN (Peng et al. 2023, arXiv:2309.00071, sections 3.2 and 3.4)."""
    c, plain = want.config, want.frequencies
    factor = c.real("factor", default=want.longest / want.original, low=1e-6)
    bounds = [
        want.width * math.log(want.original / (c.real(k, default=d, low=1e-6) * 2 * math.pi))
        / (2 * math.log(want.base))
        for k, d in (("beta_fast", 32.0), ("beta_slow", 1.0))
    ]  # fmt: skip
    if c.flag("truncate", True):
        bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
    low, high = max(bounds[0], 0), min(bounds[1], want.width - 1)
    span = high - low or 0.001
    ramp = np.clip((np.arange(want.width // 2, dtype=np.float32) - low) / span, 0, 1)
    return _made(want, ramp * plain / factor + (1 - ramp) * plain, _yarn_gain(c, factor))


def _yarn_gain(config: Config, factor: float) -> float:
    def gain(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    above, below = (config.real(k, default=0.0) for k in ("mscale", "mscale_all_dim"))
    inferred = gain(above) / gain(below) if above and below else gain(1.0)
    return config.real("attention_factor", default=inferred)


def _longrope(want: _Want) -> Rope:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): a factor for each frequency."""
    c, plain = want.config, want.frequencies
    short, long = (
        plain / np.asarray(c.reals(k, want.width // 2), np.float32)
        for k in ("short_factor", "long_factor")
    )
    factor = want.longest / want.original
    inferred = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(want.original))
    gain = c.real("attention_factor", default=inferred)
    rest = tuple(np.asarray(long, np.float32).tolist())
    return Rope(_made(want, short).frequencies, want.width, gain, rest, want.original)


KINDS: dict[str, Callable[[_Want], Rope]] = {
    "default": _default,
    "dynamic": _dynamic,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,
}
"""The kinds of ``rope_type``."""
