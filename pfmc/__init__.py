"""pfmc compiles pretrained transformers into hardware whose weights can never change again."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pfmc.compile import compile_model as compile  # noqa: F401

_LAZY = {
    "compile": "pfmc.compile:compile_model",
    "compare": "pfmc.compare:compare",
    "run": "pfmc.simulate:open_machine",
    "verify": "pfmc.verify:verify",
}


def __getattr__(name: str) -> Any:
    """Imports the Python face of a verb when it is first asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module 'pfmc' has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    return getattr(import_module(module), attribute)
