"""The command line: verbs only. It parses, calls and prints; each verb is imported when asked for.

stdout is data, stderr is progress and messages. Exit codes stand in `pfmc.errors`.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from cyclopts import App, CycloptsError, Parameter

import pfmc
from pfmc.cli.output import clear_line
from pfmc.errors import PfmcError, did_you_mean

VERBS = {
    "compile": "Compile a model to hardware.",
    "distill": "Distil a model for a target's number formats and noise.",
    "adapt": "Put another adapter beside an artifact's fixed layers.",
    "calibrate": "Correct one die by a digital path beside its fixed layers.",
    "compare": "Compare the cost of artifacts, or of one model on several targets.",
    "inspect": "Look into a model, an artifact, a layer or one tile.",
    "run": "Run an artifact's simulated hardware: stream text, or feed it a file.",
    "verify": "Measure an artifact against ONNX Runtime on the untouched input file.",
    "eval": "Measure an artifact on a task, with intervals over documents and over dies.",
    "check": "Hash every file of an artifact.",
    "targets": "List the technologies, or show one with its sources.",
    "passes": "List the recipes and passes, or explain what each pass does to a model.",
    "models": "List the model cards.",
    "reduce": "Shrink a model that fails a check to a minimal one that still fails it.",
    "doctor": "Show versions, devices and what is missing.",
}

EPILOGUE = """Examples:

  pfmc compile model.onnx --target optical -o out.pfm

  pfmc compare model.onnx --targets rom,crossbar,optical

Without a model, `pfmc compile` says how to use the one that is shipped."""


class _Terminated(BaseException):
    """SIGTERM arrived."""


def _app(asked: str) -> App:
    """The app; verb `asked` tells its whole docstring, the others only the line of `VERBS`."""
    app = App(
        name="pfmc",
        help=pfmc.__doc__,
        help_epilogue=EPILOGUE,
        help_format="plaintext",
        version=pfmc.__version__,
        default_parameter=Parameter(negative=()),
        suppress_keyboard_interrupt=False,
        result_action="return_value",
    )
    for verb, help_text in VERBS.items():
        line = None if verb == asked else help_text
        app.command(f"pfmc.cli.{verb}:{verb}_", name=verb, help=line, help_epilogue="")
    return app


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command line and exits with the exit code of `pfmc.errors`."""
    signal.signal(signal.SIGTERM, _terminate)
    _open_streams()
    try:
        code = _run(sys.argv[1:] if arguments is None else arguments)
    except BrokenPipeError:  # `pfmc … | head`: whoever reads has seen enough
        code = 0
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.exit(code)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more can be written
    sys.exit(code)


def _open_streams() -> None:
    """Makes both streams usable: closed ones swallow, and no character is too much for one."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _terminate(_: int, __: FrameType | None) -> None:
    raise _Terminated


def _run(arguments: list[str]) -> int:
    try:
        asked = arguments[0] if arguments else ""
        result = _app(asked)(arguments, exit_on_error=False, print_error=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except PfmcError as error:
        return _say(str(error), error.exit_code)
    except CycloptsError as error:
        return _say(f"{error}\n  mend:  {_help_for(arguments)}", 2)
    except KeyboardInterrupt:
        _forget_the_interrupt()
        return _say("stopped; run the same command again and it resumes", 130)
    except _Terminated:
        return _say("terminated; run the same command again and it resumes", 143)
    except BrokenPipeError:
        raise
    except OSError as error:
        return _say(f"{error.strerror or error}\n  where: {error.filename or '-'}", 74)
    except MemoryError:
        return _say("out of memory\n  mend:  use --recipe stream, or fewer --jobs", 74)
    except Exception as error:  # a bug of ours: no traceback on the screen, but a file that has it
        return _say(_report_bug(error, arguments), 1)


def _forget_the_interrupt() -> None:
    """Lets the process end with our exit code, wherever the interrupt was caught.

    CPython notes an interrupt that leaves `exec` or `eval` of text (dataclasses are made so) as
    unhandled, though it is handled further out, and ``python -m`` then kills itself with SIGINT
    when it ends; the next evaluation of text takes the note back (`run_eval_code_obj` in
    Python/pythonrun.c).
    """
    eval("0")


def _help_for(arguments: list[str]) -> str:
    verb = arguments[0] if arguments else ""
    if verb.startswith("-"):
        return did_you_mean(verb, ("--help", "--version"))
    return f"see pfmc {verb} --help" if verb in VERBS else "see pfmc --help"


def _say(message: str, code: int) -> int:
    print(f"{clear_line()}pfmc: {message}", file=sys.stderr)
    return code


def _report_bug(error: Exception, arguments: list[str]) -> str:
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile(
        "w", prefix="pfmc-crash-", suffix=".txt", delete=False, encoding="utf-8"
    ) as f:
        f.write(f"pfmc {pfmc.__version__}\narguments: {arguments!r}\n\n")
        traceback.print_exception(error, file=f)
    return (
        f"internal error: {type(error).__name__}: {error}\n  where: {f.name}\n"
        "  mend:  this is a bug of pfmc; report it with that file"
    )
