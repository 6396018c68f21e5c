"""Option types that several verbs share; a number out of range is refused with its bounds."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

Json = Annotated[bool, Parameter(name="--json")]
Quiet = Annotated[bool, Parameter(name=["-q", "--quiet"])]
Positive = Annotated[int, Parameter(validator=Number(gte=1))]
NotNegative = Annotated[int, Parameter(validator=Number(gte=0))]
Level = Annotated[int, Parameter(validator=Number(gte=0, lte=3))]
