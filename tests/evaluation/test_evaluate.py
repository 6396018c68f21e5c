"""`pfmc eval` against numbers computed from ONNX Runtime's scores by another route."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from pfmc import simulate
from pfmc.compile import compile_model
from pfmc.distill.text import windows_of_file
from pfmc.errors import FileError, InputError, UsageError
from pfmc.evaluation import evaluate
from pfmc.evaluation.evaluate import _Book
from pfmc.evaluation.tasks import pooled, read_pairs
from pfmc.targets.base import Die

ROOT = Path(__file__).resolve().parents[2]
BARD = ROOT / "models" / "bard"
ZOO = ROOT.parent / "shared" / "zoo"


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def bard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("eval") / "bard.pfm"
    settings = ("calibration.sequences=4", "calibration.length=64")
    compile_model(BARD / "model.onnx", out, target="crossbar", settings=settings)
    return out


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some text of our own, as one file in a folder."""
    folder = tmp_path_factory.mktemp("prose")
    lines = (ROOT / "models" / "README.md").read_text(encoding="utf-8") * 3
    (folder / "one.txt").write_text(lines, encoding="utf-8")
    (folder / "two.txt").write_text(lines[::-1], encoding="utf-8")
    (folder / "short.txt").write_text("To be", encoding="utf-8")
    return folder


