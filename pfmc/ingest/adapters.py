"""Reads LoRA adapters in PEFT's format: a low-rank side path for each fixed linear of a model.

``y = linear(x) + scale * (x @ down) @ up`` (Hu et al. 2021, arXiv:2106.09685, section 4.1), with
``scale = alpha / rank``, or ``alpha / sqrt(rank)`` where the adapter is rank-stabilised
(Kalajdzievski 2023, arXiv:2312.03732). The base stays as it is; nothing is copied or merged here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pfmc.errors import InputError, UsageError
from pfmc.ingest.external import ExternalData
from pfmc.ingest.files import SourceFile, open_mapped
from pfmc.ingest.hf.config import CAP, Config
from pfmc.ingest.hf.graph import tensor_of
from pfmc.ingest.hf.stored import FLOATS, Stored, read_header
from pfmc.ir import vocabulary

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(r"(.+)\.lora_([AB])\.weight")
_MOST_SHOWN = 8
_NOT_PLAIN: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("use_dora", (None, False), "rescales the base's columns (DoRA), and the base cannot change"),
    ("bias", (None, "none"), "trains biases, and the base's cannot change"),
    ("modules_to_save", (None, []), "replaces whole modules, and the base's cannot change"),
    ("trainable_token_indices", (None, [], {}), "changes rows of the embedding, which are fixed"),
    ("layer_replication", (None, []), "builds another model out of the base's layers"),
    ("target_parameters", (None, []), "adapts stacks of weights, not modules"),
)
"""Keys, what they may be, and what else would mean."""


@dataclass(frozen=True)
class SidePath:
    """The writable low-rank path beside one fixed linear.

    Attributes:
        layer: the fixed linear's name.
        down: float32 ``[in, rank]``, read when asked for; up: ``[rank, out]``.
        scale: factor on the path's output.
    """

    layer: str
    down: ir.TensorProtocol
    up: ir.TensorProtocol
    scale: float

    def product(self) -> npt.NDArray[np.float32]:
        """What the path adds to the weight: ``scale * down @ up``, ``[in, out]``."""
        down, up = (np.asarray(t.numpy()).astype(np.float32) for t in (self.down, self.up))
        return np.asarray(down @ (np.float32(self.scale) * up), np.float32)

    @property
    def rank(self) -> int:
        """The rank of the path."""
        return int(self.up.shape.numpy()[0])


@dataclass(frozen=True)
class Adapter:
    """An adapter on a model.

    Attributes:
        paths: layer name -> its side path, in the order of the model's layers.
        files: configuration and weights.
        base: what the adapter says it was trained on; may be empty.
    """

    paths: Mapping[str, SidePath]
    files: tuple[SourceFile, ...]
    base: str


def adapter_files(
    folder: str | Path, *, trust_root: Path | None = None
) -> tuple[SourceFile, SourceFile]:
    """The configuration and the weights of the adapter in `folder`, mapped, nothing read.

    Raises:
        UsageError: there is no adapter in `folder`.
        InputError: its weights are missing, or may not be read from where they lie.
    """
    place = Path(folder) / CONFIG
    if not place.is_file():
        raise UsageError(
            f"there is no {CONFIG} here", where=str(folder),
            mend="give the folder that PEFT's save_pretrained wrote",
        )  # fmt: skip
    config = open_mapped(place, follow=True)
    return config, ExternalData(place, trust_root).file(WEIGHTS, str(place))


def load_adapter(folder: str | Path, model: ir.Model, *, trust_root: Path | None = None) -> Adapter:
    """Reads the adapter in `folder` and finds the fixed linears of `model` it belongs to.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: at a stage where fixed linears exist; they are named by module scope.
        trust_root: a folder within which the weights may be reached through links.

    Raises:
        UsageError: there is no adapter in `folder`.
        InputError: it is damaged, of a kind that is no plain LoRA, or does not fit the model; the
            message names every module at fault.
    """
    file, weights = adapter_files(folder, trust_root=trust_root)
    place = file.path
    if file.size > CAP:
        raise InputError(f"{file.size} bytes are too many", where=str(place))
    config = Config.of(bytes(file.data[:]), str(place))
    _check_kind(config)
    pairs = _pairs(read_header(weights), str(weights.path))
    return Adapter(
        _fitted(pairs, config, model, str(weights.path)),
        (file, weights),
        config.text("base_model_name_or_path", default=""),
    )


def _check_kind(c: Config) -> None:
    """Refuses what is no plain LoRA of products.

    ``fan_in_fan_out`` says how the base lies in its file and is no matter here, ``rank_pattern``
    shows in the matrices themselves.
    """
    c.demand("peft_type", "LORA")
    for key, allowed, why in _NOT_PLAIN:
        if c.body.get(key) not in allowed:
            raise c.refuse(
                key, why, "merge it with PEFT's merge_and_unload, and compile the result"
            )
    patterns = c.part("alpha_pattern")
    for key in patterns.body if patterns is not None else ():
        if not re.fullmatch(r"[\w.]+", key):
            raise c.refuse("alpha_pattern", f"has the pattern {key[:60]!r}; only names are read")


def _pairs(found: Mapping[str, Stored], where: str) -> dict[str, dict[str, Stored]]:
    """Module -> its ``A`` and ``B``; PEFT's own prefix is dropped."""
    pairs: dict[str, dict[str, Stored]] = {}
    strange = []
    for name, stored in found.items():
        match = _KEY.fullmatch(name.removeprefix(_PREFIX))
        if match is None or stored.dtype not in FLOATS or len(stored.shape) != 2:
            strange.append(f"{name} ({stored.dtype} {list(stored.shape)})")
        else:
            pairs.setdefault(match[1], {})[match[2]] = stored
    strange += [f"{m} has only {next(iter(p))}" for m, p in pairs.items() if len(p) < 2]
    if strange:
        raise InputError(
            f"These are no pairs of LoRA matrices: {_listed(strange)}", where=where,
            mend="embeddings, convolutions and trained norms of an adapter are not supported",
        )  # fmt: skip
    return pairs


