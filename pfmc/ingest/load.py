"""Reads an ONNX file or a checkpoint, refuses what is broken, hands on one uniform graph."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator, MutableSequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from pfmc.errors import InputError
from pfmc.ingest import branches, dialects, magic, shapes, tidy
from pfmc.ingest.external import ExternalData
from pfmc.ingest.files import SourceFile, find, open_mapped
from pfmc.ingest.guard import Guard, check_inlined
from pfmc.ingest.loaded import Loaded, named
from pfmc.ingest.opset import upgrade
from pfmc.ingest.rewrite import Builder
from pfmc.ingest.tensors import EAGER_BYTES
from pfmc.ir import provenance
from pfmc.ir.vocabulary import IR_VERSION


def load(path: str | Path, *, trust_root: Path | None = None) -> Loaded:
    """Reads the model `path` as a uniform graph whose weights stay on disk until asked for.

    Args:
        path: the .onnx file, or the folder (or ``config.json``) of a Hugging Face checkpoint.
        trust_root: a folder within which external data may be reached through links; without
            it the data must lie in the folder of the .onnx file, as ordinary files.

    Raises:
        UsageError: there is no such file.
        InputError: the file is damaged, hostile or uses something that cannot be compiled.
        FileError: the system refused to read it.
    """
    if os.path.isdir(path) or Path(path).name == "config.json":
        from pfmc.ingest.checkpoint import is_checkpoint, load_checkpoint

        if is_checkpoint(Path(path)):
            return load_checkpoint(path, trust_root=trust_root)
    with _no_collection():
        file = open_mapped(find(path), follow=True)
        proto = parse(file)
        merged = branches.specialise(proto)
        drop_traces(proto)
        Guard(proto, str(file.path), frozenset(dialects.LOWERINGS)).check()
        external = ExternalData(file.path, trust_root)
        views = map_weights(proto, external)
        shapes.infer(proto, str(file.path))
        with named(file.path):
            model = build(proto, views)
            normalise(model)
    loaded = Loaded(
        model=model,
        path=file.path,
        sha256=file.sha256,
        files=(file, *external.files.values()),
        exporter=f"{proto.producer_name} {proto.producer_version}".strip() or "unknown",
        precision=precision(model),
        merged=merged,
    )
    if sum(f.size for f in loaded.files) <= EAGER_BYTES:
        loaded.check_finite()
    return loaded


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pauses the garbage collector, which would walk the growing graph again and again."""
    active = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if active:
            gc.enable()


def parse(file: SourceFile) -> onnx.ModelProto:
    """The protobuf message in `file`, after a look at its first bytes and its outer structure."""
    magic.recognise(file)
    magic.scan(file)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(cast(bytes, memoryview(file.data)))  # a view: no second copy
    except DecodeError as error:
        raise InputError(
            f"Not a valid ONNX file: {error}",
            where=str(file.path),
            mend="download or export it again",
        ) from error
    plain_domains(proto)
    return proto


def plain_domains(proto: onnx.ModelProto) -> None:
    """Spells the standard domain one way: ``"ai.onnx"`` becomes ``""``."""
    bodies = (proto.graph, *proto.functions)
    named = (*proto.opset_import, *(o for f in proto.functions for o in f.opset_import))
    for thing in (*named, *(n for body in bodies for n in body.node)):
        if thing.domain == "ai.onnx":
            thing.domain = ""


def drop_traces(proto: onnx.ModelProto) -> None:
    """Removes stack traces and the like, most of the bytes of a dynamo export, early."""
    for node in proto.graph.node:
        node.ClearField("doc_string")
        _keep(node.metadata_props, provenance.SCOPE_KEYS)
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        value.type.ClearField("denotation")
        if len(value.metadata_props):
            _keep(value.metadata_props, provenance.WEIGHT_KEYS)
    for function in proto.functions:
        del function.metadata_props[:], function.value_info[:]
        for node in function.node:
            del node.metadata_props[:]
            for attribute in node.attribute:
                attribute.ClearField("doc_string")
    del proto.metadata_props[:], proto.graph.metadata_props[:], proto.configuration[:]
    del proto.graph.quantization_annotation[:]


