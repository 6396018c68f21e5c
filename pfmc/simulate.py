"""An artifact as a running machine: the lowered graph in torch with its target's layers in it."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from pfmc import artifact, store, technology
from pfmc.artifact import Manifest
from pfmc.distill.generate import Decoder
from pfmc.distill.seq2seq import EncoderDecoder, is_pair
from pfmc.distill.student import Student
from pfmc.distill.text import Tokenizer, load_tokenizer
from pfmc.errors import CorruptError, InputError, UsageError, did_you_mean
from pfmc.targets import get
from pfmc.targets.base import Die, Target
from pfmc.technology import Technology

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Machine:
    """Simulated hardware.

    Attributes:
        path: the artifact; manifest: what it says of itself.
        technology, target: what it is made of.
        die: the one die that is simulated.
        tokenizer: of a language model, or None.
        report: ``report/report.json``.
    """

    path: Path
    manifest: Manifest
    technology: Technology
    target: Target
    die: Die
    tokenizer: Tokenizer | None
    report: Mapping[str, Any]

    @functools.cached_property
    def student(self) -> Student:
        """The lowered graph with the target's layers."""
        stored = store.read_layers(self.path)
        layers = {s.name: self.target.layer(s, self.technology, self.die) for s in stored}
        return Student(ir.load(self.path / "model.onnx"), layers).eval()

    def with_outputs(self, names: Sequence[str]) -> Machine:
        """The same machine, whose graph also hands out the inner values `names`."""
        model = self.student.model.clone()
        known = {str(v.name) for v in model.graph.outputs}
        inner = {str(v.name): v for n in model.graph for v in n.outputs}
        model.graph.outputs.extend(inner[n] for n in names if n not in known)
        made = replace(self)
        vars(made)["student"] = Student(model, self.student.linears).eval()
        return made

    def decoder(self) -> Decoder:
        """Drives the machine as a language model.

        Raises:
            UsageError: it is none.
        """
        return Decoder(self.student, self.tokenizer)

    @property
    def is_pair(self) -> bool:
        """Whether the machine is an encoder-decoder, or one of its halves."""
        return is_pair(self.student.model)

    def pair(self) -> EncoderDecoder:
        """Drives the machine as an encoder-decoder.

        Raises:
            UsageError: it is none, or only half of one.
        """
        return EncoderDecoder(self.student, self.tokenizer)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Feeds every graph input once and returns every output, as numpy arrays.

        Raises:
            UsageError: an input is missing, unknown, or of a wrong type or rank.
            InputError: sizes that do not fit each other, or an index beyond a table.
        """
        checked = {k: torch.from_numpy(np.array(v)) for k, v in self._checked(feeds).items()}
        try:
            with torch.inference_mode():
                results: dict[str, Tensor] = self.student(**checked)
        except (IndexError, RuntimeError) as error:  # torch: an index or sizes that do not fit
            wanted = [f"{v.name}: {_describe(v)}" for v in self.student.model.graph.inputs]
            raise InputError(
                f"the model cannot take these inputs: {str(error).splitlines()[0]}",
                where=", ".join(feeds), mend="the inputs are " + "; ".join(wanted),
            ) from error  # fmt: skip
        return {k: v.detach().cpu().numpy() for k, v in results.items()}

    def _checked(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        wanted = {str(v.name): v for v in self.student.model.graph.inputs}
        for name in feeds:
            if name not in wanted:
                raise UsageError(
                    f"the model has no input {name!r}", mend=did_you_mean(name, wanted)
                )
        checked: dict[str, Array] = {}
        rows = next((v.shape[0] for v in feeds.values() if v.ndim), 1)
        for name, value in wanted.items():
            given = feeds.get(name)
            given = _empty_memory(value, rows) if given is None else given
            if given is None:
                raise UsageError(f"the input {name!r} is missing", mend=f"it is {_describe(value)}")
            checked[name] = _cast(name, given, value)
        return checked


def _empty_memory(value: ir.Value, rows: int) -> Array | None:
    """A KV memory of `rows` sequences with nothing in it yet, for an input that nobody gave."""
    if not str(value.name).startswith("past") or value.shape is None:
        return None
    dims = [d if isinstance(d, int) else (0 if i else rows) for i, d in enumerate(value.shape)]
    return np.zeros(dims, np.float32)


def _describe(value: ir.Value) -> str:
    dims = [str(d) for d in value.shape] if value.shape is not None else ["…"]
    return f"{value.dtype.name if value.dtype else '?'} [{', '.join(dims)}]"


def _cast(name: str, given: Array, value: ir.Value) -> Array:
    rank = None if value.shape is None else len(value.shape)
    if rank is not None and given.ndim != rank:
        raise UsageError(
            f"the input {name!r} has {given.ndim} dimensions", mend=f"it is {_describe(value)}"
        )
    kind = value.dtype.numpy() if value.dtype is not None else given.dtype
    if not np.can_cast(given.dtype, kind, casting="same_kind"):
        raise UsageError(f"the input {name!r} is {given.dtype}", mend=f"it is {_describe(value)}")
    return given.astype(kind)


def open_machine(path: str | Path, die: Die | None = None) -> Machine:
    """Reads the artifact at `path` and builds its machine, every layer of it.

    Args:
        path: a finished artifact.
        die: which die, how old, and whether it reads noisily; die 0, new and noisy by default.

    Raises:
        UsageError: there is no artifact.
        CorruptError: a file of it is missing or was changed.
    """
    machine = describe_machine(path, die)
    _ = machine.student
    return machine


def describe_machine(path: str | Path, die: Die | None = None) -> Machine:
    """`open_machine`, but no layer is read before the student is asked for."""
    place, die = Path(path), die or Die()
    manifest = artifact.require_intact(place)
    tech = read_technology(place)
    target = get(tech.kind)
    return Machine(place, manifest, tech, target, die, _tokenizer(place), read_report(place))


def read_technology(path: Path) -> Technology:
    """The technology that the artifact was made for."""
    return technology.from_json(_read_json(path / "technology.json"))


def read_report(path: Path) -> dict[str, Any]:
    """The body of ``report/report.json``."""
    return _read_json(path / "report" / "report.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        body: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CorruptError(f"{path.name} cannot be read", where=str(path)) from error
    return body


def _tokenizer(path: Path) -> Tokenizer | None:
    file = path / "tokenizer" / "tokenizer.json"
    return load_tokenizer(file) if file.is_file() else None
