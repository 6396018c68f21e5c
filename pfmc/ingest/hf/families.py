"""The architectures that can be built from a checkpoint, by the name in ``config.json``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pfmc.errors import InputError, did_you_mean
from pfmc.ingest.hf import decoders
from pfmc.ingest.hf.config import Config
from pfmc.ingest.hf.decoders import Plan
from pfmc.ingest.hf.graph import Graph


@dataclass(frozen=True)
class Architecture:
    """How one architecture is built.

    Attributes:
        model_type: what ``config.json`` must say besides.
        root: what the parameter names of its base model begin with.
        build: writes its graph.
        unused: parts of names of tensors that may stay unread: buffers and other heads.
    """

    model_type: str
    root: str
    build: Callable[[Graph, Config], None]
    unused: tuple[str, ...]


_BUFFERS = ("rotary_emb.inv_freq",)


def _decoder(plan: Callable[[Config], Plan], head: bool) -> Callable[[Graph, Config], None]:
    return lambda g, c: decoders.build(g, c, plan(c), head=head)


def _both(name: str, model_type: str, plan: Callable[[Config], Plan]) -> dict[str, Architecture]:
    """A decoder with its head, and without."""
    unused = (*_BUFFERS, "lm_head.weight")
    return {
        f"{name}ForCausalLM": Architecture(
            model_type, "model.", _decoder(plan, True), (*_BUFFERS,)
        ),
        f"{name}Model": Architecture(model_type, "", _decoder(plan, False), unused),
    }


ARCHITECTURES: dict[str, Architecture] = {
    **_both("Llama", "llama", decoders.llama),
    **_both("Mistral", "mistral", decoders.mistral),
    **_both("Qwen2", "qwen2", decoders.qwen2),
    **_both("Qwen3", "qwen3", decoders.qwen3),
    **_both("Phi3", "phi3", decoders.phi3),
    **_both("Gemma", "gemma", decoders.gemma),
    **_both("Gemma2", "gemma2", decoders.gemma2),
    **_both("Gemma3", "gemma3_text", decoders.gemma3),
}
"""Architecture -> how it is built."""
ARCHITECTURES["Gemma3TextModel"] = ARCHITECTURES.pop("Gemma3Model")


def architecture(config: Config) -> tuple[str, Architecture]:
    """The architecture that `config` names.

    Raises:
        InputError: it is unknown, quantised, or of another model type than its name says.
    """
    named = config.body.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise config.refuse(
            "architectures", "does not name the model's class", "add it, for example "
            '"architectures": ["LlamaForCausalLM"]',
        )  # fmt: skip
    name = named[0]
    if name not in ARCHITECTURES:
        raise InputError(
            f"There is no builder for {name[:100]!r}",
            where=config.where,
            mend=did_you_mean(name, ARCHITECTURES)
            + " Or export the model as ONNX and compile that file",
        )
    found = ARCHITECTURES[name]
    if config.text("model_type") != found.model_type:
        raise config.refuse("model_type", f"does not belong to {name}")
    if config.body.get("quantization_config") is not None:
        raise config.refuse(
            "quantization_config", "means packed weights, which are not read",
            "take the unquantised checkpoint; the compiler quantises by itself",
        )  # fmt: skip
    return name, found
