"""The process of one command: how it starts, and how it ends, with an exit code and in words."""

import gc
import logging
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Any, NoReturn

import typer

from forgetless.cli.app import app
from forgetless.core.errors import OtherProcessError
from forgetless.core.progress import LOUDNESS
from forgetless.studies.out_of_memory import out_of_memory
from forgetless.training.launch import process_index

_OF_ALL = ("--debug", "--quiet", "--verbose")
"""Options of every verb, at any place of the line."""

STOPPED = 130
"""The exit code after Ctrl-C."""

_TAKES_LESS = (
    "a smaller --batch-size takes less, for 'stats' a --memory-budget too; 'forgetless plan' says "
    "beforehand what a run takes"
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process with its exit code."""
    gc.set_threshold(50_000, 10, 10)  # with the usual one a seventh of all imports is collections
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = [word for word in given if word not in _OF_ALL]
    loud = [word.removeprefix("--") for word in given if word in ("--quiet", "--verbose")]
    if loud:
        os.environ[LOUDNESS] = loud[-1]
        if loud[-1] == "verbose":
            logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    warnings.showwarning = _show_warning
    if isinstance(sys.stdout, TextIOWrapper):  # what a terminal cannot show does not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: clusters send it
    try:
        code = app(words, standalone_mode=False, obj=_as_typed(words)) or 0
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED
    except Exception as error:
        if "--debug" in given:
            raise
        sys.exit(_say(*_explain(error)))
    finally:
        _clear_screen()
    if code == STOPPED and process_index() == 0:
        _say(f"stopped; to go on: {_as_typed(given)}", code)
    sys.exit(code)


def _as_typed(words: Sequence[str]) -> str:
    """The command line, to be copied."""
    if "WORLD_SIZE" in os.environ:
        return "start the same launch again"
    program = "python -m forgetless" if sys.argv[0].endswith("__main__.py") else "forgetless"
    return f"{program} {shlex.join(words)}"


def _clear_screen() -> None:
    """Take away the bar of work that was stopped or failed."""
    if "forgetless.core.progress" in sys.modules:
        from forgetless.core.progress import clear

        clear()


def _explain(error: Exception) -> tuple[str, int]:
    """One line, or a gathered list, and the exit code: 2 where the user can mend it."""
    usage = getattr(error, "format_message", None)
    if usage is not None:
        return f"error: {usage().rstrip('.')} (see '{_help(error)}')", 2
    if isinstance(error, MemoryError | RuntimeError) and (reason := out_of_memory(error)):
        return f"error: no memory left ({reason}): {_TAKES_LESS}", 2
    if isinstance(error, KeyError) or not isinstance(error, ValueError | OSError):
        return f"error: {type(error).__name__}: {error} (--debug shows where)", 1
    if isinstance(error, OtherProcessError) and process_index() > 0:
        return "", 1  # that process says it
    if isinstance(error, OSError) and error.strerror:
        return f"error: {error.strerror}: {error.filename2 or error.filename or 'no file'}", 2
    # A gathered list of one is one line.
    return f"error: {error}".replace(": 1 problem\n  - ", ": "), 2


def _help(usage: Any) -> str:
    """What shows the options of the verb that was misused, or all verbs."""
    verb = usage.ctx.info_name if usage.ctx is not None and usage.ctx.parent is not None else ""
    return " ".join(filter(None, ("forgetless", verb, "--help")))


def _say(message: str, code: int) -> int:
    who = f"process {process_index()}: " if process_index() > 0 else ""
    if message:
        print(f"{who}{message}", file=sys.stderr)
    return code


_warned: set[str] = set()


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Each warning to users as one line, once; those to developers are not for them."""
    if issubclass(category, UserWarning) and str(message) not in _warned:
        _warned.add(str(message))
        print(f"warning: {message}", file=sys.stderr)
