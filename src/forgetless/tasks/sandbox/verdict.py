"""The process of a test: it alone decides whether a program is right, and never holds the program.

The test runs here as it is. What it takes from the program stands for an object in the other
process: to call it is to send the arguments there as plain data and to read the result as plain
data, so that every comparison is made here, between values that were built here. A program may
answer whatever it likes; it is not told what is right.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import time
from typing import Any, NoReturn

from forgetless.tasks.sandbox.plain import Handle, decode, encode, receive, send
from forgetless.tasks.sandbox.program import LOOK_UP, last_line

READ, PASSED, ENDED, FAILED = b"g", b"+", b".", b"!"
"""What it reports: its test is read; then passed, the program has ended, or failed and why."""


def run_test(report: int, asked: int, answers: int, tests: int) -> None:
    """Run the next test against the program at the other end of the pipes, and report the verdict.

    Args:
        report: a pipe to the supervisor.
        asked: a pipe for calls.
        answers: a pipe with what came of them.
        tests: a pipe with the test as JSON: `test` and `helpers`, source texts, and `names`, which
            are the program's though `helpers` or Python's own have them too.
    """
    given = json.loads(receive(tests, 1 << 31) or "")
    os.write(report, READ)
    os.close(tests)
    variables: dict[str, Any] = {"__name__": "test"}
    link = _Link(report, asked, answers)
    try:
        exec(compile(given["helpers"], "<helpers>", "exec", dont_inherit=True), variables)
        tree = ast.parse(given["test"])
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        wanted = sorted(used - set(variables) - set(vars(builtins)) | set(given["names"]))
        found = link.call(LOOK_UP, wanted)
        for name in wanted:
            variables.pop(name, None)
            if name in found:
                variables[name] = found[name]
        exec(compile(tree, "<test>", "exec", dont_inherit=True), variables)
    except BaseException as error:
        link.end(FAILED + last_line(error))
    link.end(PASSED)


class _Link:
    """The pipes to the process of the program."""

    def __init__(self, report: int, asked: int, answers: int) -> None:
        self.report, self.asked, self.answers = report, asked, answers
        self.objects: dict[int, _Object] = {}

    def call(self, function: int | str, *given: Any, **named: Any) -> Any:
        """What a function of the program's, or an operation of that name, returns or raises."""
        message = encode((function, list(given), named), _handle)
        try:
            send(self.asked, message)
            if (answer := receive(self.answers)) is None:
                self.end(ENDED)
            returned, value, changed = decode(answer, self._object)
            error = None if returned is True else _error(*value)
            for old, new in zip(given, changed, strict=True) if changed is not None else ():
                if type(old) in (list, bytearray) and type(new) is type(old):
                    old[:] = new
                elif type(old) in (set, dict) and type(new) is type(old):
                    old.clear()
                    old.update(new)
        except BrokenPipeError:
            self.end(ENDED)
        except Exception:
            self.end(FAILED + b"answered with something that is not plain data")
        if error is not None:
            raise error
        return value

    def end(self, verdict: bytes) -> NoReturn:
        """Report at once, whatever handlers the test has, and wait to be killed.

        The program ends when its pipe does; until then the supervisor can look at it.
        """
        os.write(self.report, verdict)
        while True:
            time.sleep(60)

    def _object(self, handle: Handle) -> _Object:
        number, truth = handle
        known = self.objects.setdefault(number, _Object(self, number))
        object.__setattr__(known, "_truth", truth)
        return known


def _handle(value: Any) -> Handle:
    if type(value) is not _Object:
        raise TypeError(f"a test can hand plain data to a program, not {type(value).__name__}")
    return value._number, True


class _Object:
    """Something of the program's that is not plain: a function, an instance, a generator.

    It is equal to itself alone.
    """

    _link: _Link
    _number: int
    _truth: bool

    def __init__(self, link: _Link, number: int) -> None:
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_number", number)

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self._link.call(self._number, *given, **named)

    def __bool__(self) -> bool:
        return self._truth

    def __setattr__(self, name: str, value: Any) -> None:
        self._link.call("setattr", self, name, value)


def _operation(name: str) -> Any:
    return lambda self, *given: self._link.call(name, self, *given)


for _name in ("getattr", "getitem", "len", "iter", "next", "str"):
    setattr(_Object, f"__{_name}__", _operation(_name))


def _error(kind: str, name: str, text: str) -> Exception:
    """An error like one of the program's, of the class of Python's own that is nearest to it."""
    base = getattr(builtins, kind)
    if not issubclass(base, Exception):
        raise TypeError(f"{kind} is no class of errors")
    made: Any = type(name, (base,), {"__module__": "builtins", "__str__": lambda _: text})
    error: Exception = made.__new__(made)
    return error