def _keep(entries: MutableSequence[onnx.StringStringEntryProto], keys: frozenset[str]) -> None:
    kept = [e for e in entries if e.key in keys and isinstance(e.value, str)]
    del entries[:]
    entries.extend(kept)


def map_weights(proto: onnx.ModelProto, external: ExternalData) -> dict[str, ir.TensorProtocol]:
    """Views of the external weights on the mapped files, by name, all checked, none read."""
    views: dict[str, ir.TensorProtocol] = {}
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            where = f"{external.model_path}: tensor {tensor.name!r}"
            views[tensor.name] = external.tensor(tensor, where)
    _embed_attributes(proto, external)
    return views


def build(proto: onnx.ModelProto, views: dict[str, ir.TensorProtocol]) -> ir.Model:
    """The graph of an accepted model, with `views` in place of its external weights."""
    for tensor in proto.graph.initializer:
        if tensor.name in views:
            tensor.ClearField("data_location")
            tensor.ClearField("external_data")
    try:
        model = ir.from_proto(proto)
    except ir.serde.SerdeError as error:
        raise InputError(f"The graph cannot be read: {_root(error)}", where="the graph") from error
    for name, view in views.items():
        model.graph.initializers[name].const_value = view
    for value in model.graph.initializers.values():
        if value.const_value is not None:  # what the tensor is counts, not what a note says of it
            value.type = ir.TensorType(value.const_value.dtype)
            value.shape = ir.Shape(value.const_value.shape.numpy())
    return model


def _root(error: BaseException) -> str:
    """The first line of what went wrong first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).partition("\n")[0][:300]


def _embed_attributes(proto: onnx.ModelProto, external: ExternalData) -> None:
    """Constants of nodes that lie outside the file are read in; they are few and small."""
    nodes = (*proto.graph.node, *(n for f in proto.functions for n in f.node))
    for holder, attributes in (
        *((f"node {n.name!r}", n.attribute) for n in nodes),
        *((f"function {f.name!r}", f.attribute_proto) for f in proto.functions),
    ):
        for attribute in attributes:
            for tensor in (attribute.t, *attribute.tensors):
                if tensor.data_location == onnx.TensorProto.EXTERNAL:
                    where = f"{external.model_path}: {holder}"
                    tensor.raw_data = external.extent(tensor, where).bytes()
                    tensor.ClearField("data_location")
                    tensor.ClearField("external_data")


def normalise(model: ir.Model) -> None:
    """Brings an accepted model to the uniform shape, in place."""
    modernise(model)
    dialects.lower(model)
    tidy.drop_identities(model.graph)
    tidy.infer_shapes(model)
    tidy.numeric_dims(model.graph)
    tidy.check_ranks(model.graph)
    tidy.sort(model.graph)
    tidy.drop_dead(model)
    tidy.name_everything(model.graph)
    model.ir_version = IR_VERSION


def modernise(model: ir.Model) -> None:
    """Stamps provenance, brings every operator to the current opset and inlines functions."""
    provenance.stamp(model)
    version = model.graph.opset_imports.get("", 1)
    for function in model.functions.values():
        upgrade(function, function.opset_imports.get("", version), Builder(function))
    tidy.plain_inputs(model.graph)
    upgrade(model.graph, version, Builder(model.graph))
    if model.functions:
        tidy.inline_functions(model)
        alive = [n for n in model.graph if any(v.name for v in n.outputs)]
        check_inlined(ir.to_proto(n) for n in alive)
    tidy.lift_constants(model.graph)


def precision(model: ir.Model) -> ir.DataType:
    """The floating-point type that holds most of the weights; FLOAT if there are none."""
    sizes: Counter[ir.DataType] = Counter()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype.is_floating_point():
            sizes[tensor.dtype] += tensor.size
    return sizes.most_common(1)[0][0] if sizes else ir.DataType.FLOAT


__all__ = ["Loaded", "load"]
