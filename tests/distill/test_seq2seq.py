"""Encoder-decoders write what ONNX Runtime's greedy loop on their file writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pfmc.distill.drive import detect
from pfmc.distill.seq2seq import EncoderDecoder, is_pair
from pfmc.distill.student import Student
from pfmc.errors import UsageError
from pfmc.ingest.load import load
from pfmc.passes import pipeline, recipe
from tests.passes import sources

ZOO = Path(__file__).resolve().parents[3] / "shared" / "zoo"


def _writer(path: Path) -> EncoderDecoder:
    if not path.is_file():
        pytest.skip(f"{path.name} is absent")
    passes = recipe.load("stream", ()).passes
    return EncoderDecoder(Student(pipeline.canonicalise(load(path).model, passes).model).eval())


def _greedy(
    path: Path, feeds: dict[str, np.ndarray], ids: list[int], count: int, length: int | None
) -> list[int]:
    """The loop by hand on the untouched file: every step from the start."""
    running, new = sources.session(path), list[int]()
    name = next(i.name for i in running.get_inputs() if "decoder" in i.name)
    for _ in range(count):
        padded = np.zeros((len(next(iter(feeds.values()))), length or len(ids + new)), np.int64)
        padded[:, : len(ids + new)] = ids + new
        scores = running.run(None, {**feeds, name: padded})[0]
        new.append(int(scores[0, len(ids + new) - 1].argmax()))
    return new


@pytest.mark.parametrize(
    ("name", "start"), [("t5__h_dyn", 0), ("t5__ts", 0), ("bart__h_dyn", 2), ("bart__t_static", 2)]
)
def test_greedy_text(name: str, start: int, tmp_path: Path) -> None:
    """With larger weights, so that the tokens depend on the text."""
    if not (ZOO / f"{name}.onnx").is_file():
        pytest.skip(f"{name}.onnx is absent")
    path = sources.louder(ZOO / f"{name}.onnx", tmp_path / f"{name}.onnx", 6.0)
    writer, found = _writer(path), list[list[int]]()
    length = writer.pair.length
    count = 10 if length is None else length - 1
    for seed in (0, 1):
        text = np.random.default_rng(seed).integers(3, 60, 5).tolist()
        feeds = writer.source_of(text)
        found.append(list(writer.generate(feeds, [start], count, greedy=True)))
        assert found[-1] == _greedy(path, feeds, [start], count, length)
    assert len(found[0]) == count
    stopped = list(writer.generate(feeds, [start], count, greedy=True, stop_ids=[found[-1][2]]))
    assert stopped == found[-1][: found[-1].index(found[-1][2])]


@pytest.mark.parametrize("name", ["bart__h_gen__prefill", "bart__h_gen__decode"])
def test_one_of_two_files_is_refused(name: str) -> None:
    if not (ZOO / f"{name}.onnx").is_file():
        pytest.skip(f"{name}.onnx is absent")
    with pytest.raises(UsageError, match="decoder's half") as error:
        _writer(ZOO / f"{name}.onnx")
    assert "encoder and the decoder in one file" in str(error.value)


def test_what_is_missing_is_said() -> None:
    writer = _writer(ZOO / "t5__h_dyn.onnx")
    source = writer.source_of([5, 6, 7])
    with pytest.raises(UsageError, match="no start token"):
        writer.generate(source, [])
    with pytest.raises(UsageError, match="no start token"):
        writer.generate(source, [4096])
    with pytest.raises(UsageError, match="'input_ids' is missing"):
        writer.generate({}, [0])
    ones = {"input_ids": source["input_ids"]}
    assert list(writer.generate(ones, [0], 3, greedy=True)) == list(
        writer.generate(source, [0], 3, greedy=True)
    )
    assert is_pair(writer.student.model)
    with pytest.raises(UsageError, match="unknown to text generation"):
        detect(writer.student.model)
