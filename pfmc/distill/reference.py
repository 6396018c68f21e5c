"""Transformers' own forward over a checkpoint: the outside truth where there is no ONNX file.

It runs in a limited subprocess (`pfmc.child`), as ONNX Runtime does. Importing transformers takes
seconds, so the subprocess stays and serves one checkpoint after the other.
"""

from __future__ import annotations

import atexit
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pfmc import child
from pfmc.child import MEMORY_BYTES, Child
from pfmc.errors import InputError

Array = npt.NDArray[Any]

_OFFLINE = {
    name: "1" for name in
    ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS")
}  # fmt: skip
_COPIES = 4  # bytes of memory for a stored byte: half precision is widened, and briefly held twice
_STEP = 1 << 30  # checkpoints of nearly one size share a subprocess
_KEPT: list[Child] = []


class Reference:
    """A checkpoint run by transformers in float32, with the manners of `pfmc.oracle.Oracle`.

    Weights come from safetensors alone, no code of the checkpoint is run, nothing is downloaded.
    One is open at a time.

    Args:
        folder: the checkpoint.
        observe: module names whose outputs are returned besides the model's own, such as
            ``model.layers.0.self_attn.q_proj`` (what ``pfmc.value`` says for a checkpoint).
        threads: torch's.

    Raises:
        InputError: transformers refuses the checkpoint, or it has no such module.
    """

    def __init__(self, folder: Path, *, observe: Sequence[str] = (), threads: int = 1) -> None:
        self.folder, self.observe, self.threads = Path(folder), tuple(observe), threads

    def __enter__(self) -> Reference:
        stored = sum(p.stat().st_size for p in self.folder.glob("*.safetensors"))
        self._child = _kept(MEMORY_BYTES + -(-_COPIES * stored // _STEP) * _STEP)
        question = {
            "open": str(self.folder.resolve()),
            "observe": self.observe,
            "threads": self.threads,
        }
        self._ask(question)
        return self

    def __exit__(self, *_: object) -> None:
        if self._child.alive:
            self._ask({"close": True})

    def _ask(self, question: Mapping[str, object]) -> None:
        try:
            self._child.ask(question, str(self.folder))
        except InputError as error:
            if "ended while" in error.what:
                _end()
            raise

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name, and those of the observed modules.

        Args:
            feeds: graph inputs; the KV memory, if given, must be empty.
        """
        given = {n: a for n, a in feeds.items() if not n.startswith("past_key_values")}
        return self._child.run(given, str(self.folder))


def _kept(memory: int) -> Child:
    """The subprocess that runs already, if it lives and may take `memory` bytes; else a new one."""
    if _KEPT and not (_KEPT[0].alive and _KEPT[0].memory >= memory):
        _end()
    if not _KEPT:
        _KEPT.append(
            Child("pfmc.distill.reference", "transformers", memory=memory, environment=_OFFLINE)
        )
        atexit.register(_end)
    return _KEPT[0]


def _end() -> None:
    while _KEPT:
        _KEPT.pop().close()


# -- the child -----------------------------------------------------------------------------------


class _Held:
    """What the child holds: a model, and what its observed modules gave last."""

    def __init__(self) -> None:
        self.model: Any = None
        self.seen: dict[str, Array] = {}

    def __call__(self, question: dict[str, Any]) -> dict[str, Any]:
        if "open" in question:
            return self._open(Path(question["open"]), question["observe"], question["threads"])
        if "close" in question:
            self.model, self.seen = None, {}
            return {}
        return child.exchange(question, self._run)

    def _open(self, folder: Path, observe: Sequence[str], threads: int) -> dict[str, Any]:
        import torch

        torch.set_num_threads(threads)
        self.model, self.seen = _model(folder), {}
        modules = dict(self.model.named_modules())
        strange = [name for name in observe if name not in modules]
        if strange:
            raise ValueError(f"the model has no module {strange[0]!r}")
        for name in observe:
            modules[name].register_forward_hook(self._hook(name))
        return {}

    def _hook(self, name: str) -> Any:
        def keep(_module: object, _inputs: object, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output  # a router's logits
            self.seen[name] = first.detach().numpy()

        return keep

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        given = {n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in feeds.items()}
        with torch.inference_mode():
            found = self.model(**given)
        made = {k: v.numpy() for k, v in found.items() if isinstance(v, torch.Tensor)}
        return {**made, **self.seen}


def _model(folder: Path) -> Any:
    """The model of the class that ``config.json`` names, in float32 and for inference."""
    import torch
    import transformers

    name = json.loads((folder / "config.json").read_bytes())["architectures"][0]
    found = getattr(transformers, name).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", use_safetensors=True,
        local_files_only=True, trust_remote_code=False,
    )  # fmt: skip
    return found.eval()


if __name__ == "__main__":
    child.serve(_Held())
