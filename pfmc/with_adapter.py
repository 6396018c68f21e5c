"""The truth about an artifact with an adapter: a copy of its source with the adapter merged in."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pfmc.artifact import sha256_file
from pfmc.errors import UsageError
from pfmc.ingest.adapters import load_adapter
from pfmc.ingest.merged import Change, write_merged
from pfmc.ir import provenance, vocabulary
from pfmc.passes.quantise import matrix_of
from pfmc.simulate import Machine

KEY = "adapter"
"""In the manifest's configuration, where there is an adapter."""
MERGED = " with the adapter merged in float"
"""What is said behind the name of who gives the truth."""


def has_adapter(machine: Machine) -> bool:
    """Whether the artifact was compiled with an adapter."""
    return KEY in machine.manifest["config"]


@contextmanager
def merged_source(machine: Machine, source: Path, given: Path | None) -> Iterator[Path]:
    """A temporary copy of `source` with the adapter merged; `source` itself where there is none.

    Args:
        machine: the artifact; source: what it was compiled from.
        given: the adapter's folder, if it has moved.

    Raises:
        UsageError: the adapter is not where it was, or is another one.
        InputError: a layer's weight is no tensor of the source by itself.
    """
    if not has_adapter(machine):
        yield source
        return
    folder = find_adapter(machine, given)
    with tempfile.TemporaryDirectory(prefix="pfmc-verify-") as place:
        yield write_merged(source, list(_changes(machine, folder)), Path(place))


def find_adapter(machine: Machine, given: Path | None) -> Path:
    """The folder of the adapter that the artifact was compiled with, proved by digests.

    Raises:
        UsageError: it is not where it was, or is another one.
    """
    wanted: dict[str, str] = machine.manifest["config"][KEY]["files"]
    remembered = machine.path / "provenance" / "adapter.txt"
    path = given
    if path is None and remembered.is_file():
        path = machine.path / remembered.read_text(encoding="utf-8").strip()
    if path is None or not path.is_dir():
        raise UsageError(
            "the adapter is not where it was", where=str(path or ""), mend="give it with --adapter"
        )
    for name, digest in wanted.items():
        if not (path / name).is_file() or sha256_file(path / name) != digest:
            raise UsageError(
                "this is not the adapter the artifact was compiled with", where=str(path / name),
                mend="give the right one with --adapter",
            )  # fmt: skip
    return path


def _changes(machine: Machine, folder: Path) -> Iterator[Change]:
    """What the adapter adds to each layer's weight, and what then stands there about."""
    model = machine.student.model
    root = Path(folder.resolve().anchor)  # links may lead anywhere: the digests are right
    paths = load_adapter(folder, model, trust_root=root).paths
    merged = machine.manifest["config"][KEY]["merged"]
    for node in vocabulary.fixed_linears(model):
        if (path := paths.get(str(node.name))) and (codes := node.inputs[1]) is not None:
            added, held = path.product(), matrix_of(node).weights()
            near = held if merged else held + added
            yield Change(path.layer, provenance.weight(codes), added, near)
