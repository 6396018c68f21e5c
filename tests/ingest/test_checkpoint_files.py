"""Hostile and broken checkpoints: each is refused with one clear message, none crashes or hangs."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pfmc.errors import FileError, InputError, UsageError
from pfmc.ingest import load
from pfmc.ingest.files import open_mapped
from pfmc.ingest.hf.families import ARCHITECTURES
from pfmc.ingest.hf.stored import read_header

Write = Callable[..., Path]

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8,
    "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 32,
}  # fmt: skip


def tensors() -> dict[str, np.ndarray]:
    """The parameters of `CONFIG`."""
    rng, at = np.random.default_rng(0), "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": (16, 8), "lm_head.weight": (16, 8), "model.norm.weight": (8,),
        f"{at}.input_layernorm.weight": (8,), f"{at}.post_attention_layernorm.weight": (8,),
        f"{at}.mlp.gate_proj.weight": (12, 8), f"{at}.mlp.up_proj.weight": (12, 8),
        f"{at}.mlp.down_proj.weight": (8, 12),
    } | {f"{at}.self_attn.{n}_proj.weight": (8, 8) for n in "qkvo"}  # fmt: skip
    return {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


def packed(held: dict[str, np.ndarray]) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and its data."""
    header, data = {}, b""
    for name, array in held.items():
        place = len(data)
        data += array.tobytes()
        header[name] = {
            "dtype": "F32", "shape": list(array.shape), "data_offsets": [place, len(data)],
        }  # fmt: skip
    return header, data


def file_of(header: Any, data: bytes) -> bytes:
    """A safetensors file."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a checkpoint: a sound one, but for what is given."""

    def make(
        config: Any = CONFIG, held: dict[str, np.ndarray] | None = None, file: bytes | None = None
    ) -> Path:
        text = config if isinstance(config, bytes) else json.dumps(config).encode()
        (tmp_path / "config.json").write_bytes(text)
        weights = file if file is not None else file_of(*packed(held or tensors()))
        (tmp_path / "model.safetensors").write_bytes(weights)
        return tmp_path

    return make


def refused(folder: Path, *words: str, **options: Any) -> InputError:
    """The error of reading `folder`, which holds `words`."""
    with pytest.raises(InputError) as caught:
        load(folder, **options)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    return caught.value


def test_the_sound_one_is_read_by_folder_and_by_config(write: Write) -> None:
    folder = write()
    assert load(folder).exporter == load(folder / "config.json").exporter
    assert load(folder).name == folder.name
    assert [f.path.name for f in load(folder).files] == ["config.json", "model.safetensors"]


# -- the header ----------------------------------------------------------------------------------


def _changed(name: str, **fields: Any) -> bytes:
    header, data = packed(tensors())
    header[name] = header[name] | fields
    return file_of(header, data)


Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"


@pytest.mark.parametrize(("file", "word"), [
    (b"", "no safetensors"),
    (b"\x00" * 9, "no safetensors"),
    (struct.pack("<Q", 1 << 62) + b"{}" * 8, "claims"),
    (struct.pack("<Q", 100_000_001) + b"{}" * 8, "claims"),
    (struct.pack("<Q", 17) + b"{}" * 8, "claims"),
    (struct.pack("<Q", 1) + b"{}" * 8, "claims"),
    (file_of(b"not json at all", b""), "Not the JSON"),
    (file_of(b"\xff\xfe{}", b""), "UTF-8"),
    (file_of([], b""), "no object"),
    (file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""), "nested too deeply"),
    (file_of(b'{"a": 1, "a": 2}', b""), "stands twice"),
    (file_of(b'{"a": NaN}', b""), "no number"),
    (file_of({"__metadata__": {"a": 1}}, b""), "__metadata__"),
    (file_of({"__metadata__": [1]}, b""), "__metadata__"),
    (file_of({"a": 1}, b""), "just dtype"),
    (_changed(Q, extra=1), "just dtype"),
    (_changed(Q, dtype="F31"), "unknown"),
    (_changed(Q, dtype=["F32"]), "unknown"),
    (_changed(Q, shape="8,8"), "whole numbers"),
    (_changed(Q, shape=[-8, -8]), "whole numbers"),
    (_changed(Q, shape=[8.0, 8]), "whole numbers"),
    (_changed(Q, shape=[True, 64]), "whole numbers"),
    (_changed(Q, shape=[8, 9]), "bytes are given"),
    (_changed(Q, shape=[1 << 62, 1 << 62]), "too many"),
    (_changed(Q, shape=[1 << 32, 1 << 32, 0]), "elements, too many"),
    (_changed(Q, shape=[1] * 17), "dimensions"),
    (_changed(Q, data_offsets=[0]), "begin and end"),
    (_changed(Q, data_offsets=[256, 0]), "begin and end"),
    (_changed(Q, data_offsets=[0, 1 << 64]), "whole numbers"),
    (_changed(Q, data_offsets=[1 << 40, (1 << 40) + 256]), "gap"),
    (_changed(Q, data_offsets=[0, 256]), "overlaps"),
    (file_of(*packed(tensors()))[:-4], "the file at"),
    (file_of(*packed(tensors())) + b"\0", "the file at"),
])  # fmt: skip
def test_a_hostile_header_is_refused(file: bytes, word: str, write: Write) -> None:
    refused(write(file=file), "model.safetensors", word)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_changed_byte_of_a_header_does_harm(data: Any, tmp_path: Path) -> None:
    sound = file_of(*packed({"a": np.ones((2, 3), np.float32), "b": np.ones(2, np.float32)}))
    broken = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(sound) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "x.safetensors"
    path.write_bytes(broken)
    try:
        found = read_header(open_mapped(path, follow=False))
    except InputError:
        return
    assert sum(t.size for t in found.values()) <= len(sound)


