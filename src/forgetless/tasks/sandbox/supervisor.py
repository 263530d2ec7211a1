"""The process beside the user's own that runs programs one after the other and judges them.

It reads one JSON object a line (`program`, `seconds`, `memory_bytes`) and answers with one
(`passed`, `reason`). A program is a fork of this process, whose modules are imported already: a
few milliseconds instead of an interpreter's start.

How it knows that a program reached its end: nothing that the program can write or find counts. The
main thread stands at a gate (it reads from an empty pipe) before the program and again after it,
called from the same frame of the interpreter's C stack; the kernel says where (/proc/PID/syscall:
the call, its arguments, the stack pointer, the instruction). While the program runs, that frame is
busy with it, so all that it calls stands deeper. Only by returning does it come back to the place.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetless.tasks.sandbox import confine, guard, syscalls

__all__ = ["main"]

Texts = tuple[tuple[str, dict[str, Any]], ...]
"""Programs, each with the variables that it begins with."""

OUTPUT_BYTES = 1 << 20
_TAIL = 4096

PATIENCE = 20
"""Even where there is no free core, a program is ended after so many times its seconds."""

_STARTING = 60
_HERE = os.path.dirname(os.path.abspath(__file__))
_PRELOADED = (
    *("typing", "math", "cmath", "re", "collections", "itertools", "functools", "operator"),
    *("heapq", "bisect", "array", "random", "copy", "string", "hashlib", "datetime", "decimal"),
    *("fractions", "statistics", "json", "dataclasses", "enum", "textwrap", "calendar", "struct"),
    *("queue", "threading", "contextlib", "io", "numbers", "pprint", "types", "warnings"),
    *("traceback", "unicodedata", "tempfile", "unittest", "asyncio", "locale", "linecache"),
)


def main() -> None:
    """Prepare, say which layers there are, then answer until the input ends."""
    requests, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1):
        os.dup2(nothing, standard)
    for name in _PRELOADED:
        __import__(name)
    try:
        supervisor = _prepare()
        _first_check(supervisor)
    except OSError as problem:
        _say(answers, {"error": str(problem)})
        return
    _say(answers, {"layers": supervisor.confinement.layers()})
    lines = os.fdopen(requests, encoding="utf-8")
    for line in lines:
        # No handler around this: in a fork none may stand between the program and its end.
        _say(answers, supervisor.judge(**json.loads(line)))


def _say(answers: int, content: dict[str, object]) -> None:
    data = (json.dumps(content) + "\n").encode()
    while data:
        data = data[os.write(answers, data) :]


def _prepare() -> Supervisor:
    """Take the strongest layers that there are.

    Raises:
        OSError: too few for hostile programs.
    """
    if sys.platform != "linux" or os.uname().machine not in syscalls.ARCHITECTURES:
        raise OSError("generated programs need Linux on x86-64 or ARM64")
    processes = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    readable = tuple(confine.readable_folders())
    # Tried in a fork first, as a half-made root cannot be left again.
    wanted = "--no-private-root" not in sys.argv
    private = wanted and _succeeds(lambda: confine.enter_private_root(readable))
    nobody = private and confine.enter_private_root(readable)
    landlock = confine.landlock_version()
    if not (private or landlock):
        raise OSError(
            "generated programs need a kernel with Landlock (Linux 5.13 or newer) or the right to "
            "make namespaces; without one of them they could read your files"
        )
    confinement = confine.Confinement(readable, private, nobody, landlock, used)
    return Supervisor(confinement, processes)


def _succeeds(step: Callable[[], object]) -> bool:
    """Whether a step works, tried in a fork."""
    pid = os.fork()
    if pid == 0:
        with suppress(OSError):
            step()
            os._exit(0)
        os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def _first_check(supervisor: Supervisor) -> None:
    """Judge an empty program.

    Raises:
        OSError: it does not pass: a layer, or the view of the gate, is missing.
    """
    found = supervisor.judge(program="", seconds=10.0, memory_bytes=0)
    if not found["passed"]:
        raise OSError(f"generated programs cannot be judged here: {found['reason']}")


@dataclass
class Supervisor:
    """Judges programs one after the other.

    Attributes:
        confinement: what they are put into.
        processes: handle of the folder /proc, which a private root does not show.
    """

    confinement: confine.Confinement
    processes: int

    def judge(
        self, program: str, seconds: float, memory_bytes: int, guarded: bool = True
    ) -> dict[str, object]:
        """Run a program; whether it reached its end, and a line that says what happened.

        Args:
            program: source text.
            seconds: it may take.
            memory_bytes: address space.
            guarded: False leaves it to the kernel alone, to test that layer.
        """
        box = self.confinement.make_box()
        pipes = [os.pipe() for _ in range(4)]
        pid = os.fork()
        if pid == 0:
            writing = [pipes[0][1], pipes[1][1], pipes[2][1]]
            self._enter(box, seconds, memory_bytes, [*writing, pipes[3][0]])
            _stand(*self._parts(box, program, guarded))
            os._exit(1)
        for end in (pipes[0][1], pipes[1][1], pipes[2][1], pipes[3][0]):
            os.close(end)
        gate = pipes[3][1]
        watch = _Watch(pid, self.processes, seconds, pipes[0][0], pipes[1][0], pipes[2][0], gate)
        passed, reason = watch.verdict()
        for end in (pipes[0][0], pipes[1][0], pipes[2][0], gate):
            os.close(end)
        if not self.confinement.private_root:
            shutil.rmtree(box, onerror=_make_removable)
        return {"passed": passed, "reason": reason}

    def _enter(self, box: str, seconds: float, memory_bytes: int, ends: list[int]) -> None:
        """In the fork: keep nothing but `ends`, and close the sandbox."""
        try:
            ends = [os.dup(end) for end in ends]  # above those that are now given away
            for place, end in zip((1, 2, _REPORT, _GATE), ends, strict=True):
                os.dup2(end, place)
            os.closerange(_GATE + 1, os.sysconf("SC_OPEN_MAX"))
            self.confinement.lock(box, seconds, memory_bytes)
        except OSError as problem:
            os.write(_REPORT, f"?{problem}".encode())
            os._exit(1)

    def _parts(self, box: str, program: str, guarded: bool) -> tuple[Any, ...]:
        """In the closed sandbox: what `_stand` needs, in an interpreter like a new one."""
        os.environ.clear()
        os.environ.update(HOME=box, TMPDIR=box)
        sys.argv = ["program.py"]
        for name in [n for n in sys.modules if n.startswith(("forgetless", "ctypes", "_ctypes"))]:
            del sys.modules[name]
        sys.modules["__main__"] = module = types.ModuleType("__main__")
        sys.excepthook = _leave
        # A traceback looks for its sources in all of the path.
        readable = (*self.confinement.readable, *sys.path, _HERE)
        if guarded:
            guard.install(box, readable, confine.DEVICES, _REPORT)
        texts: Texts = (("", {}), (_THREAD, {}), (program, vars(module)))
        return texts, exec, os.write, (_REPORT, b"g"), os.read, (_GATE, 1)


_REPORT, _GATE = 3, 4


def _leave(kind: type[BaseException], error: BaseException, _: object) -> None:
    """Say what was raised and be gone; an interpreter's own end takes a tenth of a second."""
    line = traceback.format_exception_only(kind, error)[-1]
    os.write(_REPORT, b"!" + line.encode("utf-8", "replace")[:300])
    os._exit(1)


