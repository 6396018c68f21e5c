"""What a die's layers really compute: probed as a lab would, or read from a file of measurements.

``die.npz`` holds for every layer NAME either ``NAME`` ``[in, out]``, its effective matrix (and,
if it likes, ``NAME.constant`` ``[out]``), or ``NAME.probes`` ``[N, in]`` and ``NAME.readings``
``[N, out]``: inputs that were applied, in the model's units, and outputs that were read, bias
included. Several readings of the same probe may stand in several rows: noise averages out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pfmc import noise
from pfmc.distill.side import Plant
from pfmc.distill.student import IdealLinear, Student
from pfmc.errors import FileError, InputError, UsageError, did_you_mean

Array = npt.NDArray[Any]
Probed = tuple[Array, Array]
"""Probes ``[N, in]`` and readings ``[N, out]``."""

PROBES_AN_INPUT = 8
FEWEST_PROBES = 1024
PROBES, READINGS, CONSTANT = ".probes", ".readings", ".constant"
_RIDGE = 1e-6  # of the mean power of a probe
_QUIET = 0.1  # of the mean: least spread of a probe's input


def nominal(student: Student) -> dict[str, Plant]:
    """Every layer of the ideal model, as it is meant; as it is stands there, too."""
    found = {}
    for name, module in student.linears.items():
        assert isinstance(module, IdealLinear)
        matrix = module.weight.detach().cpu().numpy().astype(np.float64)
        bias = np.zeros(matrix.shape[1])
        if module.bias is not None:
            bias = module.bias.detach().cpu().numpy().astype(np.float64)
        found[name] = Plant(matrix, bias, matrix, bias)
    return found


def input_spread(student: Student, feeds: Mapping[str, Any]) -> dict[str, Array]:
    """Root mean square ``[in]`` of every layer's inputs; none is much below the layer's mean."""
    seen: dict[str, Array] = {}

    def observe(name: str, x: torch.Tensor, _: torch.Tensor) -> None:
        rms = x.detach().flatten(0, -2).double().square().mean(dim=0).sqrt().cpu().numpy()
        seen[name] = np.maximum(rms, _QUIET * float(rms.mean()) or 1.0)

    student.observe = observe
    try:
        with torch.no_grad():
            student(**feeds)
    finally:
        student.observe = None
    return seen


def probe(name: str, layer: nn.Module, spread: Array, seed: int) -> Probed:
    """Applies Gaussian inputs of the spread that real ones have, so that converters hold them."""
    count = max(FEWEST_PROBES, PROBES_AN_INPUT * len(spread))
    drawn = noise.generator(seed, name, "probe").standard_normal((count, len(spread)), np.float32)
    inputs = np.asarray(drawn * spread, np.float32)
    with torch.no_grad():
        read = layer(torch.from_numpy(inputs)).cpu().numpy()
    return inputs, np.asarray(read)


def effective(probed: Probed, meant: Plant) -> Plant:
    """The matrix and constant of least squares; where probes say nothing, it is as meant."""
    inputs, readings = (np.asarray(a, np.float64) for a in probed)
    missed = readings - inputs @ meant.wanted - meant.bias
    mean_in, mean_out = inputs.mean(axis=0), missed.mean(axis=0)
    centred = inputs - mean_in
    gram = centred.T @ centred
    gram += (_RIDGE * np.square(inputs).sum() / len(gram) or 1.0) * np.eye(len(gram))
    change = np.linalg.solve(gram, centred.T @ (missed - mean_out))
    constant = meant.bias + mean_out - mean_in @ change
    return Plant(meant.wanted + change, constant, meant.wanted, meant.bias)


def probed_layers(
    layers: Iterable[tuple[str, nn.Module]], meant: Mapping[str, Plant],
    spread: Mapping[str, Array], seed: int,
) -> dict[str, Plant]:  # fmt: skip
    """Every layer of a simulated die, probed."""
    return {
        name: effective(probe(name, layer, spread[name], seed), meant[name])
        for name, layer in layers
    }


# -- files ---------------------------------------------------------------------------------------


def read_measured(path: Path, meant: Mapping[str, Plant]) -> dict[str, Plant]:
    """The layers as a file of measurements has them.

    Raises:
        UsageError: there is no such file.
        InputError: it is damaged, is of another model, or an array has a wrong shape or NaN.
    """
    held = _arrays(path)
    _require_known(path, held, meant)
    return {name: _plant(path, held, name, plant) for name, plant in meant.items()}


def _arrays(path: Path) -> dict[str, Array]:
    if not path.is_file():
        raise UsageError("there is no such file of measurements", where=str(path))
    try:
        with np.load(path, allow_pickle=False) as file:
            return {k: np.asarray(file[k]) for k in file.files}
    except OSError as error:
        raise FileError("the file cannot be read", where=str(path)) from error
    except Exception as error:  # zipfile and numpy raise many kinds for a damaged file
        raise InputError(f"not an .npz file of plain arrays: {error}", where=str(path)) from error


def _require_known(path: Path, held: Mapping[str, Array], meant: Mapping[str, Plant]) -> None:
    known = {n + s for n in meant for s in ("", PROBES, READINGS, CONSTANT)}
    for key in held:
        if key not in known:
            raise InputError(
                f"the model has no layer {key!r}: these measurements are of another model",
                where=str(path), mend=did_you_mean(key, sorted(meant)),
            )  # fmt: skip
    missing = [n for n in meant if n not in held and n + PROBES not in held]
    if missing:
        more = " …" if len(missing) > 4 else ""
        raise InputError(
            f"{len(missing)} layers were not measured: {', '.join(missing[:4])}{more}",
            where=str(path), mend="give NAME, or NAME.probes and NAME.readings, of every layer",
        )  # fmt: skip


def _plant(path: Path, held: Mapping[str, Array], name: str, meant: Plant) -> Plant:
    inputs, outputs = meant.wanted.shape

    def take(key: str, *shape: int | None) -> Array:
        array = held.get(key)
        wanted = ", ".join("N" if d is None else str(d) for d in shape)
        fits = (
            array is not None
            and array.ndim == len(shape)
            and all(d in (None, s) for d, s in zip(shape, array.shape, strict=True))
        )
        if array is None or not fits or array.dtype.kind not in "fiu":
            found = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
            raise InputError(f"{key} is {found}, not numbers [{wanted}]", where=str(path))
        if not np.isfinite(array).all():
            raise InputError(f"{key} holds NaN or infinity", where=str(path))
        return array.astype(np.float64)

    if name in held:
        matrix = take(name, inputs, outputs)
        key = name + CONSTANT
        constant = take(key, outputs) if key in held else meant.bias
        return Plant(matrix, constant, meant.wanted, meant.bias)
    probes = take(name + PROBES, None, inputs)
    if not len(probes):
        raise InputError(f"{name + PROBES} has no rows", where=str(path))
    return effective((probes, take(name + READINGS, len(probes), outputs)), meant)


def write_measured(path: Path, found: Mapping[str, Probed]) -> None:
    """A file as `read_measured` reads it."""
    arrays = {}
    for name, (inputs, readings) in found.items():
        arrays[name + PROBES], arrays[name + READINGS] = inputs, readings
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
