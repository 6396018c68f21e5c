"""What is learned from: lengths that fit, a decoder's own positions, windows made up anew."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from pfmc.compile import Options, prepare
from pfmc.distill.corpus import lesson_of
from pfmc.distill.course import Course
from pfmc.distill.lessons import Language, Vectors
from pfmc.distill.student import Student
from pfmc.errors import UsageError

COURSE = Course(batch=2, micro=2, sequences=8, held_out=2, length=16)


def teacher(model: Path) -> Student:
    options = Options(target="rom", recipe="stream")
    return Student(prepare(model, options).teacher)


@pytest.mark.parametrize("name", ["bert__t_dyn", "clip__t_dyn", "bart__h_dyn"])
def test_an_encoder_reads_no_more_than_its_positions(zoo: Path, name: str) -> None:
    lesson = lesson_of(teacher(zoo / f"{name}.onnx"), replace(COURSE, length=1024))
    assert isinstance(lesson, Vectors)
    assert lesson.inputs["input_ids"].shape == (8, 64)


def test_a_graph_of_one_token_a_call_is_refused(zoo: Path) -> None:
    with pytest.raises(UsageError, match="1 token a call"):
        lesson_of(teacher(zoo / "llama__t_kv.onnx"), COURSE)


def test_an_encoders_text_needs_a_tokenizer(zoo: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="text needs a tokenizer"):
        lesson_of(teacher(zoo / "bert__t_dyn.onnx"), COURSE, text=tmp_path / "x.txt")


@pytest.mark.parametrize("name", ["bart__h_dyn", "bart__t_dyn", "t5__h_dyn"])
def test_a_decoder_has_positions_of_its_own(zoo: Path, tmp_path: Path, name: str) -> None:
    """The encoder's mask neither cuts the decoder's tokens nor hides any of its scores."""
    student, rng = teacher(zoo / f"{name}.onnx"), np.random.default_rng(0)
    ids, real = rng.integers(3, 100, (10, 12)), rng.integers(3, 6, 10)
    mask = (np.arange(12) < real[:, None]).astype(np.int64)
    np.savez(tmp_path / "x.npz", input_ids=ids, attention_mask=mask, decoder_input_ids=ids)
    lesson = lesson_of(student, COURSE, inputs=tmp_path / "x.npz")
    assert isinstance(lesson, Vectors)
    feeds = lesson.feeds([0, 1])
    assert feeds["decoder_input_ids"].shape == (2, 12)
    (scores,) = (n for n in (*lesson.scores, *lesson.vectors) if n in ("logits", "add_849"))
    with torch.no_grad():
        outputs = {n: v.clone() for n, v in student(**feeds).items()}
    target = lesson.keep({n: v.clone() for n, v in outputs.items()})
    same = float(lesson.loss(outputs, target, feeds))
    outputs[scores][:, -1] += torch.linspace(0, 9, 128)
    assert float(lesson.loss(outputs, target, feeds)) > same + 1e-3


def test_scores_of_samples_by_each_other_do_not_count(zoo: Path) -> None:
    lesson = lesson_of(teacher(zoo / "clip__h_dyn.onnx"), COURSE)
    assert isinstance(lesson, Vectors)
    assert not lesson.scores
    assert {"text_embeds", "image_embeds"} <= set(lesson.vectors)


def test_scores_of_positions_are_not_cut(zoo: Path, tmp_path: Path) -> None:
    """An extractive reader's ``[batch, positions]``: remembered, other lengths would not fit."""
    student = teacher(zoo / "bert__t_dyn.onnx")
    ids = np.ones((10, 12), np.int64)
    mask = (np.arange(12) < np.arange(2, 12)[:, None]).astype(np.int64)
    held = {"input_ids": ids, "attention_mask": mask, "token_type_ids": 0 * ids}
    np.savez(tmp_path / "x.npz", **held)
    lesson = lesson_of(student, COURSE, inputs=tmp_path / "x.npz")
    assert isinstance(lesson, Vectors) and lesson.padded
    flat = next(v for v in student.model.graph.outputs if v.shape is not None and len(v.shape) == 2)
    flat.shape = ir.Shape(["batch", "seq"])
    lesson = lesson_of(student, COURSE, inputs=tmp_path / "x.npz")
    assert isinstance(lesson, Vectors) and not lesson.padded


def test_windows_of_another_first_token_are_written_anew(tiny: Path, tmp_path: Path) -> None:
    student, named = teacher(tiny), tmp_path / "tokenizer.json"
    shutil.copy(tiny.parent / "tokenizer.json", named)
    (tmp_path / "config.json").write_text('{"bos_token_id": 5}')
    for tokenizer in (None, named):
        lesson = lesson_of(student, COURSE, folder=tmp_path, key="k", tokenizer=tokenizer)
        assert isinstance(lesson, Language)
        assert (lesson.ids[:, 0] == 5).all() == (tokenizer is named)
