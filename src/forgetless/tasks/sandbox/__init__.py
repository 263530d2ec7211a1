"""Run a Python program that nobody has read: `run_code`, and what it returns.

The program cannot reach the network, other processes, the user's files or environment; it works in
an empty folder that is thrown away, within limits on time, memory, threads, files and output. What
it may import is the standard library. See `confine` for the layers, `guard` for what ends a program
at once, and `supervisor` for why a program cannot pretend to have passed.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetless.core.errors import UserError
from forgetless.tasks.sandbox.plain import receive, send

__all__ = ["CodeResult", "run_code"]

# The packages above are known by their folders alone: what their own files import is not there.
_START = """
import sys, types
folder = sys.argv[1]
for name in ("forgetless", "forgetless.tasks", "forgetless.tasks.sandbox"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["forgetless.tasks.sandbox"].__path__ = [folder]
from forgetless.tasks.sandbox.supervisor import main
main()
"""
_GRACE = 120.0


@dataclass(frozen=True, slots=True)
class CodeResult:
    """What became of a program.

    Attributes:
        passed: it ran to its very end: no exception, no early exit, nothing that is not allowed.
        reason: one line that says what happened.
    """

    passed: bool
    reason: str


def run_code(
    program: str,
    test: str = "",
    *,
    helpers: str = "",
    names: Sequence[str] = (),
    seconds: float = 3.0,
    memory_bytes: int = 512 << 20,
) -> CodeResult:
    """Run a Python program in a sandbox, whatever it may try, and test it from outside.

    Threads may be called from; each has a program of its own at a time.

    Args:
        program: source text, run as `__main__`.
        test: source text that is run once the program has ended, in a process of its own: each name
            in it that nothing else defines is the program's. It calls the program's functions with
            plain data and compares what they return: numbers, texts, `Decimal`, `Fraction`, lists,
            tuples, sets, dictionaries and None; anything else is equal to itself alone. Without a
            test, that the program has ended is its own word.
        helpers: source text that the test begins with.
        names: those that are the program's although `helpers` or Python's own have them too.
        seconds: it may take on a machine of its own. On any other, waiting for a free core does not
            count and computing counts half, so that a right program does not fail because of its
            neighbours; an endless loop ends after twice the time.
        memory_bytes: address space, that of the interpreter (about 60 MiB) included; never less
            than the interpreter and 16 MiB.

    Returns:
        Whether the program and the test ran to their ends, and a line that says what happened.

    Raises:
        UserError: settings out of range, or a system that cannot hold hostile programs: anything
            but Linux on x86-64 or ARM64 with seccomp and either Landlock (5.13) or namespaces.

    Example:
        >>> run_code("def double(x): return 2 * x", "assert double(3) == 6").passed
        True
        >>> run_code("import sys; sys.exit(0)")
        CodeResult(passed=False, reason='left before its end, with exit status 0')
    """
    for name, text in (("program", program), ("test", test), ("helpers", helpers)):
        if not isinstance(text, str):
            raise UserError(f"{name} must be text, got {type(text).__name__}")
    if not 0 < seconds <= 3600:
        raise UserError(f"seconds must be above 0 and at most 3600, got {seconds}")
    if memory_bytes < 1:
        raise UserError(f"memory_bytes must be 1 or more, got {memory_bytes}")
    request = {"program": program, "seconds": float(seconds), "memory_bytes": int(memory_bytes)}
    tested = {"test": test, "helpers": helpers, "names": list(names)}
    for borrow in (_borrow, _Supervisor):
        supervisor = borrow()
        answer = supervisor.ask(request, tested, timeout=20 * seconds + _GRACE)
        if answer is not None:
            _idle.append(supervisor)
            line = " ".join(str(answer["reason"]).split())
            reason = "".join(letter if letter.isprintable() else "?" for letter in line)
            return CodeResult(bool(answer["passed"]), reason)
        supervisor.end()
    return CodeResult(False, "the process that watches programs ended twice")


class _Supervisor:
    """The process of `supervisor.main`, and its pipe."""

    def __init__(self, *options: str) -> None:
        if sys.platform != "linux":
            raise UserError(
                f"generated programs run only on Linux, which can lock them in; this is "
                f"{sys.platform}: evaluate such tasks in a Linux machine or container"
            )
        self.owner = os.getpid()
        folder = str(Path(__file__).resolve().parent)
        wanted = ("LD_LIBRARY_PATH", "TMPDIR")
        keep = {name: os.environ[name] for name in wanted if name in os.environ}
        # One seed for the order of sets makes a score the same every time.
        fixed = {"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1", "LC_ALL": "C.UTF-8"}
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-s", "-P", "-B", "-X", "utf8", "-c", _START, folder, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=keep | fixed,
            cwd="/",
            start_new_session=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._requests, self._answers = self.process.stdin.fileno(), self.process.stdout.fileno()
        first = self._answer(_GRACE)
        if first is None or "error" in first:
            self.end()
            raise UserError(str((first or {}).get("error", "the sandbox did not start")))
        self.layers: list[str] = first["layers"]

    def ask(
        self, request: dict[str, Any], test: dict[str, Any], timeout: float
    ) -> dict[str, Any] | None:
        """The answer to one request; None if none comes."""
        try:
            for message in (request, test):
                send(self._requests, json.dumps(message).encode())
        except OSError:
            return None
        return self._answer(timeout)

    def _answer(self, timeout: float) -> dict[str, Any] | None:
        poller = select.poll()
        poller.register(self._answers, select.POLLIN)
        if not poller.poll(1000 * timeout):
            return None  # an answer is short, and so written in one piece
        message = receive(self._answers)
        answer: dict[str, Any] | None = None if message is None else json.loads(message)
        return answer

    def close(self) -> None:
        """Close this process's ends of the pipes."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def end(self) -> None:
        """Kill the process; its program goes with it."""
        self.process.kill()
        self.process.communicate()


_idle: list[_Supervisor] = []


def _borrow() -> _Supervisor:
    """A supervisor that nobody else in this process uses; those of a parent process stay there."""
    while True:
        try:
            supervisor = _idle.pop()
        except IndexError:
            return _Supervisor()
        if supervisor.process.poll() is None and supervisor.owner == os.getpid():
            return supervisor
        supervisor.close()


@atexit.register
def _end_all() -> None:
    while _idle:
        supervisor = _idle.pop()
        if supervisor.owner == os.getpid():
            supervisor.end()
