"""How verbs print: data to stdout, progress to stderr on a terminal, JSON on request."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping


def print_json(body: Mapping[str, object] | list[object]) -> None:
    """One JSON document on stdout, nothing else."""
    json.dump(body, sys.stdout, indent=1, sort_keys=True)
    sys.stdout.write("\n")


class Progress:
    """One line of progress on stderr: live on a terminal, one line a phase elsewhere.

    Args:
        quiet: nothing at all, as ``--quiet`` or ``--json`` wants it.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._live = sys.stderr.isatty() and not quiet
        self._quiet = quiet
        self._start = time.monotonic()

    def __call__(self, message: str) -> None:
        """Shows what is being done now."""
        if self._quiet:
            return
        if self._live:
            elapsed = time.monotonic() - self._start
            sys.stderr.write(f"\r\x1b[K{elapsed:6.1f} s  {message}"[:118])
        sys.stderr.flush()

    def done(self) -> None:
        """Clears the line."""
        if self._live:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
