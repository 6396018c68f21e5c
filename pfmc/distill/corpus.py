"""Data for distillation: the user's text or arrays, else what the teacher or chance makes up.

Without data, a causal language model writes its own text at temperature 1 from its first token on
(LLM-QAT, arXiv:2305.17888; Analog Foundation Models, arXiv:2505.09663), other text models read
random tokens, everything else sees normal noise. What was made up is kept in the folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pfmc.artifact import save_tensors
from pfmc.distill.calibrate import fitting_length, is_causal
from pfmc.distill.course import Course
from pfmc.distill.drive import Drive, detect, size_of
from pfmc.distill.feeds import batches, batches_of_file, is_ids
from pfmc.distill.generate import Decoder
from pfmc.distill.lessons import Language, Lesson, Vectors, outputs_that_count, side
from pfmc.distill.seq2seq import is_pair
from pfmc.distill.shapes import longest
from pfmc.distill.student import Student
from pfmc.distill.text import Tokenizer, load_tokenizer, windows_of_file
from pfmc.errors import InputError, UsageError

Array = npt.NDArray[Any]
Progress = Callable[[str], None]

FILE = "corpus.safetensors"
_SHORTEST = 2  # positions of a sample
_GENERATED = 256  # windows that the teacher writes at the same time


def lesson_of(
    teacher: Student, course: Course, *, folder: Path | None = None, key: str = "",
    tokenizer: Path | None = None, text: Path | None = None, inputs: Path | None = None,
    progress: Progress = lambda _: None, multiple: int = 1,
) -> Lesson:  # fmt: skip
    """The samples that `teacher` teaches with.

    Args:
        teacher: the untouched float model.
        course: how many samples, how long, which seed.
        folder: where made-up samples are kept; key: digest of the model they belong to.
        tokenizer: ``tokenizer.json``. text: a text file. inputs: ``.npz`` of graph inputs.
        progress: takes a line; says where the data came from.
        multiple: samples that the graph takes at once; there are always whole batches of them.

    Raises:
        UsageError: text without a tokenizer, or fewer samples than are needed.
        InputError: the tokenizer knows tokens that the model does not.
    """
    if inputs is not None:
        progress(f"distill: on {inputs.name}")
        found = _stacked(list(batches_of_file(teacher.model, inputs, 1 << 40)))
        return _vectors(teacher.model, found, course, inputs.name, multiple)
    read = None if tokenizer is None else load_tokenizer(tokenizer)
    try:
        drive = detect(teacher.model)
    except UsageError:
        return _encoder(teacher.model, course, read, text, progress, multiple)
    _require_match(read, drive, tokenizer)
    store = _Store(folder, key)
    return _language(teacher, drive, course, read, text, store, progress, multiple)


def _require_match(read: Tokenizer | None, drive: Drive, path: Path | None) -> None:
    if read is not None and read.size > drive.vocabulary:
        raise InputError(
            f"the tokenizer has {read.size} tokens, the model only {drive.vocabulary}",
            where=str(path), mend="give the model's own with --tokenizer",
        )  # fmt: skip


# -- language models -----------------------------------------------------------------------------


class _Store:
    """Made-up windows in a file, for the model and the options they were made with."""

    def __init__(self, folder: Path | None, key: str) -> None:
        self.path, self.key = None if folder is None else folder / FILE, key

    def once(self, asked: str, make: Callable[[], Array]) -> Array:
        """The windows asked for, from the file if they are there."""
        wanted = hashlib.sha256(f"{self.key} {asked}".encode()).hexdigest()
        if self.path is None:
            return make()
        from safetensors import SafetensorError, safe_open

        if self.path.is_file():
            try:
                with safe_open(self.path, "numpy") as file:
                    if file.metadata() == {"pfmc": wanted}:
                        return np.asarray(file.get_tensor("ids"), np.int64)
            except (SafetensorError, OSError):  # cut off in the middle of writing: made again
                self.path.unlink()
        ids = make()
        save_tensors(self.path, {"ids": ids.astype(np.int32)}, wanted)
        return ids


def _language(
    teacher: Student, drive: Drive, course: Course, tokenizer: Tokenizer | None,
    text: Path | None, store: _Store, progress: Progress, multiple: int,
) -> Language:  # fmt: skip
    decoder = Decoder(teacher, tokenizer)
    length = fitting_length(decoder, min(course.length, drive.length or course.length))
    if length < _SHORTEST:
        raise UsageError(
            f"the graph takes {length} token a call, of which nothing can be learned",
            mend="distil the model exported with a free length, or without KV memory",
        )
    wanted = course.sequences + course.held_out
    if text is not None:
        if tokenizer is None:
            raise _no_tokenizer(text)
        ids = windows_of_file(text, tokenizer, length)
        progress(f"distill: on {len(ids)} windows of {text.name}")
        return _cut(drive, ids, course, str(text), multiple)
    if is_causal(decoder):
        progress(f"distill: the model writes {wanted} windows of {length} tokens itself")

        def make() -> Array:
            return written(decoder, wanted, length, course.seed, progress)

        bos = None if tokenizer is None else tokenizer.bos_id
        asked = json.dumps([wanted, length, course.seed, bos])
        return _cut(drive, store.once(asked, make), course, "the corpus", multiple)
    progress("distill: on random tokens: give --text for real ones")
    rng = np.random.default_rng(course.seed)
    ids = rng.integers(0, drive.vocabulary, (wanted, length))
    return _cut(drive, ids, course, "the corpus", multiple)


def written(
    decoder: Decoder, count: int, length: int, seed: int, progress: Progress = lambda _: None
) -> Array:
    """Windows that the model writes itself at temperature 1, int64 ``[count, length]``.

    Each opens with the tokenizer's BOS, or with a random token where there is none. Batches have
    seeds of their own, so a longer corpus begins with the shorter one.
    """
    bos = decoder.tokenizer.bos_id if decoder.tokenizer is not None else None
    parts = []
    for number, start in enumerate(range(0, count, _GENERATED)):
        rng = np.random.default_rng([seed, number])
        rows = min(_GENERATED, count - start)
        opening = (
            np.full((_GENERATED, 1), bos)
            if bos is not None
            else rng.integers(0, decoder.vocabulary, (_GENERATED, 1))
        )
        parts.append(decoder.sample(opening[:rows], length - 1, seed=int(rng.integers(2**31))))
        progress(f"distill: {start + rows} of {count} windows written")
    return np.concatenate(parts)


def _cut(drive: Drive, ids: Array, course: Course, where: str, multiple: int) -> Language:
    """The last windows judge, the others teach."""
    judge = _whole(min(course.held_out, len(ids) // 4), multiple)
    rows = _whole(min(len(ids) - judge, course.sequences), multiple)
    if judge < 1 or rows < course.batch:
        raise UsageError(
            f"the text has {len(ids)} windows of {ids.shape[1]} tokens; a step needs "
            f"{course.batch} and judging a quarter more",
            where=where, mend="give a longer text, or --set distill.batch=4 distill.length=32",
        )  # fmt: skip
    return Language(drive, ids[:rows], ids[len(ids) - judge :])


def _no_tokenizer(text: Path) -> UsageError:
    return UsageError(
        "text needs a tokenizer", where=str(text),
        mend="put tokenizer.json beside the model or give --tokenizer",
    )  # fmt: skip


def _whole(count: int, multiple: int) -> int:
    return count - count % multiple


# -- everything else -----------------------------------------------------------------------------


def _encoder(
    model: ir.Model, course: Course, tokenizer: Tokenizer | None, text: Path | None,
    progress: Progress, multiple: int,
) -> Vectors:  # fmt: skip
    count, length, ids = course.sequences + course.held_out, longest(model, course.length), None
    words = any(is_ids(v) for v in model.graph.inputs)
    if text is not None and tokenizer is None and words:
        raise _no_tokenizer(text)
    if text is not None and tokenizer is not None:
        ids = windows_of_file(text, tokenizer, length)
        count = min(count, len(ids))
    made_up = (
        "random tokens: give --text for real ones"
        if words
        else ("normal noise: give --inputs data.npz for real data")
    )
    progress("distill: on " + (made_up if ids is None else f"{count} windows of text"))
    found = _stacked(list(batches(model, count, length, course.seed, ids)))
    return _vectors(model, found, course, "the data" if text is None else str(text), multiple)


def _stacked(feeds: list[dict[str, Array]]) -> dict[str, Array]:
    return {k: np.concatenate([f[k] for f in feeds]) for k in feeds[0]}


def _vectors(
    model: ir.Model, found: Mapping[str, Array], course: Course, where: str, multiple: int
) -> Vectors:
    count = len(next(iter(found.values())))
    judge = _whole(min(course.held_out, count // 4), multiple)
    rows = _whole(min(count - judge, course.sequences), multiple)
    if judge < 1 or rows < course.batch:
        raise UsageError(
            f"there are {count} samples; a step needs {course.batch} and judging a quarter more",
            where=where, mend="give more data, or --set distill.batch=4",
        )  # fmt: skip
    scores, vectors = outputs_that_count(model)
    if not scores and not vectors:
        raise UsageError("the model has no output of scores or vectors to learn from")
    mask = next((k for k, v in found.items() if "mask" in k and v.ndim == 2), "")
    teach = {k: v[:rows] for k, v in found.items()}
    judged = {k: v[count - judge :] for k, v in found.items()}
    return Vectors(
        teach, judged, scores, vectors, mask, _is_padded(model, found, mask), _apart(model, mask)
    )


def _apart(model: ir.Model, mask: str) -> tuple[str, ...]:
    """The outputs of a decoder, whose positions the mask of its encoder does not tell of."""
    if not mask or not is_pair(model):
        return ()
    encoded = {side(v, 1) for v in model.graph.inputs if v.name == mask} - {""}
    return tuple(
        str(v.name) for v in model.graph.outputs
        if side(v, 1) not in encoded and "encoder" not in str(v.name)
    )  # fmt: skip


def _is_padded(model: ir.Model, found: Mapping[str, Array], mask: str) -> bool:
    """Whether all inputs are ``[N, S]`` like the mask, with a length that is free.

    Not where a decoder has a length of its own, nor where an output scores the positions
    ``[N, S]``: cut, its scores would be other ones.
    """
    if not mask or any(v.shape != found[mask].shape for v in found.values()):
        return False
    flat = [v for v in model.graph.outputs if v.shape is not None and len(v.shape) == 2]
    if is_pair(model) or any(side(v, 1) for v in flat):
        return False
    return all(size_of(v, 1) is None for v in model.graph.inputs if v.name in found)
