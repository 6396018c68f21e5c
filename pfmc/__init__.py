"""pfmc compiles pretrained transformers into hardware whose weights can never change again."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
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


class _Verb(ModuleType):
    """A module that can be called as the verb it is named after: ``pfmc.compile(...)``."""

    def __call__(self, *args: Any, **choices: Any) -> Any:
        return __getattr__(self.__name__.rpartition(".")[2])(*args, **choices)


class _House(ModuleType):
    """This package: importing a verb's module puts the module where its function is looked for."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _LAZY and isinstance(value, ModuleType):
            value.__class__ = _Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _House
