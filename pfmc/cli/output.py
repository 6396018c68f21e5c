"""How verbs print: data to stdout, progress to stderr on a terminal, JSON on request."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path


def print_json(body: Mapping[str, object] | list[object]) -> None:
    """One JSON document on stdout, nothing else; numbers that JSON cannot say become null."""
    json.dump(_sayable(body), sys.stdout, indent=1, sort_keys=True, allow_nan=False)
    sys.stdout.write("\n")


def _sayable(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _sayable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_sayable(v) for v in value]
    return value


def clear_line() -> str:
    """What wipes a half-written line of progress off the terminal; nothing elsewhere."""
    live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return "\r\x1b[K" if live else ""


class Progress:
    """One line of progress on stderr, rewritten in place; nothing without a terminal.

    Args:
        quiet: nothing at all, as ``--quiet`` or ``--json`` wants it.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._clear = "" if quiet else clear_line()
        self._start = time.monotonic()

    def __call__(self, message: str) -> None:
        """Shows what is being done now."""
        if self._clear:
            elapsed = time.monotonic() - self._start
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(self._clear + f"{elapsed:6.1f} s  {message}"[:width])
            sys.stderr.flush()

    def done(self) -> None:
        """Clears the line."""
        sys.stderr.write(self._clear)
        sys.stderr.flush()


def warn_of_die(path: Path, dies: Iterable[int | None], age_s: float, quiet: bool) -> None:
    """One line on stderr if the artifact was calibrated for another die or age than these."""
    from pfmc.artifact import read_manifest
    from pfmc.calibration.notice import warning

    found = None if quiet else warning(read_manifest(path)["config"], dies, age_s)
    if found is not None:
        print(f"pfmc: {found}", file=sys.stderr)
