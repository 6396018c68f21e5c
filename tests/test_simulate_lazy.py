"""Describing a machine reads no layer; its student reads each one once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.synthetic import Shape, generate
from pfmc import simulate, store
from pfmc.compile import compile_model
from pfmc.targets.base import StoredLinear


def test_layers_are_read_once_and_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape(layers=1, hidden=64, heads=4, ffn=96, vocabulary=128)
    out = tmp_path / "out.pfm"
    compile_model(generate(tmp_path, shape), out, target="rom", recipe="stream")
    read: list[str] = []
    genuine = store.read_layers

    def watched(path: Path) -> Iterator[StoredLinear]:
        for stored in genuine(path):
            read.append(stored.name)
            yield stored

    monkeypatch.setattr(store, "read_layers", watched)
    machine = simulate.describe_machine(out)
    assert not read
    assert machine.student is machine.student
    assert read == [r.name for r in store.layer_records(out)]
    read.clear()
    simulate.open_machine(out)
    assert len(read) == 8
