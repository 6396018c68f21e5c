"""Calibration: sums equal numpy's, data fits every kind of model, one seed gives one result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from pfmc import ingest
from pfmc.distill import calibrate, feeds
from pfmc.errors import FileError, InputError, UsageError
from pfmc.ir import vocabulary
from tests.one_linear import one_linear


@dataclass(frozen=True)
class Plan:
    source: str = "self"
    sequences: int = 4
    length: int = 16


class Stub:
    """A student with one layer."""

    def __init__(self, bias: torch.Tensor) -> None:
        layer = nn.Linear(1, 1)
        layer.bias = nn.Parameter(bias, requires_grad=False)
        self.linears = {"fc": layer}


def linear_model(width: int = 5, rows: int | str = "n") -> ir.Model:
    return one_linear(np.arange(width * 3.0).reshape(width, 3), np.ones(3), rows)


def test_statistics_equal_numpy() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((n, 7, 5)).astype(np.float32) for n in (2, 3)]
    bias = torch.tensor([0.5, -1.0, 2.0])
    gatherer = calibrate.Gatherer(Stub(bias))  # type: ignore[arg-type]
    weight = rng.standard_normal((5, 3)).astype(np.float32)
    for x in parts:
        gatherer("fc", torch.from_numpy(x), torch.from_numpy(x @ weight) + bias)
    found = gatherer.statistics()["fc"]
    rows = np.concatenate(parts).reshape(-1, 5)
    product = rows @ weight
    assert found.samples == 35
    assert found.input_peak == np.abs(rows).max()
    np.testing.assert_allclose(found.input_power, (rows.astype(float) ** 2).mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.output_peak, np.abs(product).max(0), rtol=1e-5)
    np.testing.assert_allclose(found.output_rms, np.sqrt((product**2).mean(0)), rtol=1e-5)


def test_quantiles_are_those_of_the_data_to_a_bin() -> None:
    x = np.random.default_rng(1).standard_t(4, (4000, 5)).astype(np.float32)
    gatherer = calibrate.Gatherer(Stub(torch.zeros(3)))  # type: ignore[arg-type]
    gatherer("fc", torch.from_numpy(x), torch.zeros(4000, 3))
    found = gatherer.statistics()["fc"].input_quantiles
    chances = [p for p in calibrate.PROBABILITIES if p <= 0.9995]
    truth = np.quantile(np.abs(x), chances)
    np.testing.assert_allclose([found[p] for p in chances], truth, rtol=1 / 32)
    assert found[1.0] == np.abs(x).max()
    values = [found[p] for p in sorted(found)]
    assert values == sorted(values)


def test_zero_and_constant_inputs() -> None:
    gatherer = calibrate.Gatherer(Stub(torch.zeros(3)))  # type: ignore[arg-type]
    gatherer("fc", torch.zeros(4, 5), torch.zeros(4, 3))
    assert set(gatherer.statistics()["fc"].input_quantiles.values()) == {0.0}
    gatherer = calibrate.Gatherer(Stub(torch.zeros(3)))  # type: ignore[arg-type]
    gatherer("fc", torch.full((4, 5), -2.0), torch.zeros(4, 3))
    assert set(gatherer.statistics()["fc"].input_quantiles.values()) == {2.0}


def test_infinite_inputs_are_refused() -> None:
    gatherer = calibrate.Gatherer(Stub(torch.zeros(3)))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="NaN or infinity"):
        gatherer("fc", torch.full((1, 5), torch.inf), torch.zeros(1, 3))


def test_a_file_of_inputs(tmp_path: Path) -> None:
    model, path = linear_model(), tmp_path / "data.npz"
    x = np.random.default_rng(2).standard_normal((20, 5)).astype(np.float32)
    np.savez(path, x=x)
    found = calibrate.statistics_of(model, Plan(sequences=17), inputs=path)["fc"]
    assert found.samples == 17
    assert found.input_peak == np.abs(x[:17]).max()
    weight = np.arange(15.0).reshape(5, 3)
    np.testing.assert_allclose(found.output_peak, np.abs(x[:17] @ weight).max(0), rtol=1e-5)
    np.savez(path, z=x)
    with pytest.raises(UsageError, match="no input 'z'"):
        calibrate.statistics_of(model, Plan(), inputs=path)
    path.write_bytes(b"nonsense")
    with pytest.raises(FileError):
        calibrate.statistics_of(model, Plan(), inputs=path)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((3, 5), "f"), "one run of the model takes 4"),
        (np.zeros((0, 5), "f"), "0 samples"),
        (np.float32(1.0), "shape [] for an input [4, 5]"),
        (np.zeros((4, 6), "f"), "shape [4, 6] for an input [4, 5]"),
        (np.zeros((4, 5, 1), "f"), "shape [4, 5, 1]"),
    ],
)
def test_a_file_that_fills_no_batch_is_refused(
    tmp_path: Path, array: np.ndarray, says: str
) -> None:
    np.savez(tmp_path / "data.npz", x=array)
    with pytest.raises(UsageError) as caught:
        list(feeds.batches_of_file(linear_model(rows=4), tmp_path / "data.npz", 100))
    assert says in str(caught.value)


def test_one_run_is_the_least_that_a_file_gives(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros((9, 5), "f"))
    for rows, count, sizes in ((4, 2, [4]), (4, 9, [4, 4]), ("n", 2, [2]), ("n", 9, [8, 1])):
        made = feeds.batches_of_file(linear_model(rows=rows), tmp_path / "data.npz", count)
        assert [len(f["x"]) for f in made] == sizes


def test_tokens_that_there_are_not_are_refused(
    tmp_path: Path, canonical_llama: Callable[..., ir.Model]
) -> None:
    for bad in (32, -1):
        np.savez(tmp_path / "data.npz", input_ids=np.array([[0, 31], [1, bad]]))
        with pytest.raises(UsageError, match="the model knows 32"):
            list(feeds.batches_of_file(canonical_llama(), tmp_path / "data.npz", 4))


def test_no_calibration_asked_for() -> None:
    assert calibrate.statistics_of(linear_model(), Plan(source="none")) == {}


def test_text_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="tokenizer"):
        calibrate.statistics_of(linear_model(), Plan(), text=tmp_path / "a.txt")


@pytest.mark.parametrize(
    "name", ["bert__t_dyn", "vit__t_dyn", "llama__t_kv", "gpt2__h_gen__decode", "bart__t_static"]
)
def test_made_up_data_fits_every_kind_of_model(zoo: Path, name: str) -> None:
    model = ingest.load(zoo / f"{name}.onnx").model
    for batch in calibrate.probe_batches(model, None, count=3, length=12):
        assert set(batch) == {v.name for v in model.graph.inputs}
    again = [calibrate.probe_batches(model, None, count=3, length=12, seed=1) for _ in range(2)]
    for one, other in zip(*again, strict=True):
        for key, array in one.items():
            np.testing.assert_array_equal(array, other[key])


def test_encoders_see_padding(zoo: Path) -> None:
    model = ingest.load(zoo / "bert__t_dyn.onnx").model
    batch = next(feeds.batches(model, 4, 16, seed=0))
    mask = next(a for n, a in batch.items() if "mask" in n)
    assert mask.sum(axis=1).tolist() == [16, 16, 16, 12]


def test_causal_models_are_told_from_others(zoo: Path) -> None:
    from pfmc.distill.generate import Decoder
    from pfmc.distill.student import Student

    found = {}
    for name in ("llama__t_dyn", "gpt2__t_kv", "bert_mlm__t_dyn"):
        model = ingest.load(zoo / f"{name}.onnx").model
        found[name] = calibrate.is_causal(Decoder(Student(model).eval()))
    assert found == {"llama__t_dyn": True, "gpt2__t_kv": True, "bert_mlm__t_dyn": False}


def test_a_language_model_calibrates_on_its_own_text(stories: Path) -> None:
    from pfmc.passes import pipeline, recipe

    base = ingest.load(stories / "model.onnx").model
    model = pipeline.canonicalise(base, recipe.load("rom").passes).model
    tokenizer, told = stories / "tokenizer.json", list[str]()
    one = calibrate.statistics_of(model, Plan(), tokenizer=tokenizer, progress=told.append)
    two = calibrate.statistics_of(model, Plan(), tokenizer=tokenizer)
    assert "writes itself" in told[0]
    assert list(one) == [n.name for n in vocabulary.fixed_linears(model)]
    assert all(s.samples == 4 * 16 for s in one.values())
    for name, statistics in one.items():
        np.testing.assert_array_equal(statistics.input_power, two[name].input_power)
        assert statistics.input_quantiles == two[name].input_quantiles
    text = stories / "README.md"
    real = calibrate.statistics_of(model, Plan(sequences=2), tokenizer=tokenizer, text=text)
    assert all(s.samples == 32 for s in real.values())


# -- how long, and which positions count -----------------------------------------------------------


@pytest.fixture
def words(tmp_path: Path) -> tuple[Path, Path]:
    """A text of few words and a tokenizer that knows them."""
    text, known = "to be or not to be that is the question " * 60, tmp_path / "tokenizer.json"
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(sorted(set(text.split())))}))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.save(str(known))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    return tmp_path / "text.txt", known


def test_padding_of_a_fixed_window_is_not_counted(canonical_llama: Callable[..., ir.Model]) -> None:
    free, fixed = (canonical_llama(length=n) for n in ("seq", 12))
    plan = Plan(length=5)
    truth, found = (calibrate.statistics_of(m, plan, seed=3) for m in (free, fixed))
    for name, one in truth.items():
        assert found[name].samples == one.samples == 4 * 5
        np.testing.assert_allclose(found[name].input_power, one.input_power, rtol=1e-4)
        assert found[name].input_peak == pytest.approx(one.input_peak, rel=1e-4)


@pytest.mark.parametrize("shape", [(2, 3, 4), (6, 4)])
def test_padding_does_not_count_in_either_layout(shape: tuple[int, ...]) -> None:
    real = torch.tensor([[True, True, False], [True, False, False]])
    x = torch.arange(24.0).reshape(shape)
    np.testing.assert_array_equal(calibrate.real_part(x, real)[:, 0], [0, 4, 12])
    np.testing.assert_array_equal(calibrate.real_part(x, None), x)


def test_windows_of_text_are_as_long_as_the_tables_hold(
    canonical_llama: Callable[..., ir.Model], words: tuple[Path, Path]
) -> None:
    text, tokenizer = words
    made = calibrate.feeds_of(
        canonical_llama(), Plan(sequences=2, length=128), text=text, tokenizer=tokenizer
    )
    assert [f["input_ids"].shape for f in made] == [(2, 64)]


def test_probes_of_an_encoder_are_as_long_as_its_tables_hold(
    zoo: Path, words: tuple[Path, Path]
) -> None:
    from pfmc.distill.text import load_tokenizer

    model, (text, path) = ingest.load(zoo / "bert__t_dyn.onnx").model, words
    for more in ({}, {"text": text}):
        made = calibrate.probe_batches(model, load_tokenizer(path), count=2, length=128, **more)
        assert made[0]["input_ids"].shape == (2, 64)


def test_a_graph_of_one_token_a_call_has_no_sequences(zoo: Path) -> None:
    model = ingest.load(zoo / "gpt2__t_kv.onnx").model
    with pytest.raises(UsageError, match="one token a call"):
        calibrate.feeds_of(model, Plan())
