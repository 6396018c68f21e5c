"""Reads a Hugging Face checkpoint: config.json and safetensors become a graph without a copy."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path

import onnx_ir as ir

from pfmc.errors import InputError, UsageError
from pfmc.ingest.external import ExternalData
from pfmc.ingest.files import open_mapped
from pfmc.ingest.hf.config import CAP, Config
from pfmc.ingest.hf.families import architecture
from pfmc.ingest.hf.graph import Graph
from pfmc.ingest.hf.stored import FLOATS, INDEX, SINGLE, Stored, read_all
from pfmc.ingest.loaded import Loaded
from pfmc.ingest.tensors import EAGER_BYTES

CONFIG = "config.json"
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")
_PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt")


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a checkpoint's folder or its ``config.json``, with weights of any kind."""
    try:
        if path.name == CONFIG and path.is_file():
            return True
        if not (path / CONFIG).is_file():
            return False
        if (path / INDEX).exists() or (path / SINGLE).exists():
            return True
        weights = (p for p in path.iterdir() if p.suffix in _PICKLE_ENDINGS)
        return any(weights) or not any(path.glob("*.onnx"))
    except OSError:  # `load` says what is wrong with the path
        return False


def load_checkpoint(path: str | Path, *, trust_root: Path | None = None) -> Loaded:
    """Builds the graph of a checkpoint; its weights are views of the mapped files.

    Decoders get a KV memory (inputs ``past_key_values.{i}.key`` and ``.value``, outputs
    ``present.{i}.key`` and ``.value``) and no padding mask: fixed hardware computes each text from
    its first token on, so texts of one batch are equally long; export the model as ONNX if padded
    batches must run. Encoders get a padding mask, and encoder-decoders read source and target at
    once, without a memory. Half-precision weights are
    widened to float32 when they are read, transposes are made then, too.

    Args:
        path: the folder, or the ``config.json`` in it.
        trust_root: a folder within which the weights may be reached through links, as in the
            Hugging Face cache.

    Raises:
        UsageError: there is no such checkpoint.
        InputError: it is damaged, hostile, not supported, or its files do not fit each other;
            the message names every tensor at fault.
    """
    given = Path(path)
    config_path = given if given.name == CONFIG else given / CONFIG
    if not config_path.is_file():
        raise UsageError("there is no config.json here", where=str(given))
    active = gc.isenabled()
    gc.disable()  # it would walk the growing graph again and again
    try:
        return _load(config_path, trust_root)
    finally:
        if active:
            gc.enable()


def _load(config_path: Path, trust_root: Path | None) -> Loaded:
    file = open_mapped(config_path, follow=True)
    if file.size > CAP:
        raise InputError(f"{file.size} bytes are too many", where=str(config_path))
    config = Config.of(bytes(file.data[:]), str(config_path))
    name, found = architecture(config)
    stored, files = read_all(ExternalData(config_path, trust_root))
    _enough_layers(config, stored)
    g = Graph(stored, found.root, found.other, str(config_path.parent), found.spelt)
    found.build(g, config)
    loaded = Loaded(
        model=g.finish(name, found.unused),
        path=config_path,
        sha256=file.sha256,
        files=(file, *files),
        exporter=f"huggingface {name}",
        precision=_precision(stored),
    )
    if sum(f.size for f in loaded.files) <= EAGER_BYTES:
        loaded.check_finite()
    return loaded


def _enough_layers(config: Config, stored: dict[str, Stored]) -> None:
    """Refuses a count of layers that the file cannot hold before a graph of that size is made."""
    layers = config.integer(*_LAYERS, default=0, low=0)
    if layers > len(stored):
        raise InputError(
            f"The configuration has {layers} layers, the files only {len(stored)} tensors",
            where=config.where,
        )


def _precision(stored: dict[str, Stored]) -> ir.DataType:
    """The type that most of the weights have in the files."""
    sizes: Counter[str] = Counter()
    for tensor in stored.values():
        if tensor.dtype in FLOATS:
            sizes[tensor.dtype] += tensor.size
    return FLOATS[sizes.most_common(1)[0][0]] if sizes else ir.DataType.FLOAT