# -- what does not fit ---------------------------------------------------------------------------


def test_every_tensor_at_fault_is_named_at_once(write: Write) -> None:
    held = tensors()
    del held[Q]
    held[NORM] = np.ones(9, np.float32)
    held["model.layers.1.stranger"] = np.ones(3, np.float32)
    error = refused(write(held=held), Q, "missing", "[9], not [8]", "model.layers.1.stranger")
    assert "one and the same model" in error.mend


def test_weights_of_other_types_are_refused(write: Write) -> None:
    header, data = packed(tensors())
    header[NORM]["dtype"] = "I32"
    refused(write(file=file_of(header, data)), NORM, "I32", "BF16")


def test_nan_is_refused_with_its_place(write: Write) -> None:
    held = tensors()
    held[Q][3, 5] = np.nan
    refused(write(held=held), "nan", "q_proj", "[5, 3]")


def test_an_unused_buffer_may_stay(write: Write) -> None:
    held = tensors() | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
    }
    assert len(load(write(held=held)).model.graph) > 10


# -- the configuration ---------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "word"), [
    ({"architectures": None}, "does not name"),
    ({"architectures": ["LlamaForCasualLM"]}, "did you mean 'LlamaForCausalLM'?"),
    ({"architectures": ["Mamba2ForCausalLM"]}, "no builder"),
    ({"model_type": "bert"}, "does not belong"),
    ({"quantization_config": {"quant_method": "gptq"}}, "packed weights"),
    ({"hidden_size": "8"}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"hidden_size": 8.0}, "hidden_size"),
    ({"hidden_size": -8}, "hidden_size"),
    ({"hidden_size": 1 << 40}, "hidden_size"),
    ({"hidden_size": None}, "no 'hidden_size'"),
    ({"num_hidden_layers": 4097}, "4097 layers"),
    ({"num_hidden_layers": 4000}, "4000 layers"),
    ({"num_attention_heads": 3}, "q_proj"),
    ({"num_key_value_heads": 3}, "does not divide"),
    ({"head_dim": 3}, "odd width"),
    ({"hidden_act": "gelu_knew"}, "did you mean 'gelu_new'?"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ({"tie_word_embeddings": "yes"}, "neither true nor false"),
    ({"rope_parameters": []}, "no object"),
    ({"rope_parameters": {"rope_type": "spiral", "factor": 2}}, "not supported"),
    ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
    ({"rope_theta": 0.5}, "rope_theta"),
    ({"partial_rotary_factor": 2.0}, "rotates"),
    ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "short_factor"),
])  # fmt: skip
def test_a_hostile_configuration_is_refused(
    change: dict[str, Any], word: str, write: Write
) -> None:
    refused(write(config=CONFIG | change), "config.json", word)


@pytest.mark.parametrize(("text", "word"), [
    (b"", "Not the JSON"), (b"[]", "no object"), (b"{" * 10_000, "Not the JSON"),
    (b'{"a":' * 100_000, "nested too deeply"), (b'{"hidden_size": 1e999}', "does not name"),
    (b'{"a": 1, "a": 1}', "twice"), (b" " * (5 << 20), "too many"),
])  # fmt: skip
def test_a_configuration_that_is_no_json_is_refused(text: bytes, word: str, write: Write) -> None:
    refused(write(config=text), "config.json", word)


_JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-4, 1 << 40) | st.floats(allow_nan=False)
    | st.text(max_size=8) | st.sampled_from(["yarn", "llama3", "longrope", "linear", "default"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([
        "rope_type", "factor", "rope_theta", "original_max_position_embeddings", "beta_fast",
        "beta_slow", "short_factor", "long_factor", "low_freq_factor", "high_freq_factor",
        "full_attention", "sliding_attention", "attention_factor", "mscale", "mscale_all_dim",
    ]), inner, max_size=5),
    max_leaves=8,
)  # fmt: skip
_KEYS = st.sampled_from([
    *CONFIG, "rope_parameters", "rope_scaling", "head_dim", "num_key_value_heads", "layer_types",
    "sliding_window", "partial_rotary_factor", "attention_bias", "hidden_activation",
    "query_pre_attn_scalar", "id2label", "image_size", "patch_size", "n_embd", "n_head", "n_layer",
    "ffn_dim", "word_embed_proj_dim", "dim", "n_layers", "n_heads", "hidden_dim", "norm_bias",
])  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(sorted(ARCHITECTURES)), junk=st.dictionaries(_KEYS, _JUNK, max_size=5))
def test_no_configuration_does_harm(name: str, junk: dict[str, Any], tmp_path: Path) -> None:
    kind = ARCHITECTURES[name].model_type
    known = {"n_embd": 8, "n_head": 2, "n_layer": 1, "ffn_dim": 12, "dim": 8, "hidden_dim": 12}
    config = {**CONFIG, **known, **junk, "architectures": [name], "model_type": kind}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(file_of(*packed(tensors())))
    with contextlib.suppress(InputError):
        load(tmp_path)


# -- files ---------------------------------------------------------------------------------------


def test_pickles_are_refused_with_the_mend(write: Write) -> None:
    folder = write()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    error = refused(folder, "pickles", "any code")
    assert "save_pretrained" in error.mend


def test_no_weights_at_all(write: Write) -> None:
    folder = write()
    (folder / "model.safetensors").unlink()
    refused(folder, "no weights")


def test_a_folder_of_nothing_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="folder"):
        load(tmp_path)


def _sharded(folder: Path, weight_map: dict[str, Any], **files: dict[str, np.ndarray]) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name, held in files.items():
        (folder / f"{name}.safetensors").write_bytes(file_of(*packed(held)))
    return folder


def _halves() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, str]]:
    held = tensors()
    first = {k: held[k] for k in list(held)[:5]}
    second = {k: v for k, v in held.items() if k not in first}
    places = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")
    return first, second, places


def test_shards_must_agree_with_their_index(tmp_path: Path) -> None:
    first, second, places = _halves()
    assert load(_sharded(tmp_path, places, a=first, b=second)).model
    refused(_sharded(tmp_path, places | {NORM: "b.safetensors"}, a=first, b=second), NORM)
    refused(_sharded(tmp_path, places | {"x": "a.safetensors"}, a=first, b=second), "no shard has")
    refused(_sharded(tmp_path, places, a=first, b=second | first), "two shards")
    refused(_sharded(tmp_path, {"x": 1}, a=first), "weight_map")
    (tmp_path / "b.safetensors").unlink()
    refused(_sharded(tmp_path, places, a=first), "missing")


@pytest.mark.parametrize("place", ["../b.safetensors", "/etc/passwd", "a\0b", "", "C:x", "a\\b"])
def test_an_index_cannot_leave_the_folder(place: str, tmp_path: Path) -> None:
    first, _, places = _halves()
    refused(_sharded(tmp_path, places | {NORM: place}, a=first))


def test_the_hugging_face_cache_needs_a_trust_root(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "c").write_text(json.dumps(CONFIG))
    (blobs / "w").write_bytes(file_of(*packed(tensors())))
    (snapshot / "config.json").symlink_to("../../blobs/c")
    (snapshot / "model.safetensors").symlink_to("../../blobs/w")
    error = refused(snapshot, "link out of the model's folder")
    assert f"--trust-root {tmp_path}" in error.mend
    assert load(snapshot, trust_root=tmp_path).name == "0123"


def test_a_hard_link_is_refused(write: Write) -> None:
    folder = write()
    os.link(folder / "model.safetensors", folder / "again")
    refused(folder, "hard link")


def test_a_pipe_is_refused(write: Write) -> None:
    folder = write()
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises((InputError, FileError)):
        load(folder)
