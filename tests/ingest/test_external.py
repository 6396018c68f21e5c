"""External data: what may be reached, how, and at what cost."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfmc.errors import InputError
from pfmc.ingest import load
from pfmc.ingest.files import open_mapped

onnx = pytest.importorskip("onnx")


def externalise(model: Any, **entries: object) -> bytes:
    """Moves the first weight of `model` outside; returns its bytes."""
    tensor = model.graph.initializer[0]
    data = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    said = {"location": "model.data", "offset": 0, "length": len(data), **entries}
    for key, value in said.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return bytes(data)


@pytest.mark.parametrize("omitted", [(), ("offset",), ("length",), ("offset", "length")])
def test_external_weight_is_read_lazily(
    omitted: tuple[str, ...], linear: Any, save: Callable[[Any], Path]
) -> None:
    data = externalise(linear, **dict.fromkeys(omitted))
    path = save(linear)
    (path.parent / "model.data").write_bytes(data)
    loaded = load(path)
    tensor = loaded.model.graph.initializers["fc.weight"].const_value
    assert tensor is not None
    assert np.array_equal(tensor.numpy(), np.frombuffer(data, np.float32).reshape(4, 3))
    assert not tensor.numpy().flags.writeable
    assert [f.path.name for f in loaded.files] == ["model.onnx", "model.data"]
    assert loaded.files[1].sha256 == hashlib.sha256(data).hexdigest()
    loaded.release()


CASES = {
    "missing": ({}, None, "data file is missing: .*model.data"),
    "short": ({}, 40, r"too short: bytes 0 to 48 are asked of 40"),
    "empty": ({}, 0, "too short"),
    "offset past the end": ({"offset": 8}, 48, "bytes 8 to 56 are asked of 48"),
    "absolute": ({"location": "/etc/passwd"}, 48, "absolute location '/etc/passwd'"),
    "drive": ({"location": "C:model.data"}, 48, "absolute location"),
    "traversal": ({"location": "../model.data"}, 48, "leaves the model's folder"),
    "inner traversal": ({"location": "a/../../x"}, 48, "leaves the model's folder"),
    "backslash": ({"location": "..\\model.data"}, 48, "unusable location"),
    "no location": ({"location": ""}, 48, "unusable location"),
    "folder": ({"location": "."}, 48, "no regular file"),
    "negative offset": ({"offset": -1}, 48, "negative offset -1"),
    "negative length": ({"length": -48}, 48, "negative length"),
    "other length": ({"length": 44}, 48, "44 bytes is declared for a tensor of 48 bytes"),
    "huge length": ({"length": 1 << 62}, 48, "is declared for a tensor of 48 bytes"),
    "huge offset": ({"offset": 1 << 62}, 48, "too short"),
    "endless offset": ({"offset": "9" * 400}, 48, "unusable offset"),
    "hexadecimal offset": ({"offset": "0x10"}, 48, "unusable offset '0x10'"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_reference_is_refused(name: str, linear: Any, save: Callable[[Any], Path]) -> None:
    entries, size, message = CASES[name]
    data = externalise(linear, **entries)
    path = save(linear)
    if size is not None:
        (path.parent / "model.data").write_bytes(data[:size])
    with pytest.raises(InputError, match=message) as caught:
        load(path)
    assert "fc.weight" in caught.value.where


def test_link_out_of_the_folder_needs_trust(
    linear: Any, save: Callable[[Any], Path], tmp_path: Path
) -> None:
    """The layout of the Hugging Face cache: snapshots/REV/file -> ../../blobs/HASH."""
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "rev", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "data").write_bytes(externalise(linear))
    save(linear).rename(blobs / "proto")
    (snapshot / "model.onnx").symlink_to("../../blobs/proto")
    (snapshot / "model.data").symlink_to("../../blobs/data")
    with pytest.raises(InputError, match="link out of the model") as caught:
        load(snapshot / "model.onnx")
    assert f"--trust-root {tmp_path / 'hub'}" in caught.value.mend
    loaded = load(snapshot / "model.onnx", trust_root=tmp_path / "hub")
    assert loaded.files[1].path == blobs / "data"
    with pytest.raises(InputError, match="link out of the model"):
        load(snapshot / "model.onnx", trust_root=snapshot)


def test_link_inside_the_folder_is_fine(linear: Any, save: Callable[[Any], Path]) -> None:
    data = externalise(linear)
    path = save(linear)
    (path.parent / "real").write_bytes(data)
    (path.parent / "model.data").symlink_to("real")
    assert load(path).files[1].path.name == "real"


def test_linked_parent_folder_is_refused(
    linear: Any, save: Callable[[Any], Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "d").write_bytes(externalise(linear, location="sub/d"))
    path = save(linear)
    (path.parent / "sub").symlink_to(elsewhere)
    with pytest.raises(InputError, match="link out of the model"):
        load(path)


def test_hard_link_needs_trust(linear: Any, save: Callable[[Any], Path], tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(externalise(linear))
    path = save(linear)
    os.link(tmp_path / "secret", path.parent / "model.data")
    with pytest.raises(InputError, match="more than one name") as caught:
        load(path)
    assert "--trust-root" in caught.value.mend
    assert load(path, trust_root=path.parent).files[1].size == 48


def test_overlapping_ranges_read_what_lies_there(linear: Any, save: Callable[[Any], Path]) -> None:
    """The bias lies inside the weight; both are only read."""
    data = externalise(linear)
    for tensor in linear.graph.initializer:
        if tensor.name == "fc.bias":
            size = len(tensor.raw_data) or 4 * int(np.prod(tensor.dims))
            tensor.ClearField("raw_data")
            tensor.ClearField("float_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, text in {"location": "model.data", "offset": "8", "length": str(size)}.items():
                tensor.external_data.add(key=key, value=text)
    path = save(linear)
    (path.parent / "model.data").write_bytes(data)
    held = load(path).model.graph.initializers
    weight, bias = (held[n].const_value for n in ("fc.weight", "fc.bias"))
    assert weight is not None
    assert bias is not None
    assert np.array_equal(bias.numpy(), weight.numpy().reshape(-1)[2 : 2 + bias.size])


def test_not_a_number_outside_the_file_is_found(linear: Any, save: Callable[[Any], Path]) -> None:
    data = bytearray(externalise(linear))
    data[44:48] = b"\x00\x00\xc0\xff"
    path = save(linear)
    (path.parent / "model.data").write_bytes(data)
    with pytest.raises(InputError, match=r"nan[\s\S]*'fc.weight', index \[3, 2\]"):
        load(path)


_MEASURE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from pfmc.ingest import load
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loaded = load(sys.argv[1])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) / 1024, len(loaded.model.graph))
"""