def _fitted(
    pairs: Mapping[str, Mapping[str, Stored]], c: Config, model: ir.Model, where: str
) -> dict[str, SidePath]:
    sizes = {}
    for node in vocabulary.fixed_linears(model):
        weight = node.inputs[1]
        assert weight is not None
        assert weight.const_value is not None
        sizes[str(node.name)] = tuple(weight.const_value.shape.numpy())
    made: dict[str, SidePath] = {}
    twins, faults = _twins(model), []
    for module, pair in pairs.items():
        layer = _layer_of(module, sizes)
        (rank, inputs), (outputs, other) = pair["A"].shape, pair["B"].shape
        if layer is None:
            faults.append(f"{module} is no layer of the model")
        elif sizes[layer] != (inputs, outputs) or rank != other or not rank:
            faults.append(
                f"{module} is {inputs} to {rank} and {other} to {outputs}, "
                f"the layer {sizes[layer][0]} to {sizes[layer][1]}"
            )
        else:
            down, up = tensor_of(pair["A"], turned=True), tensor_of(pair["B"], turned=True)
            for name in (layer, *twins.get(layer, ())):
                made[name] = SidePath(name, down, up, _scale(c, module, rank))
    if faults:
        raise InputError(
            f"The adapter does not fit the model: {_listed(faults)}", where=where,
            mend="take the base model it was trained on: "
            + (c.text("base_model_name_or_path", default="") or "the adapter does not name it"),
        )  # fmt: skip
    return {name: made[name] for name in sizes if name in made}


def _twins(model: ir.Model) -> dict[str, list[str]]:
    """Layer -> further ones of the same weight: a module that is used more than once."""
    found: dict[str, list[str]] = {}
    weights = {str(n.name): _weight_of(n) for n in vocabulary.fixed_linears(model)}
    for name, weight in weights.items():
        first, _, number = name.rpartition(".")
        if number.isdecimal() and weight and weights.get(first) == weight:
            found.setdefault(first, []).append(name)
    return found


def _weight_of(node: ir.Node) -> tuple[object, ...]:
    value = node.inputs[1]
    assert value is not None
    assert value.const_value is not None
    name = value.metadata_props.get(vocabulary.KEY_WEIGHT, "")
    return (name, tuple(value.const_value.shape.numpy())) if name else ()


def _layer_of(module: str, layers: Mapping[str, object]) -> str | None:
    """The layer called `module`, or the only one that ends so: adapters may lack the root."""
    if module in layers:
        return module
    near = [n for n in layers if n.endswith(f".{module}")]
    return near[0] if len(near) == 1 else None


def _scale(c: Config, module: str, rank: int) -> float:
    """``alpha`` of the module, else of the adapter, by its rank."""
    alpha = c.real("lora_alpha", default=8.0)
    patterns = c.part("alpha_pattern")
    for key in patterns.body if patterns is not None else ():
        if patterns is not None and (module == key or module.endswith(f".{key}")):
            alpha = patterns.real(key)
            break
    return alpha / (math.sqrt(rank) if c.flag("use_rslora", False) else rank)


def _listed(words: list[str]) -> str:
    more = f" and {len(words) - _MOST_SHOWN} more" if len(words) > _MOST_SHOWN else ""
    return "; ".join(words[:_MOST_SHOWN]) + more
