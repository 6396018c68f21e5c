"""Transformers' own forward over a checkpoint: the outside truth where there is no ONNX file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pfmc.errors import InputError

Array = npt.NDArray[Any]


class Reference:
    """A checkpoint run by transformers in float32, with the manners of `pfmc.oracle.Oracle`.

    Weights come from safetensors alone, no code of the checkpoint is run, nothing is downloaded.

    Args:
        folder: the checkpoint.
        observe: module names whose outputs are returned besides the model's own, such as
            ``model.layers.0.self_attn.q_proj`` (what ``pfmc.value`` says for a checkpoint).

    Raises:
        InputError: transformers refuses the checkpoint, or it has no such module.
    """

    def __init__(self, folder: Path, *, observe: Sequence[str] = ()) -> None:
        self.folder, self.observe = Path(folder), tuple(observe)

    def __enter__(self) -> Reference:
        self._model = _model(self.folder)
        modules = dict(self._model.named_modules())
        strange = [name for name in self.observe if name not in modules]
        if strange:
            raise InputError(
                f"transformers' model has no module {strange[0]!r}", where=str(self.folder)
            )
        self._seen: dict[str, Array] = {}
        self._hooks = [modules[n].register_forward_hook(self._hook(n)) for n in self.observe]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        del self._model

    def _hook(self, name: str) -> Any:
        def keep(_module: object, _inputs: object, output: Any) -> None:
            self._seen[name] = output.detach().numpy()

        return keep

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name, and those of the observed modules.

        Args:
            feeds: graph inputs; the KV memory, if given, must be empty.
        """
        import torch

        given = {
            name: torch.from_numpy(np.ascontiguousarray(value))
            for name, value in feeds.items()
            if not name.startswith("past_key_values")
        }
        with torch.inference_mode():
            found = self._model(**given)
        made = {k: v.numpy() for k, v in found.items() if isinstance(v, torch.Tensor)}
        return {**made, **self._seen}


def _model(folder: Path) -> Any:
    """The model of the class that ``config.json`` names, in float32 and for inference."""
    with _offline():
        import torch
        import transformers

        name = json.loads((folder / "config.json").read_bytes())["architectures"][0]
        try:
            model = getattr(transformers, name).from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager", use_safetensors=True,
                local_files_only=True, trust_remote_code=False,
            )  # fmt: skip
        except (AttributeError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            text = str(error).strip().splitlines()
            raise InputError(
                f"transformers refuses the checkpoint: {text[0] if text else error!r}",
                where=str(folder),
            ) from error
    return model.eval()


@contextmanager
def _offline() -> Iterator[None]:
    """Tells the library to ask nobody, and to show no progress."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS")
    before = {n: os.environ.get(n) for n in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