def losses(scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
    logs = scores - np.log(np.exp(scores.astype(np.float64)).sum(-1, keepdims=True))
    taken = np.take_along_axis(logs[:, :-1], ids[:, 1:, None], -1)[..., 0]
    return np.asarray(-taken.mean(1))


def test_text_over_dies(bard: Path, prose: Path) -> None:
    found = evaluate(bard, text=prose / "one.txt", documents=6, length=32, dies=(0, 1))
    machine = simulate.open_machine(bard, Die(0))
    assert machine.tokenizer is not None
    ids = windows_of_file(prose / "one.txt", machine.tokenizer, 32, 6)
    (truth,) = session(BARD / "model.onnx").run(["logits"], {"input_ids": ids})
    excess = [
        losses(simulate.open_machine(bard, Die(d)).decoder().logits(ids), ids) - losses(truth, ids)
        for d in (0, 1)
    ]
    ratio = found["perplexity ratio"]
    assert ratio.dies == pytest.approx([math.exp(e.mean()) for e in excess], rel=1e-4)
    assert ratio.value == pytest.approx(math.exp(np.mean(excess)), rel=1e-4)
    assert found["perplexity of the source"].value == pytest.approx(
        math.exp(losses(truth, ids).mean()), rel=1e-4
    )
    assert found.documents == 6
    assert ratio.low is not None
    assert ratio.low < ratio.value


def test_a_folder_s_windows_span_no_two_files(bard: Path, prose: Path) -> None:
    tokenizer = simulate.describe_machine(bard).tokenizer
    assert tokenizer is not None
    both = windows_of_file(prose, tokenizer, 32)
    parts = [windows_of_file(prose / n, tokenizer, 32) for n in ("one.txt", "two.txt")]
    np.testing.assert_array_equal(both, np.concatenate(parts))
    assert len(windows_of_file(prose, tokenizer, 32, 5)) == 5
    with pytest.raises(UsageError, match="fills one window"):
        windows_of_file(prose, tokenizer, 100_000)


def test_a_stopped_run_resumes(
    bard: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = tmp_path / "book.csv"
    task: dict[str, Any] = {"text": prose, "documents": 4, "length": 16}
    whole = evaluate(bard, **task, dies=(0, 1))
    evaluate(bard, **task, dies=(0,), save=book)
    rows = book.read_text(encoding="utf-8").splitlines(keepends=True)
    book.write_text("".join(rows) + "".join(r for r in rows[1:4]).replace(rows[1][:64], "f" * 64))

    opened: list[Die] = []
    real = simulate.open_machine

    def watched(path: Path, die: Die) -> Any:
        opened.append(die)
        return real(path, die)

    monkeypatch.setattr(simulate, "open_machine", watched)
    again = evaluate(bard, **task, dies=(0, 1), save=book)
    assert [d.seed for d in opened] == [1]
    assert again.figures == whole.figures
    with pytest.raises(FileError, match="cannot write"):
        evaluate(bard, **task, save=tmp_path / "none" / "book.csv")
    assert len(opened) == 1, "refused before anything was measured"
    with book.open(newline="") as file:
        assert {r["metric"] for r in csv.DictReader(file)} >= {"kl", "student", "complete"}


@pytest.mark.parametrize("cut", [0, -1, -4, -20, -60, -100])
def test_a_book_torn_anywhere_is_carried_on(cut: int, tmp_path: Path) -> None:
    """The first row of the next try was glued to the torn one, and two tries were mixed."""
    path = tmp_path / "book.csv"
    first, second = ({"a": np.arange(4.0) + k, "b": np.full(4, 0.5)} for k in (0, 10))
    _Book(path, "x").once(0, lambda: first)
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    _Book(path, "x").once(0, lambda: second)
    found = _Book(path, "x").once(0, lambda: pytest.fail("measured again"))
    known = first if cut in (-1, -4) else second  # only its last line is torn: it is complete
    for metric, values in known.items():
        np.testing.assert_array_equal(found[metric], values)


def test_images_with_labels(tmp_path: Path) -> None:
    path = ZOO / "vit__t_static.onnx"
    if not path.is_file():
        pytest.skip("needs the zoo beside the repository")
    running = session(path)
    (entry,) = running.get_inputs()
    rng = np.random.default_rng(0)
    step = entry.shape[0]
    images = rng.normal(size=(24, *entry.shape[1:])).astype(np.float32)
    parts = [images[i : i + step] for i in range(0, 24, step)]
    scores = np.concatenate([running.run(None, {entry.name: p})[0] for p in parts])
    labels = scores.argmax(-1)
    labels[:6] = (labels[:6] + 1) % scores.shape[1]
    np.savez(tmp_path / "images.npz", **{entry.name: images, "labels": labels})
    compile_model(path, tmp_path / "v.pfm", target="rom", recipe="rom8",
                  settings=("calibration.sequences=2",))  # fmt: skip
    found = evaluate(tmp_path / "v.pfm", inputs=tmp_path / "images.npz", dies=(None,))
    assert found["accuracy of the source"].value == pytest.approx(18 / 24)
    assert found["top-1 agreement"].value >= 0.75
    assert found["cosine of the outputs"].value > 0.99
    np.savez(tmp_path / "wrong.npz", **{entry.name: images, "labels": labels * 1.0})
    with pytest.raises(InputError, match="labels are float64"):
        evaluate(tmp_path / "v.pfm", inputs=tmp_path / "wrong.npz")
    np.savez(tmp_path / "far.npz", **{entry.name: images, "labels": labels + 99_999})
    with pytest.raises(UsageError, match="a label is"):
        evaluate(tmp_path / "v.pfm", inputs=tmp_path / "far.npz")
    np.savez(tmp_path / "few.npz", **{entry.name: images, "labels": labels[:5]})
    with pytest.raises(InputError, match=r"shape \[5\] for 24 samples"):
        evaluate(tmp_path / "v.pfm", inputs=tmp_path / "few.npz")
    with pytest.raises(UsageError, match="no output 'score'"):
        evaluate(tmp_path / "v.pfm", inputs=tmp_path / "images.npz", output="score")
    book = {"dies": (None,), "save": tmp_path / "book.csv"}
    evaluate(tmp_path / "v.pfm", inputs=tmp_path / "images.npz", **book)
    np.savez(tmp_path / "other.npz", **{entry.name: images, "labels": scores.argmax(-1)})
    again = evaluate(tmp_path / "v.pfm", inputs=tmp_path / "other.npz", **book)
    assert again["accuracy of the source"].value == 1.0, "labels are part of what is measured"


def test_sentence_pairs_are_pooled_under_the_mask() -> None:
    vectors = np.array([[[3.0, 0.0], [0.0, 4.0], [9.0, 9.0]]])
    np.testing.assert_allclose(pooled(vectors, np.array([[1, 1, 0]])), [[0.6, 0.8]], rtol=1e-12)
    np.testing.assert_allclose(pooled(vectors[:, 0], None), [[1.0, 0.0]])


def test_pairs_of_both_layouts(tmp_path: Path) -> None:
    (tmp_path / "three.tsv").write_text("2.5\ta cat\ta dog\n0\tx\ty\n")
    (tmp_path / "seven.tsv").write_text("g\tf\ty\t1\t2.5\ta cat\ta dog\n")
    assert read_pairs(tmp_path / "three.tsv").sentences == ("a cat", "a dog", "x", "y")
    assert read_pairs(tmp_path / "seven.tsv").scores.tolist() == [2.5]
    assert read_pairs(tmp_path / "three.tsv", 1).scores.tolist() == [2.5]
    (tmp_path / "bad.tsv").write_text("2.5\ta\tb\nmuch\ta\tb\n")
    with pytest.raises(InputError, match="no pair") as caught:
        read_pairs(tmp_path / "bad.tsv")
    assert "line 2" in caught.value.where


def test_the_verb(bard: Path, prose: Path, here: Callable[..., Any]) -> None:
    words = ("eval", bard, "--text", prose, "--documents", 4, "--length", 16)
    shown = here(*words, "--dies", "0-1")
    assert shown.code == 0, shown.err
    assert "perplexity ratio" in shown.out
    assert "2 die(s)" in shown.out
    body = json.loads(here(*words, "--json", "--dies", "ideal").out)
    assert body["dies"] == [None]
    assert {f["name"] for f in body["figures"]} >= {"perplexity ratio", "top-1 agreement"}
    failed = here(*words, "--fail-on", "perplexity ratio>0.1")
    assert failed.code == 4
    assert "perplexity ratio is" in failed.err
    assert here(*words, "--fail-on", "perplexity ration>1").code == 2
    here(*words, "--fail-on", "perplexity").refused(2, "cannot read the limit")
    here("eval", bard, "--dies", "x").refused(2, "cannot read the dies")
    once = json.loads(here(*words, "--json", "--dies", "0,0").out)
    assert once["dies"] == [0], "a die named twice is one die, and has no spread"
    here("eval", bard, "--text", prose, "--pairs", prose).refused(2, "give one of")
    here("eval", bard, "--text", prose / "none.txt").refused(74, "no such text")


def test_the_harness_scores_an_artifact(bard: Path, tmp_path: Path) -> None:
    """A local task of lm-evaluation-harness, without any network."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from pfmc.evaluation.harness import ArtifactLM

    model = ArtifactLM(str(bard), die="ideal")

    def ask(kind: str, *arguments: Any) -> Any:
        request = Instance(request_type=kind, doc={}, arguments=arguments, idx=0)
        return getattr(model, kind)([request])[0]

    text = "To be, or not to be"
    tokens = model.tokenizer.encode(text, special=False)
    ids = np.array([[*model._prefix(), *tokens]])
    expected = float(model.decoder.loglikelihood(ids).sum())
    assert ask("loglikelihood_rolling", text) == pytest.approx(expected, abs=1e-4)
    first, rest = "To be, or", " not to be"
    total = ask("loglikelihood", "", first)[0] + ask("loglikelihood", first, rest)[0]
    assert total == pytest.approx(expected, abs=1e-3)
    written = ask("generate_until", first, {"until": ["\n"], "max_gen_toks": 8})
    assert ask("loglikelihood", first, written)[1] is True, "greedy text is what greedy gives"
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for model.window in (2, 5, 8):  # type: ignore[misc]
        for count in range(1, 4 * model.window):
            ids = list(range(3, 3 + count))
            theirs = get_rolling_token_windows(ids, model._prefix()[0], model.window, 1)
            assert list(model._parts(ids)) == [make_disjoint_window(pair) for pair in theirs]
    model.window = len(tokens)
    assert ask("loglikelihood_rolling", text) == pytest.approx(expected, abs=1e-4)
    long, asked = "O " * 40, []
    real = model.decoder.generate

    def watched(prompt: Any, count: int, **more: Any) -> Any:
        asked.append((len(prompt), count))
        return real(prompt, count, **more)

    model.window, model.decoder.generate = 16, watched  # type: ignore[method-assign]
    ask("generate_until", long, {"until": ["\n"]})  # 256 tokens by default
    assert asked == [(8, 8)], "half of the window is kept for the prompt"
    model.window, model.decoder.generate = 1024, real  # type: ignore[method-assign]
    task = {
        "task": "local_lines", "dataset_path": "json", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "lines.jsonl")}},
        "test_split": "test", "doc_to_text": "{{query}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    lines = [
        {"query": "ROMEO:\nWhat, ho", "choices": ["!", "zqxj"], "gold": 0},
        {"query": "My noble", "choices": [" lord", " xylophone quartz"], "gold": 0},
    ]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    from lm_eval.api.task import ConfigurableTask

    found = lm_eval.simple_evaluate(
        model=model, tasks=[ConfigurableTask(config=task)], bootstrap_iters=0
    )
    assert found["results"]["local_lines"]["acc,none"] == 1.0


def test_the_harness_reads_no_more_than_the_position_table_holds(
    tiny: Path, tmp_path: Path
) -> None:
    """A window of 1024 ended every evaluation of a small GPT-2."""
    pytest.importorskip("lm_eval")
    from pfmc.evaluation.harness import ArtifactLM

    path = ZOO / "gpt2__h_dyn.onnx"
    if not path.is_file():
        pytest.skip("needs the zoo beside the repository")
    compile_model(
        path, tmp_path / "g.pfm", target="rom", recipe="stream",
        tokenizer=tiny.parent / "tokenizer.json",
    )  # fmt: skip
    model = ArtifactLM(str(tmp_path / "g.pfm"))
    assert 16 <= model.window < 1024
    assert model._rolling(" ".join(f"w{i % 90}" for i in range(1500))) < 0.0
