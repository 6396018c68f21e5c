"""Files that are no ONNX: each is named for what it looks like, and never unpickled."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pfmc.errors import InputError, PfmcError, UsageError
from pfmc.ingest import load, magic
from pfmc.ingest.files import open_mapped


class _Bomb:
    """Unpickling this would make a file."""

    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return os.mkdir, ("unpickled",)


def _safetensors() -> bytes:
    head = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", len(head)) + head + b"\0\0\0\0"


def _zip(tmp: Path, name: str) -> bytes:
    path = tmp / "made.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, pickle.dumps(_Bomb()))
    return path.read_bytes()


HEADS = {
    "GGUF": (b"GGUF\x03\0\0\0" + b"\0" * 64, "a GGUF file"),
    "ort": (b"\x20\0\0\0ORTM" + b"\1" * 64, "own .ort format"),
    "tflite": (b"\x1c\0\0\0TFL3" + b"\1" * 64, "TensorFlow Lite"),
    "keras": (b"\x89HDF\r\n\x1a\n" + b"\1" * 64, "HDF5"),
    "pickle": (pickle.dumps(_Bomb(), 2), "Python pickle .* never opened"),
    "pickle5": (pickle.dumps({"weight": _Bomb()}, 5), "Python pickle"),
    "safetensors": (_safetensors(), "a safetensors file"),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid",
        "Git LFS pointer[\\s\\S]*git lfs pull",
    ),
    "html": (b"<!DOCTYPE html><html>", "a web page"),
    "json": (b'  {"model": 1}', "a JSON file"),
    "gzip": (b"\x1f\x8b\x08" + b"\1" * 64, "gzip"),
    "text proto": (b"ir_version: 8\ngraph {", "text form"),
    "empty": (b"", "The file is empty"),
    "zeros": (b"\0" * 5000, "zeros only"),
    "4 GB header": (
        b"\x3a\xff\xff\xff\xff\x0f" + b"\1" * 64,
        "a field of 4294967295 bytes where 64",
    ),
    "bomb of nodes": (None, "more than 1000000 nodes"),
    "no graph": (b"\x08\x0a", "holds no graph"),
    "endless number": (b"\xff" * 40, "a number that never ends"),
}


def _bomb_of_nodes() -> bytes:
    body = b"\x0a\x00" * 1_000_001
    size, length = len(body), bytearray()
    while size:
        length.append(size & 0x7F | (0x80 if size > 0x7F else 0))
        size >>= 7
    return b"\x08\x0a\x3a" + bytes(length) + body


@pytest.mark.parametrize("kind", HEADS)
def test_wrong_file_is_named(kind: str, save: Callable[[Any], Path]) -> None:
    content, message = HEADS[kind]
    path = save(_bomb_of_nodes() if content is None else content)
    with pytest.raises(InputError, match=message) as caught:
        load(path)
    assert caught.value.exit_code == 3
    assert str(path) in caught.value.where
    assert not Path("unpickled").exists()


@pytest.mark.parametrize(
    ("member", "kind"), [("archive/data.pkl", "PyTorch checkpoint"), ("a.txt", "a ZIP archive")]
)
def test_zip(member: str, kind: str, tmp_path: Path, save: Callable[[Any], Path]) -> None:
    with pytest.raises(InputError, match=kind):
        load(save(_zip(tmp_path, member)))


def test_missing_file_tells_the_nearest_name(linear: Any, save: Callable[[Any], Path]) -> None:
    path = save(linear)
    with pytest.raises(
        UsageError, match=r"No such file[\s\S]*did you mean .*model\.onnx"
    ) as caught:
        load(path.with_name("modle.onnx"))
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError, match="does not exist either"):
        load(path.parent / "nowhere" / "model.onnx")


def test_folder_and_strange_names(linear: Any, save: Callable[[Any], Path]) -> None:
    path = save(linear)
    with pytest.raises(UsageError, match=r"a folder[\s\S]*for example .*model\.onnx"):
        load(path.parent)
    with pytest.raises(UsageError, match="cannot hold a NUL"):
        load("a\0b")
    with pytest.raises(UsageError, match="No usable file name: File name too long"):
        load("x" * 5000)


def test_fifo_is_no_model(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    with pytest.raises(InputError, match="not a regular file"):
        load(tmp_path / "pipe.onnx")


def test_every_truncation_of_a_model_is_refused(linear: Any, save: Callable[[Any], Path]) -> None:
    whole = linear.SerializeToString()
    for size in range(len(whole)):
        with contextlib.suppress(InputError):  # a cut between two fields may leave a sound model
            load(save(whole[:size]))


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("random") / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(PfmcError):
        load(path)


def test_scan_accepts_what_protobuf_writes(linear: Any, save: Callable[[Any], Path]) -> None:
    magic.scan(open_mapped(save(linear), follow=True))


def test_hash_is_that_of_the_content(linear: Any, save: Callable[[Any], Path]) -> None:
    import hashlib

    path = save(linear)
    assert load(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert np.array_equal(path.stat().st_size, load(path).files[0].size)
