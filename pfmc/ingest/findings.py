"""What lint and the guard find: stable codes in a literal table, and findings that bear them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from pfmc.errors import InputError

Severity = Literal["error", "warning", "note"]
SEVERITIES: Final[tuple[Severity, ...]] = ("error", "warning", "note")

CODES: Final[dict[str, tuple[Severity, str]]] = {
    # the file
    "PFM001": ("error", "The file is no ONNX model, or it is damaged"),
    "PFM002": ("error", "A name is not UTF-8 text"),
    "PFM003": ("error", "The model has no graph or no outputs"),
    "PFM004": ("error", "The file holds training graphs"),
    "PFM005": ("error", "The version of the file format (IR) is not read"),
    "PFM006": ("error", "The standard operator set is not imported exactly once"),
    "PFM007": ("error", "The opset is too old or too new"),
    "PFM008": ("note", "The opset is old; ingest rewrites it to the current one"),
    "PFM009": ("error", "The checkpoint cannot be read as a model"),
    # operators and functions
    "PFM101": ("error", "An operator or its domain is unknown"),
    "PFM102": ("error", "Control flow cannot become fixed hardware"),
    "PFM103": ("error", "An operator draws random numbers"),
    "PFM104": ("error", "An operator does not exist in the opset of the model"),
    "PFM105": ("error", "A function is defined twice"),
    "PFM106": ("error", "Functions call each other in a circle, or too deep"),
    "PFM107": ("error", "With its functions inlined the model has too many nodes"),
    "PFM108": ("error", "A node does not fit the schema of its operator"),
    "PFM109": ("error", "An attribute is given twice, is no text, or refers to no function"),
    "PFM110": ("error", "An operator cannot be rewritten to standard ones"),
    # the graph
    "PFM201": ("error", "A value, input, output or initialiser is defined twice"),
    "PFM202": ("error", "A value is used but defined nowhere"),
    "PFM203": ("error", "A graph output is computed by no node"),
    "PFM204": ("error", "The graph runs in a circle"),
    "PFM205": ("error", "A name is missing or too long"),
    "PFM206": ("error", "A graph input or output is no tensor"),
    "PFM207": ("error", "The graph has sparse initialisers"),
    "PFM208": ("error", "Shapes or types of operands do not fit each other"),
    # tensors and weights
    "PFM301": ("error", "An element type is not supported"),
    "PFM302": ("error", "Dimensions are negative, too many or too large"),
    "PFM303": ("error", "The data of a tensor is not what its type and shape need"),
    "PFM304": ("error", "External data is missing, too short, or lies where it may not"),
    "PFM305": ("error", "A weight is not finite"),
    "PFM306": ("note", "Weights have an unusual element type and are widened"),
    "PFM307": ("note", "One matrix serves several operations"),
    "PFM308": ("note", "Equal matrices are stored more than once"),
    "PFM309": ("note", "An embedding and a fixed linear are tied"),
    # shapes and names of inputs
    "PFM401": ("note", "Inputs have dynamic dimensions"),
    "PFM402": ("warning", "The sequence length is fixed in the file"),
    "PFM403": ("note", "KV memory bears other names than ours and is renamed"),
    "PFM404": ("note", "A dimension is a number written as text"),
    # the canonical form
    "PFM501": ("note", "A pass saw something it knows and left it alone"),
    "PFM502": ("warning", "Operations stay in pieces and are priced as work of the fabric"),
    "PFM503": ("error", "An operation cannot be built in any hardware of ours"),
    "PFM504": ("error", "The digital fabric has no unit for an operator"),
    "PFM505": ("error", "The passes failed on this model"),
    "PFM506": ("warning", "The model holds no fixed linear"),
    "PFM507": ("error", "The trial run that finds every shape failed"),
}
"""Code -> severity and what it says. A code is never given a second meaning."""

MAX_FINDINGS: Final = 1000
"""After so many a file is broken enough; the guard stops looking."""

_OPERATORS = ("PFM101", "PFM102", "PFM103", "PFM104")
_SHOWN = 20


@dataclass(frozen=True)
class Finding:
    """One thing to be said about a model.

    Attributes:
        code: a key of `CODES`.
        what: what is so, one sentence.
        place: where inside the file, in words; empty for the file itself.
        mend: how to mend it; empty if nothing need be done.
        nodes: names of the source nodes concerned (the first output of a nameless one).
        tensors: names of the values or weights concerned.
    """

    code: str
    what: str
    place: str = ""
    mend: str = ""
    nodes: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()

    @property
    def severity(self) -> Severity:
        """``error``, ``warning`` or ``note``."""
        return CODES[self.code][0]

    @property
    def title(self) -> str:
        """What the code says in general."""
        return CODES[self.code][1]

    def where(self, file: str) -> str:
        """`place` with the file's name before it."""
        return f"{file}: {self.place}" if self.place else file


def from_error(
    code: str, error: InputError, file: str, *,
    nodes: tuple[str, ...] = (), tensors: tuple[str, ...] = (),
) -> Finding:  # fmt: skip
    """The finding that `error` (whose ``where`` begins with `file`) is."""
    place = "" if error.where == file else error.where.removeprefix(f"{file}: ")
    return Finding(code, error.what, place, error.mend, nodes, tensors)


def refuse(findings: Sequence[Finding], file: str) -> None:
    """Raises all errors among `findings` as one; does nothing if there is none.

    Raises:
        InputError: a single error word for word; of several, each with its place.
    """
    errors = [f for f in findings if f.severity == "error"]
    operators = [f for f in errors if f.code in _OPERATORS]
    rest = [f for f in errors if f.code not in _OPERATORS]
    causes = ([_operators(operators)] if operators else []) + rest
    if len(causes) == 1:
        raise InputError(causes[0].what, where=causes[0].where(file), mend=causes[0].mend)
    if causes:
        _refuse_all(causes, file)


def _operators(findings: Sequence[Finding]) -> Finding:
    """The findings about unsupported operators as one."""
    lines = [f"{f.what}: {f.place}" for f in findings]
    what = f"{len(lines)} kind(s) of operators cannot be compiled:\n    " + "\n    ".join(lines)
    return Finding(findings[0].code, what, "", findings[0].mend)


def _refuse_all(causes: Sequence[Finding], file: str) -> None:
    lines = [f"{f.what} ({f.place})" if f.place else f.what for f in causes[:_SHOWN]]
    more = [f"and {len(causes) - _SHOWN} more"] if len(causes) > _SHOWN else []
    mends = list(dict.fromkeys(f.mend for f in causes if f.mend))
    raise InputError(
        f"{len(causes)} things are wrong with the model:\n    " + "\n    ".join(lines + more),
        where=file,
        mend=mends[0] if len(mends) == 1 else "`pfmc inspect --lint MODEL` says how to mend each",
    )


def table_text() -> str:
    """``docs/lint.md``: every code, its severity and its meaning."""
    lines = [
        "# Codes of `pfmc inspect --lint`", "",
        "Made from the table in `pfmc/ingest/findings.py`; a test holds both equal. A code keeps",
        "its meaning for good. An error: the model cannot be compiled (exit code 3). A warning:",
        "it costs energy, time or area. A note: good to know.", "",
        "| code | severity | meaning |", "|---|---|---|",
    ]  # fmt: skip
    rows = [f"| {code} | {severity} | {title} |" for code, (severity, title) in CODES.items()]
    return "\n".join([*lines, *rows]) + "\n"
