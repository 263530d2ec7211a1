"""The process of a program: runs it, then calls in it what the test asks for.

Nothing here is trusted once the program runs, as it shares the interpreter with it. What it sends
is plain data, which the process of the test compares (`verdict`).
"""

from __future__ import annotations

import builtins
import operator
import os
import sys
import traceback
import types
from typing import Any

from forgetless.tasks.sandbox.plain import Handle, decode, encode, receive, send

READY = b"g"
"""What it reports before the program begins."""

LOOK_UP = 0
"""The handle of a function from names to those of the program's variables that there are."""


def run_program(text: str, report: int, answers: int, asked: int) -> None:
    """Run a program as `__main__`, then do what is asked for until nobody asks any more.

    Args:
        text: its source.
        report: a pipe to the supervisor: that the program begins; why it ended.
        answers: a pipe for what came of a call: whether it returned, the value or the error, and
            the arguments if the call changed them.
        asked: a pipe with calls: a handle or the name of an operation, arguments, named arguments.
    """
    sys.argv = ["program.py"]
    for name in [n for n in sys.modules if n.startswith(("forgetless", "ctypes", "_ctypes"))]:
        del sys.modules[name]
    sys.modules["__main__"] = module = types.ModuleType("__main__")
    variables = vars(module)
    kept: list[Any] = [lambda names: {n: variables[n] for n in names if n in variables}]
    numbers: dict[int, int] = {}

    def handle(value: Any) -> Handle:
        if id(value) not in numbers:
            numbers[id(value)] = len(kept)
            kept.append(value)
        return numbers[id(value)], bool(value)

    def called(function: int | str, given: list[Any], named: dict[str, Any]) -> bytes:
        before = encode(given, handle)
        known = builtins if hasattr(builtins, str(function)) else operator
        try:
            call = getattr(known, function) if isinstance(function, str) else kept[function]
            value = call(*given, **named)
            changed = given if encode(given, handle) != before else None
            return encode((True, value, changed), handle)
        except Exception as error:
            # The nearest class that the other side has too.
            kinds = (k.__name__ for k in type(error).__mro__ if vars(builtins).get(k.__name__) is k)
            raised = (next(kinds), type(error).__name__, str(error)[:1000])
            return encode((False, raised, None), handle)

    try:
        os.write(report, READY)
        # Without the flags of this file, whose annotations are not evaluated.
        exec(compile(text, "<string>", "exec", dont_inherit=True), variables)
        while (message := receive(asked)) is not None:
            send(answers, called(*decode(message, lambda known: kept[known[0]])))
    except SystemExit as left:
        os._exit(left.code if type(left.code) is int else left.code is not None)
    except BaseException as error:
        os.write(report, b"!" + last_line(error))
    os._exit(1)


def last_line(error: BaseException) -> bytes:
    """The line that names an error; at most 300 bytes, which a pipe takes in one piece."""
    line = traceback.format_exception_only(type(error), error)[-1]
    return line.strip().encode("utf-8", "replace")[:300]