# The C library waits in a slightly deeper place once there have been threads: both are measured.
_THREAD = """
import _thread
_thread.stack_size(65536)
lock = _thread.allocate_lock()
lock.acquire()
_thread.start_new_thread(lock.release, ())
lock.acquire()
_thread.stack_size(0)
"""
_STANDS = 2


def _stand(
    texts: Texts,
    run: Callable[..., Any],
    write: Callable[..., Any],
    note: tuple[int, bytes],
    read: Callable[..., bytes],
    gate: tuple[int, int],
) -> None:
    """Stand at the gate before the program, and again after it.

    The functions and what they are given are on the interpreter's stack before a text runs, where
    no program can reach them; and there is no handler here or in any caller, so that a text which
    raises leaves for good. All stands are the same instruction.
    """
    for text, space in texts:
        read(*(write(*(run(text, space) or note)) and gate))


@dataclass
class _Watch:
    """One program while it runs.

    Attributes:
        pid: its process.
        processes: handle of /proc.
        seconds: it may take.
        out: its standard output.
        err: its standard error.
        report: where it says that it stands at the gate, or what it was stopped for.
        gate: lets it pass the gate.
    """

    pid: int
    processes: int
    seconds: float
    out: int
    err: int
    report: int
    gate: int
    written: int = 0
    tail: bytes = b""
    stopped: str = ""
    claims: bool = False
    places: tuple[tuple[str, ...], ...] = ()
    started: float = 0.0
    passed: bool = False

    def verdict(self) -> tuple[bool, str]:
        """Wait for the end, kill what is left, and say how it went."""
        ended = os.pidfd_open(self.pid)
        poller = select.poll()
        for source in (self.out, self.err, self.report, ended):
            poller.register(source, select.POLLIN)
        self.started = time.monotonic()
        reason: str | None = None
        dead = False
        while reason is None and not dead:
            ready = [source for source, _ in poller.poll(1 if self.claims else 50)]
            for source in ready:
                if source != ended and not self._drain(source):
                    poller.unregister(source)
            # What a dead program has said is read before its death counts.
            dead = ready == [ended]
            reason = self._judged()
        os.close(ended)
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        reason = reason or self._of_death(status)
        return self.passed, reason

    def _drain(self, source: int) -> bool:
        """Take what was written; False when nothing will come any more."""
        data = os.read(source, 1 << 16)
        if source != self.report:
            self.written += len(data)
            if source == self.err:
                self.tail = (self.tail + data)[-_TAIL:]
        elif data[:1] in (b"!", b"?"):
            self.stopped = self.stopped or data.decode("utf-8", "replace")
        elif data:
            self.claims = True
        return bool(data)

    def _judged(self) -> str | None:
        """The reason to end now, or None to go on."""
        if self.stopped.startswith("?") and not self.places:
            raise OSError(f"the sandbox could not be closed: {self.stopped[1:]}")
        if self.stopped:
            return self.stopped[1:]
        if self.written > OUTPUT_BYTES:
            return f"wrote more than {OUTPUT_BYTES >> 20} MiB"
        if self.claims and (place := self._stands()) is not None:
            if len(self.places) < _STANDS:
                self._pass(place)
            elif place not in self.places:
                return "claimed to have ended without having ended"
            elif self._threads() == 1:
                self.passed = True
                return "ran to its end"
        return self._too_long()

    def _pass(self, place: tuple[str, ...]) -> None:
        """It stands at the gate before its program: note the place, start the clock, let it go."""
        self.places, self.claims = (*self.places, place), False
        self.started = time.monotonic()
        os.write(self.gate, b"g")

    def _too_long(self) -> str | None:
        """Whether the program has had its time.

        Waiting for a free core does not count, and computing counts half: beside others, a core
        does as little as half the work in a second.
        """
        passed = time.monotonic() - self.started
        if len(self.places) < _STANDS:
            if passed > _STARTING:
                raise OSError(f"the sandbox was not ready after {_STARTING} s")
            return None
        if passed < self.seconds:
            return None
        computed, waited = self._times()
        if passed - waited - computed / 2 < self.seconds and passed < PATIENCE * self.seconds:
            return None
        what = "left threads behind" if self.claims else "did not end"
        return f"{what} within {self.seconds:g} s"

    def _stands(self) -> tuple[str, ...] | None:
        """Stack pointer and instruction of the main thread, if it reads from the gate."""
        with suppress(OSError):
            call, *rest = self._read("syscall").split()
            if len(rest) == 8 and int(call) == syscalls.NUMBERS["read"]:
                return tuple(rest[-2:]) if int(rest[0], 16) == _GATE else None
        return None

    def _times(self) -> tuple[float, float]:
        """Seconds that the main thread ran, and that it was ready to run and had no core."""
        with suppress(OSError, ValueError):
            ran, waited, _ = self._read("schedstat").split()
            return int(ran) / 1e9, int(waited) / 1e9
        return 0.0, 0.0

    def _read(self, name: str) -> str:
        handle = os.open(f"{self.pid}/{name}", os.O_RDONLY, dir_fd=self.processes)
        try:
            return os.read(handle, 4096).decode()
        finally:
            os.close(handle)

    def _threads(self) -> int:
        """How many threads it has; 0 once it is gone."""
        with suppress(OSError):
            handle = os.open(f"{self.pid}/task", os.O_RDONLY, dir_fd=self.processes)
            try:
                return len(os.listdir(handle))
            finally:
                os.close(handle)
        return 0

    def _of_death(self, status: int) -> str:
        """What a program that ended without standing at the gate again ended with."""
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGSYS:
            return "made a system call that is not allowed"
        if code == -signal.SIGXCPU:
            return f"did not end within {self.seconds:g} s"
        if code < 0:
            return f"was ended by signal {signal.Signals(-code).name}"
        error = _error(self.tail.decode("utf-8", "replace"))
        return error or f"left before its end, with exit status {code}"


def _error(printed: str) -> str | None:
    """The line that names the error in what an interpreter printed."""
    _, found, trace = printed.rpartition("Traceback (most recent call last):\n")
    lines = trace.splitlines() if found else []
    return next((line[:300] for line in lines if line and not line.startswith(" ")), None)


def _make_removable(remove: Callable[[str], object], path: str, _: object) -> None:
    """A folder that its program made unreadable, once more."""
    with suppress(OSError):
        os.chmod(os.path.dirname(path), 0o700)
        os.chmod(path, 0o700)
        remove(path)
