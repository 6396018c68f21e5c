"""What failed, where, and how to mend it: every error a user can meet, with its exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class PfmcError(Exception):
    """Base of all errors that carry a clear message to the user.

    Args:
        what: what is wrong, one sentence.
        where: the file, node, tensor or scope concerned; empty if there is none.
        mend: how to mend it; empty if nothing can be advised.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", mend: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.mend = what, where, mend

    def __str__(self) -> str:
        parts = [self.what]
        if self.where:
            parts.append(f"  where: {self.where}")
        if self.mend:
            parts.append(f"  mend:  {self.mend}")
        return "\n".join(parts)


class InternalError(PfmcError):
    """A bug of ours; the message names the reproducer."""

    exit_code = 1


class UsageError(PfmcError):
    """A wrong command, option, recipe key or technology key."""

    exit_code = 2


class InputError(PfmcError):
    """The model, checkpoint or input data was rejected."""

    exit_code = 3


class VerificationError(PfmcError):
    """A verification or a threshold failed."""

    exit_code = 4


class InfeasibleError(PfmcError):
    """The target cannot hold the model; `mend` names the smallest feasible change."""

    exit_code = 5


class CorruptError(PfmcError):
    """An artifact was damaged or tampered with."""

    exit_code = 6


class FileError(PfmcError):
    """Reading or writing failed: disk full, read-only, permission."""

    exit_code = 74


class LockedError(PfmcError):
    """Another run holds the artifact."""

    exit_code = 75


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns ``"did you mean 'x'?"`` for the nearest known word, else the known words."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return "known: " + ", ".join(names) if names else "none is known"
