"""Finds the shelves: `passes/`, `targets/` and `models/`, in a checkout or in an install."""

from __future__ import annotations

from pathlib import Path

from pfmc.errors import UsageError, did_you_mean

_PACKAGE = Path(__file__).resolve().parent


def shelf(name: str) -> Path:
    """The folder of shelf `name` (``passes``, ``targets`` or ``models``)."""
    beside = _PACKAGE.parent
    if (beside / "pyproject.toml").is_file() and (beside / name).is_dir():
        return beside / name
    return _PACKAGE / "_library" / name


def entries(name: str) -> dict[str, Path]:
    """The TOML files of shelf `name` by their stem, sorted."""
    return {p.stem: p for p in sorted(shelf(name).glob("*.toml"))}


def find(name: str, entry: str) -> Path:
    """The file of `entry` on shelf `name`; `entry` may also be the path of a TOML file.

    Raises:
        UsageError: there is no such entry; the message names the nearest one.
    """
    as_path = Path(entry)
    if as_path.suffix == ".toml":
        if as_path.is_file():
            return as_path
        raise UsageError(f"there is no file {entry!r}", mend=f"give a path, or a name of {name}/")
    known = entries(name)
    if entry in known:
        return known[entry]
    raise UsageError(
        f"{entry!r} is not on the shelf {name}/", mend=did_you_mean(entry, known)
    )
