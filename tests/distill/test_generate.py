"""Driving language models: KV memory, free length and fixed length write the same text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from pfmc.distill import generate
from pfmc.distill.drive import detect
from pfmc.distill.generate import Decoder, MemorySession, WindowSession
from pfmc.distill.student import Student
from pfmc.distill.text import find_tokenizer, load_tokenizer
from pfmc.errors import UsageError
from pfmc.ingest.load import load
from pfmc.passes import pipeline, recipe
from tests.passes import sources

ZOO = Path(__file__).resolve().parents[3] / "shared" / "zoo"
Maker = Callable[..., ir.Model]
PROMPT = [1, 2, 3, 4]


def decoder_of(path: Path) -> Decoder:
    return Decoder(Student(ir.load(path)))


def test_stories_greedy_tokens_equal_the_float_model(stories: Path) -> None:
    truth = json.loads((stories / "greedy.json").read_text())
    found = find_tokenizer(stories / "model.onnx")
    assert found is not None
    tokenizer = load_tokenizer(found)
    decoder = Decoder(Student(ir.load(stories / "model.onnx")), tokenizer)
    prompt, want = truth["prompt_ids"], truth["greedy_ids"]
    got = list(decoder.generate(prompt, len(want) - len(prompt), greedy=True, stop_ids=()))
    assert prompt + got == want
    assert tokenizer.decode(prompt + got) == truth["greedy_text"]
    assert tokenizer.encode(truth["greedy_text"])[: len(prompt)] == prompt


def test_bard_with_kv_memory_equals_bard_without(bard: Path) -> None:
    plain, memory = decoder_of(bard / "model.onnx"), decoder_of(bard / "model_kv.onnx")
    assert isinstance(memory.session(1), MemorySession)
    text = [list(d.generate([0, 5, 9], 40, seed=3, stop_ids=())) for d in (plain, memory)]
    assert text[0] == text[1]
    ids = np.random.default_rng(0).integers(0, plain.vocabulary, (3, 20))
    np.testing.assert_allclose(plain.logits(ids), memory.logits(ids), atol=2e-4)


@pytest.mark.parametrize("quantised", [False, True])
def test_canonical_memory_free_length_and_window_agree(
    quantised: bool, canonical_llama: Maker
) -> None:
    makes = [
        canonical_llama(quantised=quantised),
        canonical_llama(memory=True, quantised=quantised),
        canonical_llama(length=12, quantised=quantised),
        canonical_llama(memory=True, length=1, quantised=quantised),
    ]
    decoders = [Decoder(Student(m)) for m in makes]
    assert isinstance(decoders[2].session(1), WindowSession)
    texts = [list(d.generate(PROMPT, 8, seed=1)) for d in decoders]
    assert texts[0] == texts[1] == texts[2] == texts[3]
    ids = np.arange(24).reshape(3, 8)
    for decoder in decoders[1:]:
        np.testing.assert_allclose(decoder.logits(ids), decoders[0].logits(ids), atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_zoo_exports_write_the_same_text(family: str, zoo: Path) -> None:
    exports = ["t_dyn", "ts", "h_dyn", "t_kv", "h_gen__decode", "t_static"]
    paths = [zoo / f"{family}__{e}.onnx" for e in exports]
    texts = {
        p.name: list(decoder_of(p).generate(PROMPT, 3, greedy=True)) for p in paths if p.is_file()
    }
    assert len(texts) >= 4
    assert len({tuple(t) for t in texts.values()}) == 1, texts


def test_a_full_window_slides(canonical_llama: Maker) -> None:
    model = canonical_llama(length=6)
    text = list(Decoder(Student(model)).generate(PROMPT, 10, greedy=True))
    again = list(Decoder(Student(model)).generate([*PROMPT, *text[:6]][-6:], 4, greedy=True))
    assert text[6:] == again


def test_sampling_is_seeded_and_stops(canonical_llama: Maker) -> None:
    decoder = Decoder(Student(canonical_llama(memory=True)))
    one, two, other = (list(decoder.generate(PROMPT, 20, seed=s)) for s in (7, 7, 8))
    assert one == two != other
    stop = one[5]
    cut = list(decoder.generate(PROMPT, 20, seed=7, stop_ids=[stop]))
    assert cut == one[: one.index(stop)]
    best = list(decoder.generate(PROMPT, 5, greedy=True))
    assert list(decoder.generate(PROMPT, 5, top_k=1)) == best
    assert list(decoder.generate(PROMPT, 5, temperature=0)) == best


def test_loglikelihood_sums_to_one_over_the_vocabulary(canonical_llama: Maker) -> None:
    decoder = Decoder(Student(canonical_llama()))
    ids = np.array([[1, 2, t] for t in range(32)])
    assert np.exp(decoder.loglikelihood(ids)[:, 1]).sum() == pytest.approx(1, abs=1e-6)


def test_bad_prompts_are_explained(canonical_llama: Maker) -> None:
    decoder = Decoder(Student(canonical_llama(length=6)))
    with pytest.raises(UsageError, match="empty"):
        decoder.generate([])
    with pytest.raises(UsageError, match="token 32 is outside the vocabulary of 32"):
        decoder.generate([1, 32])
    with pytest.raises(UsageError, match="7 tokens do not fit .* window of 6"):
        decoder.generate([1] * 7)
    with pytest.raises(UsageError, match="top-p"):
        decoder.generate([1], top_p=0)
    long = Decoder(Student(canonical_llama()))
    with pytest.raises(UsageError, match="cannot hold 65 tokens"):
        list(long.generate([1] * 64, 2))


def test_models_that_write_no_text_are_refused(zoo: Path) -> None:
    for name, reason in [
        ("vit__t_dyn", "no input of token ids"),
        ("bert__t_dyn", "no output of token scores"),
    ]:
        with pytest.raises(UsageError, match=reason):
            detect(ir.load(zoo / f"{name}.onnx"))


def test_a_prefill_graph_is_read_whole_and_its_memory_left_alone(zoo: Path) -> None:
    prefill = decoder_of(zoo / "llama__h_gen__prefill.onnx")
    assert prefill.drive.memories == ()
    ids = np.array([[3, 4, 5, 6]])
    step = decoder_of(zoo / "llama__h_gen__decode.onnx").logits(ids)
    np.testing.assert_allclose(prefill.logits(ids), step, atol=1e-5)


def test_inputs_beside_the_tokens_are_filled_in(zoo: Path) -> None:
    decoder = decoder_of(zoo / "bert_mlm__t_static.onnx")  # batch 2, 7 positions, mask and types
    free = decoder_of(zoo / "bert_mlm__t_dyn.onnx")
    assert decoder.drive.mask
    assert decoder.drive.types
    ids = np.array([[3, 4, 5, 6]])
    np.testing.assert_allclose(decoder.logits(ids), free.logits(ids), atol=1e-5)


def test_small_calls_run_on_one_thread_and_large_ones_on_all(
    canonical_llama: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    decoder = Decoder(Student(canonical_llama()))
    decoder.student.observe = lambda *_: counts.append(torch.get_num_threads())
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        few = decoder.logits(np.array([PROMPT]))
        assert set(counts) == {1}
        assert torch.get_num_threads() == 2
        counts.clear()
        monkeypatch.setattr(generate, "ONE_THREAD_PRODUCTS", 0)
        many = decoder.logits(np.array([PROMPT]))
        assert set(counts) == {2}
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(few, many, atol=1e-5)


@pytest.mark.parametrize("name", ["llama__h_dyn", "gpt2__h_dyn", "gpt_oss__h_dyn"])
def test_a_batch_padded_on_the_left(name: str, tmp_path: Path) -> None:
    """Every real position is what ONNX Runtime makes of the file; padded queries nobody reads."""
    source = ZOO / f"{name}.onnx"
    if not source.is_file():
        pytest.skip(f"{source.name} is absent")
    path = sources.louder(source, tmp_path / source.name)
    model = pipeline.canonicalise(load(path).model, recipe.load("stream", ()).passes).model
    ids = np.random.default_rng(0).integers(3, 60, (2, 7))
    mask = np.ones((2, 7), np.int64)
    mask[1, :3] = 0
    wanted = sources.answers(sources.session(path), {"input_ids": ids, "attention_mask": mask})
    feeds = sources.translated(model, {"input_ids": ids, "attention_mask": mask})
    with torch.inference_mode():
        got = Student(model).eval()(**{n: torch.from_numpy(a) for n, a in feeds.items()})
    real = mask > 0
    np.testing.assert_allclose(
        got["logits"].numpy()[real], wanted["logits"][real], rtol=1e-4, atol=1e-5
    )
    assert torch.isfinite(got["logits"]).all()