def test_two_gigabytes_load_in_little_memory(tmp_path: Path) -> None:
    """1,150 float16 weights of 2 MiB in one (sparse) file, with 64 file descriptors."""
    make, count, side = onnx.helper, 1150, 1024
    half = onnx.TensorProto.FLOAT16
    model = make.make_model(
        make.make_graph(
            [
                make.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"], name=f"/l{i}/MatMul")
                for i in range(count)
            ],
            "g",
            [make.make_tensor_value_info("x0", half, ["s", side])],
            [make.make_tensor_value_info(f"x{count}", half, ["s", side])],
        ),
        opset_imports=[make.make_opsetid("", 20)],
        ir_version=10,
    )
    each = 2 * side * side
    for i in range(count):
        weight = model.graph.initializer.add(name=f"w{i}", data_type=half, dims=[side, side])
        weight.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", "big.data"), ("offset", i * each), ("length", each)):
            weight.external_data.add(key=key, value=str(value))
    (tmp_path / "big.onnx").write_bytes(model.SerializeToString())
    with open(tmp_path / "big.data", "wb") as file:
        file.truncate(count * each)
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path / "big.onnx")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    megabytes, nodes = map(float, run.stdout.split())
    assert megabytes < 100
    assert nodes == count


def _resident(path: Path) -> int:
    """Bytes of the maps of `path` that this process holds in memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.split()[0].count("-") == 1 and not line.split()[0].endswith(":"):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="needs Linux")
def test_hashing_a_mapped_file_keeps_none_of_it_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.data"
    data = np.random.default_rng(0).bytes(9_000_001)
    path.write_bytes(data)
    file = open_mapped(path, follow=False)
    assert sum(file.data[::4096]) > 0
    assert _resident(path) > 8_000_000
    assert file.sha256 == hashlib.sha256(data).hexdigest()
    assert _resident(path) == 0
