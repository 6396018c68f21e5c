"""Another adapter into an artifact's writable memory: the fixed hardware does not change."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pfmc import artifact
from pfmc.artifact import Manifest, Writer, canonical_json
from pfmc.calibration import beside
from pfmc.errors import InputError, UsageError
from pfmc.ingest.adapters import CONFIG, WEIGHTS, Adapter, SidePath, adapter_files, load_adapter
from pfmc.ir import provenance, vocabulary
from pfmc.lowered import DATA_FILE
from pfmc.passes.fabric_formats import rounded_columns
from pfmc.with_adapter import KEY

MODEL = "model.onnx"
_CHUNK = 1 << 24

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Adapted:
    """An artifact with another adapter: its manifest, and which layers are adapted now."""

    manifest: Manifest
    layers: tuple[str, ...]


def adapt(
    source: str | Path, adapter: str | Path, out: str | Path, *, force: bool = False,
    trust_root: Path | None = None,
) -> Adapted:  # fmt: skip
    """Writes a copy of an artifact whose side paths hold another adapter.

    Tiles, netlist, costs and input ranges stay as they are: only the numbers in the writable memory
    change. The adapter may leave out layers and have smaller ranks; the rest is filled with zeros.

    Args:
        source: an artifact that was compiled with an adapter beside it.
        adapter: the folder of the new one, in PEFT's format.
        out: the artifact to write.
        force: whether another artifact at `out` may be replaced.
        trust_root: a folder within which the adapter may be reached through links.

    Raises:
        UsageError: the artifact has no writable side paths, or `out` is `source`.
        InputError: the adapter does not fit the side paths; every layer at fault is named.
    """
    place, made = Path(source), Path(out)
    manifest = artifact.require_intact(place)
    held = manifest["config"].get(KEY)
    if held is None or held["merged"]:
        raise UsageError(
            "the artifact has no writable side paths", where=str(place),
            mend="compile it with --adapter, and without --merge-adapter",
        )  # fmt: skip
    if made.exists() and made.samefile(place):
        raise UsageError("the copy needs another name", where=str(made), mend="give one with -o")
    model = ir.load(place / MODEL)
    found = load_adapter(adapter, model, trust_root=trust_root)
    factors = _fitted(model, found, str(adapter))
    config, request = _config(manifest, Path(adapter), trust_root)
    with Writer(made, force=force) as writer:
        if finished := writer.current(request):
            return Adapted(finished, tuple(found.paths))
        _write(writer, manifest, place, model, factors)
        for name, folder in (("adapter", Path(adapter)), ("source", _remembered(place))):
            if folder is not None:
                relative = os.path.relpath(folder.resolve(), made.resolve())
                writer.write(f"provenance/{name}.txt", f"{relative}\n".encode())
        done = writer.commit({"config": config, "request_sha256": request})
    return Adapted(done, tuple(found.paths))


def _remembered(place: Path) -> Path | None:
    """Where the model that the artifact was compiled from was, as far as it knows."""
    kept = place / "provenance" / "source.txt"
    return place / kept.read_text(encoding="utf-8").strip() if kept.is_file() else None


def _config(
    manifest: Manifest, adapter: Path, trust_root: Path | None
) -> tuple[dict[str, Any], str]:
    """The configuration with the new adapter's digests, and its own digest."""
    files = adapter_files(adapter, trust_root=trust_root)
    digests = {n: f.sha256 for n, f in zip((CONFIG, WEIGHTS), files, strict=True)}
    config = {**manifest["config"], KEY: {"files": digests, "merged": False}}
    if config[KEY] != manifest["config"][KEY]:
        config["adapted_from"] = manifest["config"].get("adapted_from", manifest.tree)
    return config, hashlib.sha256(canonical_json(config)).hexdigest()


# -- the factors ---------------------------------------------------------------------------------


def _fitted(model: ir.Model, found: Adapter, where: str) -> dict[str, Array]:
    """What each factor's constant shall hold, by its name; in the shape that it has."""
    nodes = {
        provenance.scope(n): n for n in model.graph
        if vocabulary.is_op(n, vocabulary.SIDE_PATH, vocabulary.DOMAIN)
        and vocabulary.KEY_SPREAD not in n.metadata_props
        and beside.KEY not in n.metadata_props  # a die's correction is no adapter's memory
    }  # fmt: skip
    faults = [f"{name} has no side path" for name in found.paths if name not in nodes]
    made: dict[str, Array] = {}
    for name, node in nodes.items():
        down, up = (v for v in node.inputs[2:] if v is not None)
        rank = _shape(down)[1]
        path = found.paths.get(name)
        if path is not None and path.rank > rank:
            faults.append(f"{name} has rank {path.rank}, its memory only {rank}")
            continue
        pair, top = _padded(path, _shape(down), _shape(up)), _top(node)
        for value, array in zip((down, up), pair, strict=True):
            made[str(value.name)] = rounded_columns(array, top) if top else array
    if faults:
        raise InputError(
            "The adapter does not fit the side paths: " + "; ".join(faults[:8]), where=where,
            mend="compile anew with --adapter: the hardware has no room for this one",
        )  # fmt: skip
    return made


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    return tuple(value.const_value.shape.numpy())


def _top(node: ir.Node) -> float:
    """The largest code of the memory, as of the side path's input; 0 for real numbers."""
    maker = node.inputs[0].producer() if node.inputs[0] is not None else None
    stored = node.inputs[2] is not None and str(node.inputs[2].name).endswith(":stored")
    if maker is None or not stored:
        return 0.0
    return float(maker.attributes["top"].value)


def _padded(
    path: SidePath | None, down: tuple[int, ...], up: tuple[int, ...]
) -> tuple[Array, Array]:
    """Both factors, zeros where the adapter has nothing."""
    left, right = np.zeros(down, np.float32), np.zeros(up, np.float32)
    if path is not None:
        left[:, : path.rank] = np.asarray(path.down.numpy(), np.float32)
        right[: path.rank] = np.asarray(path.up.numpy(), np.float32) * np.float32(path.scale)
    return left, right


# -- the files -----------------------------------------------------------------------------------


def _write(
    writer: Writer, manifest: Manifest, place: Path, model: ir.Model, factors: Mapping[str, Array]
) -> None:
    """Copies every file; the graph and its data get the new factors where the old ones are."""
    patches: dict[int, bytes] = {}
    for name, array in factors.items():
        value = model.graph.initializers[name]
        if isinstance(value.const_value, ir.ExternalTensor):
            assert value.const_value.offset is not None
            patches[value.const_value.offset] = array.tobytes()
        else:
            value.const_value = ir.tensor(array, name=name)
    for file in manifest.files:
        if file.path == MODEL:
            data = ir.to_proto(model).SerializeToString(deterministic=True)
            writer.write(MODEL, data)
        elif file.path == DATA_FILE:
            writer.write_stream(DATA_FILE, _patched(place / DATA_FILE, patches))
        else:
            writer.write_stream(file.path, _chunks(place / file.path))


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _patched(path: Path, patches: Mapping[int, bytes]) -> Iterable[bytes]:
    """The file with some ranges replaced, in its order."""
    with path.open("rb") as file:
        for offset in sorted(patches):
            while (gap := offset - file.tell()) > 0:
                yield file.read(min(gap, _CHUNK))
            yield patches[offset]
            file.seek(len(patches[offset]), os.SEEK_CUR)
        while chunk := file.read(_CHUNK):
            yield chunk
